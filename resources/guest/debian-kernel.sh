#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fetches the kernel that Debian builds for virtual machines, unchanged, and prints the path of its
# bzImage, and of an initrd that loads its drivers for Bantam's machine and then starts the root file
# system on the first disk. It installs nothing and fetches nothing twice: the results stay in
# $BANTAM_CACHE (~/.cache/bantam if unset), in a folder named after the package.

set -euo pipefail
shopt -s inherit_errexit

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cache=${BANTAM_CACHE:-${XDG_CACHE_HOME:-${HOME:-~}/.cache}/bantam}
export LC_ALL=C

# In the order in which they are loaded: each after those it needs. ext4 and the serial port are part
# of the kernel.
modules=(
    drivers/virtio/{virtio_ring,virtio,virtio_mmio} drivers/block/virtio_blk
    net/core/failover drivers/net/{net_failover,virtio_net} drivers/char/hw_random/virtio-rng
    drivers/acpi/button drivers/input/evdev
)

# shellcheck source=cpio.sh
. "$here/cpio.sh"

die() {
    printf 'debian-kernel.sh: %s\n' "$*" >&2
    exit 1
}

# The package of the newest kernel, on which an empty package depends; nothing if apt has no lists of
# packages.
newest_package() {
    apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
        sed --quiet 's/^ *Depends: //p' || true
}

newest_cached() {
    find "$cache" -mindepth 1 -maxdepth 1 -name "linux-image-*-cloud-amd64+$version" -printf '%f\n' \
        2>/dev/null | sort --version-sort | tail -n 1 || true
}

# make_initrd INIT FOLDER: an archive with the modules of the kernel, which are in FOLDER.
make_initrd() {
    local module
    cpio_entry bin 040755 0 0 /dev/null
    cpio_entry bin/busybox 0100755 0 0 /bin/busybox
    cpio_entry dev 040755 0 0 /dev/null
    cpio_entry dev/console 020600 5 1 /dev/null
    cpio_entry modules 040755 0 0 /dev/null
    for module in "${modules[@]}"; do
        cpio_entry "modules/${module##*/}.ko" 0100644 0 0 "$2/kernel/$module.ko"
    done
    cpio_entry root 040755 0 0 /dev/null
    cpio_entry init 0100755 0 0 "$1"
    cpio_end
}

init_script() {
    cat <<EOF
#!/bin/busybox sh
set -e
busybox mount -t devtmpfs dev /dev
for module in ${modules[*]##*/}; do
    busybox insmod "/modules/\$module.ko"
done
busybox mount -t ext4 /dev/vda /root
busybox umount /dev
exec busybox switch_root /root /sbin/init "\$@"
EOF
}

[[ -x /bin/busybox ]] || die "there is no /bin/busybox, try: apt-get install busybox-static"
# A checksum of all inputs except the package.
version=$({
    declare -f make_initrd init_script cpio_entry cpio_end cpio_pad
    printf '%s\n' "${modules[@]}"
    cat /bin/busybox
} | sha256sum | cut -c 1-8)

package=$(newest_package)
if [[ -z $package ]]; then
    package=$(newest_cached)
    package=${package%+*}
fi
if [[ -z $package ]]; then
    ((EUID == 0)) || die "apt knows no linux-image-cloud-amd64, try: sudo apt-get update"
    apt-get --quiet --quiet update >&2 || die "cannot update apt's lists of packages"
    package=$(newest_package)
    [[ -n $package ]] || die "apt's sources have no linux-image-cloud-amd64: add those of Debian"
fi

folder=$cache/$package+$version
mkdir -p -- "$cache"
exec {lock}>"$cache/.debian-kernel.lock"
flock "$lock"
if [[ ! -d $folder ]]; then
    work=$cache/.debian-kernel.building
    # A killed download has left its files behind.
    rm -rf -- "$work"
    mkdir -- "$work" "$work/result"
    trap 'rm -rf -- "$work"' EXIT
    printf 'downloading %s\n' "$package" >&2
    (cd -- "$work" && apt-get --quiet --quiet --option APT::Sandbox::User=root download "$package" >&2) ||
        die "cannot download $package, try: apt-get update"
    dpkg-deb --extract "$work/$package"_*.deb "$work/files"
    init_script >"$work/init"
    make_initrd "$work/init" "$work"/files/lib/modules/* >"$work/result/initrd.cpio"
    mv -- "$work"/files/boot/vmlinuz-* "$work/result/bzImage"
    mv -- "$work/result" "$folder"
fi
printf '%s\n' "$folder"/{bzImage,initrd.cpio}
