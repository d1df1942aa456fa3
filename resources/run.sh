#!/usr/bin/env bash
# run.sh BANTAM FOLDER: boots a Linux kernel that suits this host, with a copy of the guests' root file
# system, made in FOLDER. At a terminal the guest runs a shell; otherwise it describes its machine and
# powers off.
set -euo pipefail

bantam=$1
folder=$2

paths=$("$(dirname -- "${BASH_SOURCE[0]}")/guest/build.sh" run)
options=()
while IFS= read -r path; do
    case ${path##*/} in
        # For hosts that emulate the kernel: one processor, and little memory to set up.
        vmlinux) options+=(--kernel "$path" --memory 256M) ;;
        bzImage) options+=(--kernel "$path" --cpus 2) ;;
        initrd.cpio) options+=(--initrd "$path") ;;
        rootfs.ext4) rootfs=$path ;;
    esac
done <<<"$paths"
mkdir -p -- "$folder"
# A new file, as an older machine may still use the previous one.
cp --sparse=always --remove-destination -- "$rootfs" "$folder/root.img"

# Whether a program started from here can create a tap: bit 12 of its capabilities is CAP_NET_ADMIN.
can_create_tap() {
    local capabilities
    capabilities=$(sed --quiet 's/^CapEff:[[:space:]]*//p' /proc/self/status)
    [[ -r /dev/net/tun && -w /dev/net/tun ]] && ((16#$capabilities >> 12 & 1))
}

if [[ -t 0 && -t 1 ]]; then mode=shell; else mode=report; fi
if can_create_tap; then
    # A unique name, so that two of these can run at once.
    options+=(--net "tap=bantam$$")
else
    echo "No network: its tap takes CAP_NET_ADMIN (docs/networking.md says how to have one)." >&2
fi
exec "$bantam" run --disk "$folder/root.img" "${options[@]}" --exit-status monitor \
    --append "quiet bantam.mode=$mode"
