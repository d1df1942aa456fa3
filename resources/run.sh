#!/usr/bin/env bash
# run.sh BANTAM FOLDER: boots the full guest kernel with the guests' root file system, of which a
# copy is made in FOLDER. At a terminal the guest runs a shell; otherwise it reports what machine it
# finds and powers off.
set -euo pipefail

bantam=$1
folder=$2
build=$(dirname -- "${BASH_SOURCE[0]}")/guest/build.sh

kernel=$("$build" kernel full | grep '/vmlinux$')
rootfs=$("$build" rootfs | grep '/rootfs\.ext4$')
mkdir -p -- "$folder"
cp --sparse=always -- "$rootfs" "$folder/root.img"

if [[ -t 0 && -t 1 ]]; then mode=shell; else mode=report; fi
net=()
if ((EUID == 0)) && [[ -c /dev/net/tun ]]; then
    # A name of its own, so that two of these can run at once.
    net=(--net "tap=bantam$$")
else
    echo "No network: only root can create its tap (docs/networking.md says how to have one)." >&2
fi
exec "$bantam" run --kernel "$kernel" --disk "$folder/root.img" "${net[@]}" --cpus 2 \
    --append "quiet bantam.mode=$mode"
