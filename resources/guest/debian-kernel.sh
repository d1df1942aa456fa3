#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fetches the kernel that Debian builds for virtual machines, unchanged, and prints the path of its
# bzImage. Nothing is installed and nothing is fetched twice: the image stays in $BANTAM_CACHE
# (~/.cache/bantam if unset), in a folder named after the package.

set -euo pipefail
shopt -s inherit_errexit

cache=${BANTAM_CACHE:-${XDG_CACHE_HOME:-${HOME:-~}/.cache}/bantam}
export LC_ALL=C

die() {
    printf 'debian-kernel.sh: %s\n' "$*" >&2
    exit 1
}

# The package of the newest kernel, on which a package without content depends; nothing where apt
# has no lists of packages.
newest_package() {
    apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
        sed --quiet 's/^ *Depends: //p' || true
}

newest_cached() {
    find "$cache" -mindepth 1 -maxdepth 1 -name 'linux-image-*-cloud-amd64' -printf '%f\n' \
        2>/dev/null | sort --version-sort | tail -n 1 || true
}

package=$(newest_package)
[[ -n $package ]] || package=$(newest_cached)
if [[ -z $package ]]; then
    ((EUID == 0)) || die "apt knows no linux-image-cloud-amd64, try: sudo apt-get update"
    apt-get --quiet --quiet update >&2 || die "cannot update apt's lists of packages"
    package=$(newest_package)
    [[ -n $package ]] || die "apt's sources have no linux-image-cloud-amd64: add those of Debian"
fi

folder=$cache/$package
mkdir -p -- "$cache"
exec {lock}>"$cache/.debian-kernel.lock"
flock "$lock"
if [[ ! -d $folder ]]; then
    work=$cache/.debian-kernel.building
    # A download that was killed has left its files behind.
    rm -rf -- "$work"
    mkdir -- "$work" "$work/result"
    trap 'rm -rf -- "$work"' EXIT
    printf 'downloading %s\n' "$package" >&2
    (cd -- "$work" && apt-get --quiet --quiet --option APT::Sandbox::User=root download "$package" >&2) ||
        die "cannot download $package, try: apt-get update"
    dpkg-deb --extract "$work/$package"_*.deb "$work/files"
    mv -- "$work"/files/boot/vmlinuz-* "$work/result/bzImage"
    mv -- "$work/result" "$folder"
fi
printf '%s\n' "$folder/bzImage"
