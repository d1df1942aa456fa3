#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# debian-root.sh: makes a root file system of Debian with cloud-init, unless it is there already, and prints its path.
# It takes root, debootstrap and a network.
set -euo pipefail

suite=bookworm
# debootstrap does not find what provides a virtual package: python3-cffi-backend has to be named.
packages=cloud-init,python3-cffi-backend,openssh-server,ifupdown,iproute2,sudo,systemd-sysv,udev,dbus
cache=${BANTAM_CACHE:-${XDG_CACHE_HOME:-${HOME:-~}/.cache}/bantam}
root=$cache/debian-$suite-$(sha256sum <<<"$packages" | cut -c 1-8)

mkdir -p -- "$cache"
exec {lock}>"$cache/.debian-root.lock"
flock "$lock"
if [[ ! -d $root ]]; then
    work=$cache/.debian-root.building
    rm -rf -- "$work"
    debootstrap --variant=minbase --include="$packages" "$suite" "$work" >&2
    mv -- "$work" "$root"
fi
echo "$root"
