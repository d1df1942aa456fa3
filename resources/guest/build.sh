#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guests that Bantam is tested with and tried out with:
#
#   build.sh kernel small|full   vmlinux and bzImage
#   build.sh bzimages            the full kernel's bzImage in every compression format
#   build.sh rootfs              rootfs.ext4 and initrd.cpio
#   build.sh all                 all of these
#   build.sh packages            builds nothing: the Debian packages that all this takes
#
# Prints the paths of the results on standard output, one per line, and what it is doing on standard
# error. Nothing is built twice: results stay in $BANTAM_CACHE (~/.cache/bantam if unset), in folders
# named after a checksum of everything they are made from.

set -euo pipefail
shopt -s inherit_errexit

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
agent=$(cd -- "$here/../../tests/agent" && pwd)
cache=${BANTAM_CACHE:-${XDG_CACHE_HOME:-${HOME:-~}/.cache}/bantam}

linux=6.12
kernel_packages=(bc binutils bison bzip2 flex gcc gzip libelf-dev "linux-source-$linux" lz4 lzop
    make patch perl xz-utils zstd)
rootfs_packages=(busybox-static e2fsprogs gcc)
compressions=(bzip2 gzip lz4 lzma lzo xz zstd)

# Nothing of the caller's environment may change what is built. mke2fs and debugfs are in folders
# that not every user's PATH has.
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
unset MAKEFLAGS MFLAGS CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "build.sh: $*"
    exit 1
}

require_packages() {
    local package status missing=()
    for package in "$@"; do
        status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || true
        [[ $status == installed ]] || missing+=("$package")
    done
    ((${#missing[@]} == 0)) || die "missing packages, try: apt-get install ${missing[*]}"
}

# What is being built: the process at work on it, if any, and the folder it works in.
job=
work=

clean_up() {
    if [[ -n $job ]]; then
        kill "$job" 2>/dev/null || true
        wait "$job" || true
    fi
    [[ -z $work ]] || rm -rf -- "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM

# follow WHAT COMMAND...: runs the command and says how far it has come, by the time and the number of
# files that it reports as made.
follow() {
    local what=$1 log=$work/log started=$SECONDS next=30 files line
    shift
    "$@" </dev/null >"$log" 2>&1 &
    job=$!
    [[ -t 2 ]] || say "$what"
    while kill -0 "$job" 2>/dev/null; do
        sleep 1
        if [[ -t 2 ]] || ((SECONDS - started >= next)); then
            files=$(grep --count '^  [A-Z0-9]* ' "$log") || true
            line="$what: $((SECONDS - started)) s"
            ((files == 0)) || line+=", $files files"
            if [[ -t 2 ]]; then
                printf '\r%s\033[K' "$line" >&2
            else
                say "$line"
            fi
            next=$((next + 30))
        fi
    done
    [[ ! -t 2 ]] || printf '\n' >&2
    if ! wait "$job"; then
        job=
        tail -n 20 -- "$log" >&2
        die "$what: failed"
    fi
    job=
}

# artefact NAME INPUTS BUILD ARGUMENT...: sets `folder` to the folder that `BUILD ARGUMENT...` fills,
# after filling it if need be. INPUTS is a text that differs whenever the result would.
artefact() {
    local name=$1 inputs=$2 lock
    shift 2
    folder=$cache/$name-$(sha256sum <<<"$inputs" | cut -c 1-16)
    [[ ! -d $folder ]] || return 0

    mkdir -p -- "$cache"
    # The programs of a build inherit the lock. So nobody removes the files of one that has outlived
    # its script.
    exec {lock}>"$cache/.$name.lock"
    if ! flock --nonblock "$lock"; then
        say "$name: waiting for another build"
        flock "$lock"
    fi
    if [[ ! -d $folder ]]; then
        work=$cache/.$name.building
        # A build that was killed has left its files behind.
        rm -rf -- "$work"
        mkdir -- "$work" "$work/result"
        "$@" >&2
        mv -- "$work/result" "$folder"
        rm -rf -- "$work"
        work=
    fi
    exec {lock}>&-
}

kernel() {
    local flavour=$1 inputs
    require_packages "${kernel_packages[@]}"
    inputs=$(kernel_inputs "$flavour")
    artefact "kernel-$flavour" "$inputs" build_kernel "$flavour"
}

kernel_inputs() {
    (cd -- "$here/kernel" && sha256sum -- "$1.config" ./*.patch)
    dpkg-query --show "linux-source-$linux"
    declare -f build_kernel make_kernel
}

build_kernel() {
    local flavour=$1 patch compression
    source=$work/source
    mkdir -- "$source"
    follow "kernel $flavour: unpacking" \
        tar --extract --strip-components=1 --directory "$source" \
        --file "/usr/src/linux-source-$linux.tar.xz"
    for patch in "$here"/kernel/*.patch; do
        patch --directory "$source" --strip=1 --quiet <"$patch"
    done
    cp -- "$here/kernel/$flavour.config" "$source/.config"
    follow "kernel $flavour: compiling (about 5 minutes, once)" \
        make_kernel olddefconfig vmlinux bzImage
    strip --strip-debug -o "$work/result/vmlinux" "$source/vmlinux"
    cp -- "$source/arch/x86/boot/bzImage" "$work/result/bzImage"

    [[ $flavour == full ]] || return 0
    for compression in "${compressions[@]}"; do
        sed --in-place '/^CONFIG_KERNEL_/d' "$source/.config"
        printf 'CONFIG_KERNEL_%s=y\n' "${compression^^}" >>"$source/.config"
        follow "kernel $flavour: bzImage.$compression" make_kernel olddefconfig bzImage
        cp -- "$source/arch/x86/boot/bzImage" "$work/result/bzImage.$compression"
    done
}

make_kernel() {
    # With the same name, version and date in it, the same source gives the same kernel.
    make --no-print-directory --directory="$source" --jobs="$(nproc)" ARCH=x86_64 \
        KBUILD_BUILD_USER=bantam KBUILD_BUILD_HOST=bantam KBUILD_BUILD_VERSION=1 \
        KBUILD_BUILD_TIMESTAMP=1970-01-01 "$@"
}

rootfs() {
    local inputs
    require_packages "${rootfs_packages[@]}"
    command -v cargo >/dev/null || die "missing cargo, see https://rustup.rs"
    inputs=$(rootfs_inputs)
    artefact rootfs "$inputs" build_rootfs
}

rootfs_inputs() {
    (cd -- "$agent" && sha256sum -- Cargo.toml Cargo.lock src/*)
    dpkg-query --show busybox-static
    declare -f build_rootfs make_ext4 make_initrd cpio_entry pad
}

build_rootfs() {
    local root=$work/root applet
    follow "rootfs: compiling the agent" \
        env CARGO_TARGET_DIR="$work/target" \
        RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
        cargo build --manifest-path "$agent/Cargo.toml" --locked --release \
        --target x86_64-unknown-linux-gnu

    mkdir -- "$root" "$root"/{bin,dev,etc,proc,root,run,sbin,sys,tmp}
    install -m 755 -- "$work/target/x86_64-unknown-linux-gnu/release/bantam-agent" "$root/sbin/init"
    install -m 755 -- /bin/busybox "$root/bin/busybox"
    for applet in $(/bin/busybox --list); do
        [[ $applet == busybox ]] || ln -- "$root/bin/busybox" "$root/bin/$applet"
    done
    printf 'root::0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
    printf 'root:x:0:\n' >"$root/etc/group"
    printf 'PS1="bantam:\\w# "\n' >"$root/etc/profile"

    make_ext4 "$root" "$work/result/rootfs.ext4"
    make_initrd "$root/sbin/init" >"$work/result/initrd.cpio"
}

# Without a journal, checksums and lazy initialisation: a guest that runs for a second has no use for
# them, and each makes it take longer to mount.
make_ext4() {
    local root=$1 image=$2 id=ba27a000-0000-4000-8000-000000000001 path field
    E2FSPROGS_FAKE_TIME=1 mke2fs -q -t ext4 -b 4096 -N 256 -m 0 -L bantam -U "$id" \
        -E hash_seed="$id",root_owner=0:0 -O none,extent,filetype,large_file,sparse_super \
        -d "$root" "$image" 16m >"$work/log"
    # The owner and the times of the files are still those of the build.
    while IFS= read -r -d '' path; do
        for field in uid gid; do
            printf 'set_inode_field /%s %s 0\n' "$path" "$field"
        done
        for field in atime ctime mtime; do
            printf 'set_inode_field /%s %s @1\nset_inode_field /%s %s_extra 0\n' \
                "$path" "$field" "$path" "$field"
        done
    done < <(find "$root" -mindepth 1 -printf '%P\0') >"$work/fields"
    E2FSPROGS_FAKE_TIME=1 debugfs -w -f "$work/fields" "$image" >/dev/null 2>"$work/log"
}

# The archive holds a device file, which only root can make on disk, so it is written by hand.
make_initrd() {
    cpio_entry dev 040755 0 0 /dev/null
    cpio_entry dev/console 020600 5 1 /dev/null
    cpio_entry init 0100755 0 0 "$1"
    cpio_entry 'TRAILER!!!' 0 0 0 /dev/null
}

# cpio_entry NAME MODE MAJOR MINOR CONTENT: one entry of an archive in the "newc" format.
cpio_entry() {
    local name=$1 size
    size=$(wc -c <"$5")
    # Magic, inode, mode, owner, group, links, time, size, device, special device, name length, sum.
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X' \
        0 "$2" 0 0 1 0 "$size" 0 0 "$3" "$4" $((${#name} + 1)) 0
    printf '%s\0' "$name"
    pad $((110 + ${#name} + 1))
    cat -- "$5"
    pad "$size"
}

# Fills up to the next multiple of four what is SIZE bytes long.
pad() {
    head -c $((-$1 & 3)) /dev/zero
}

usage() {
    sed --quiet 's/^#   //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

case ${*:-} in
    "kernel small" | "kernel full")
        kernel "$2"
        printf '%s\n' "$folder"/{vmlinux,bzImage}
        ;;
    bzimages)
        kernel full
        printf '%s\n' "${compressions[@]/#/$folder/bzImage.}"
        ;;
    rootfs)
        rootfs
        printf '%s\n' "$folder"/{rootfs.ext4,initrd.cpio}
        ;;
    all)
        kernel small
        printf '%s\n' "$folder"/{vmlinux,bzImage}
        kernel full
        printf '%s\n' "$folder"/{vmlinux,bzImage} "${compressions[@]/#/$folder/bzImage.}"
        rootfs
        printf '%s\n' "$folder"/{rootfs.ext4,initrd.cpio}
        ;;
    packages)
        printf '%s\n' "${kernel_packages[@]}" "${rootfs_packages[@]}" | sort --unique
        ;;
    *)
        usage
        ;;
esac
