#!/usr/bin/env bash
# Installs the Debian packages that building and testing need, and says which. Does nothing, and
# asks for no privilege, where all of them are there.
set -euo pipefail
cd "$(dirname "$0")"

mapfile -t needed < <(guest/build.sh packages)
# Beside the guest's: a linker for Rust, the peer of the benchmarks, the judges of disk images, and
# network tools of the tests.
needed+=(gcc libc6-dev make qemu-system-x86 qemu-utils iproute2 iptables nftables procps)

missing=()
for package in "${needed[@]}"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

echo "Installing Debian packages: ${missing[*]}" >&2
as_root=()
if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
        echo "error: installing them needs root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi
# Set by `env`, as sudo drops most of its caller's environment.
apt_get=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get)
"${apt_get[@]}" update --quiet --quiet >&2
"${apt_get[@]}" install --quiet --yes --no-install-recommends "${missing[@]}" >&2
