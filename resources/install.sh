#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# install.sh BINARY PREFIX INITRD [KERNEL CONFIG]: installs bantam, its manual pages, its shell completions, the initrd of the helper
# machine that resets identities, and the kernel that machines boot by default with its configuration. The names of KERNEL and
# CONFIG, vmlinux-VERSION and config-VERSION, stay.
set -euo pipefail

if (($# != 3 && $# != 5)); then
    echo "usage: install.sh BINARY PREFIX INITRD [KERNEL CONFIG]" >&2
    exit 2
fi
binary=$1
prefix=$2
initrd=$3
shift 3

# Generate everything before installing anything, so that a program that does not run leaves no traces.
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT
"$binary" man "$work/man"
for shell in bash fish zsh; do
    "$binary" completions "$shell" >"$work/$shell"
done

install -D --mode=755 -- "$binary" "$prefix/bin/bantam"
install -D --mode=644 --target-directory="$prefix/share/man/man1" -- "$work"/man/*.1
install -D --mode=644 -- "$work/bash" "$prefix/share/bash-completion/completions/bantam"
install -D --mode=644 -- "$work/fish" "$prefix/share/fish/vendor_completions.d/bantam.fish"
install -D --mode=644 -- "$work/zsh" "$prefix/share/zsh/site-functions/_bantam"
install -D --mode=644 -- "$initrd" "$prefix/share/bantam/sysprep.cpio"
(($#)) || exit 0
install -D --mode=644 --target-directory="$prefix/share/bantam" -- "$@"
# A machine names the link, so that it boots the latest version at its next start.
ln --symbolic --force --no-dereference -- "${1##*/}" "$prefix/share/bantam/vmlinux"
