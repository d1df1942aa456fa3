#!/usr/bin/env bash
# install-packages.sh [build|run|kernel|all]: installs the Debian packages that a task needs, and prints which:
# `build` compiles the monitor, `run` builds the guest of "make run", `kernel` the kernel that is installed, `all` also
# builds and runs all tests and benchmarks. It does nothing, and needs no privilege, if all of them are installed.
set -euo pipefail
cd "$(dirname "$0")"

task=${1:-all}
# A linker for Rust.
needed=(gcc libc6-dev make)
[[ $task == build ]] || mapfile -t -O "${#needed[@]}" needed < <(guest/build.sh packages "$task")
# The peer of the benchmarks, tools to make and check disk images, file systems and domain XML, a debugger, and network tools
# for the tests.
[[ $task != all ]] || needed+=(qemu-system-x86 qemu-utils btrfs-progs debootstrap dosfstools fdisk mtools xfsprogs xorriso libvirt-clients libxml2-utils gdb dnsmasq-base iperf3 iproute2 iptables nftables openssh-client openssl passt procps tshark busybox-static ufw)

# One at a time: apt's own lock makes the second fail.
exec {lock}<install-packages.sh
flock "$lock"

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
# Set through `env`, as sudo drops most of its caller's environment.
apt_get=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get)
"${apt_get[@]}" update --quiet --quiet >&2
"${apt_get[@]}" install --quiet --yes --no-install-recommends "${missing[@]}" >&2
