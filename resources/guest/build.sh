#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guests for Bantam's tests and for trying it out:
#
#   build.sh kernel small|full   vmlinux
#   build.sh kernel distribution vmlinux and its configuration: the kernel that is installed with Bantam
#   build.sh bzimages            the small kernel's bzImage in every compression format
#   build.sh rootfs              rootfs.ext4, initrd.cpio and bantam-agent
#   build.sh sysprep             sysprep.cpio, the initrd of the helper machine
#   build.sh all                 all of these
#   build.sh run                 what "make run" boots on this host: a kernel, an initrd if the kernel
#                                needs one, and rootfs.ext4
#   build.sh packages run|kernel|all
#                                builds nothing: the Debian packages that "run", "kernel distribution" or "all" takes
#
# Prints the paths of the results on standard output, one per line, and its progress on standard error.
# Nothing is built twice: results stay in $BANTAM_CACHE (~/.cache/bantam if unset), in folders named
# after a checksum of everything they are made from.

set -euo pipefail
shopt -s inherit_errexit

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
agent=$(cd -- "$here/../../tests/agent" && pwd)
sysprep=$(cd -- "$here/../../sysprep" && pwd)
cache=${BANTAM_CACHE:-${XDG_CACHE_HOME:-${HOME:-~}/.cache}/bantam}

linux=6.12
kernel_packages=(bc binutils bison flex gcc libelf-dev "linux-source-$linux" make patch perl xz-utils)
bzimage_packages=(bzip2 gzip lz4 lzop xz-utils zstd)
rootfs_packages=(busybox-static e2fsprogs gcc)
compressions=(bzip2 gzip lz4 lzma lzo xz zstd)

# The caller's environment must not change the results. mke2fs and debugfs are in folders that are not
# in every user's PATH.
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
unset MAKEFLAGS MFLAGS CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS

# shellcheck source=cpio.sh
. "$here/cpio.sh"

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

# The current build: its process, if any, its working folder, and the descriptor of its lock.
job=
work=
lock=
# The source of Linux, unpacked once for all kernels of one run of this script. The lock of the
# kernels is its lock.
source=$cache/.kernel.source
source_used=

clean_up() {
    if [[ -n $job ]]; then
        kill "$job" 2>/dev/null || true
        wait "$job" || true
    fi
    [[ -z $work ]] || rm -rf -- "$work"
    [[ -z $lock ]] || exec {lock}>&-
    # Another run of the script that is building a kernel by now removes it instead.
    [[ -z $source_used ]] || flock --timeout 2 "$cache/.kernel.lock" rm -rf -- "$source" || true
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM

# follow WHAT COMMAND...: runs the command and shows its progress: the time, and the number of files
# that it reports as made.
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
# after filling it if necessary. INPUTS is a text that differs if the result would. Names that begin
# with the same word share a lock.
artefact() {
    local name=$1 inputs=$2 group=${1%%-*}
    shift 2
    folder=$cache/$name-$(sha256sum <<<"$inputs" | cut -c 1-16)
    [[ ! -d $folder ]] || return 0

    mkdir -p -- "$cache"
    # The programs of a build inherit the lock, so that nobody removes the files of a build that has
    # outlived its script.
    exec {lock}>"$cache/.$group.lock"
    if ! flock --nonblock "$lock"; then
        say "$name: waiting for another build"
        flock "$lock"
    fi
    if [[ ! -d $folder ]]; then
        work=$cache/.$group.building
        # A killed build has left its files behind.
        rm -rf -- "$work"
        mkdir -- "$work" "$work/result"
        "$@" >&2
        mv -- "$work/result" "$folder"
        rm -rf -- "$work"
        work=
    fi
    exec {lock}>&-
    lock=
}

kernel() {
    local flavour=$1 inputs
    require_packages "${kernel_packages[@]}"
    inputs=$(kernel_inputs "$flavour")
    artefact "kernel-$flavour" "$inputs" build_kernel "$flavour"
}

kernel_inputs() {
    (cd -- "$here/kernel" && sha256sum -- "$1.config")
    source_inputs
    declare -f build_kernel configure_kernel make_kernel
}

build_kernel() {
    local flavour=$1
    open_source
    configure_kernel "$flavour"
    follow "kernel $flavour: compiling (some minutes, once)" make_kernel vmlinux
    strip --strip-debug -o "$work/result/vmlinux" "$source/vmlinux"
    close_source
}

# The kernel of an installation is `full` with the options that a distribution needs. Its version is its name.
distribution_kernel() {
    local inputs
    require_packages "${kernel_packages[@]}"
    inputs=$(distribution_inputs)
    artefact kernel-distribution "$inputs" build_distribution
}

distribution_inputs() {
    (cd -- "$here/kernel" && sha256sum -- full.config distribution.config)
    source_inputs
    declare -f build_distribution configure_distribution make_kernel
}

build_distribution() {
    local release
    open_source
    configure_distribution
    follow "kernel distribution: compiling (some minutes, once)" make_kernel vmlinux
    release=$(make_kernel --silent kernelrelease)
    strip --strip-debug -o "$work/result/vmlinux-$release" "$source/vmlinux"
    cp -- "$source/.config" "$work/result/config-$release"
    close_source
}

# An option that lacks what it depends on is left out by olddefconfig, which says nothing of it.
configure_distribution() {
    local options=$here/kernel/distribution.config lacking
    "$source/scripts/kconfig/merge_config.sh" -m -O "$source" "$here/kernel/full.config" "$options" >/dev/null
    make_kernel --silent olddefconfig >&2
    lacking=$(grep --extended-regexp '^(# )?CONFIG_' "$options" |
        grep --invert-match --line-regexp --fixed-strings --file="$source/.config") || true
    [[ -z $lacking ]] || die "Linux $linux does not take these options: ${lacking//$'\n'/, }"
}

bzimages() {
    local inputs
    require_packages "${kernel_packages[@]}" "${bzimage_packages[@]}"
    inputs=$(bzimages_inputs)
    artefact kernel-bzimages "$inputs" build_bzimages
}

bzimages_inputs() {
    kernel_inputs small
    printf '%s\n' "${compressions[@]}"
    declare -f build_bzimages
}

# Once the small kernel has been compiled, only its last stage is repeated for each format.
build_bzimages() {
    local compression
    open_source
    for compression in "${compressions[@]}"; do
        configure_kernel small "CONFIG_KERNEL_${compression^^}=y"
        follow "kernel small: bzImage.$compression" make_kernel bzImage
        cp -- "$source/arch/x86/boot/bzImage" "$work/result/bzImage.$compression"
    done
    close_source
}

source_inputs() {
    (cd -- "$here/kernel" && sha256sum -- *.patch)
    dpkg-query --show "linux-source-$linux"
    declare -f open_source
}

# Prepares `source` for a build. A killed build may have left half a file there, so only a folder that
# close_source has marked is used again. Drivers of graphics cards, which no guest has, are a third of
# the source and are left out.
open_source() {
    local patch inputs
    inputs=$(source_inputs)
    source_used=yes
    if [[ ! -f $source/.complete || $(<"$source/.complete") != "$inputs" ]]; then
        rm -rf -- "$source"
        mkdir -- "$source"
        follow "Linux $linux: unpacking" \
            tar --extract --strip-components=1 --directory "$source" \
            --exclude='*/drivers/gpu/*.[ch]' --file "/usr/src/linux-source-$linux.tar.xz"
        for patch in "$here"/kernel/*.patch; do
            patch --directory "$source" --strip=1 --quiet <"$patch"
        done
    fi
    rm -f -- "$source/.complete"
}

close_source() {
    source_inputs >"$source/.complete"
}

# configure_kernel FLAVOUR [OPTION]
configure_kernel() {
    grep --invert-match '^CONFIG_KERNEL_' "$here/kernel/$1.config" >"$source/.config"
    printf '%s\n' "${2:-CONFIG_KERNEL_ZSTD=y}" >>"$source/.config"
    make_kernel --silent olddefconfig >&2
}

make_kernel() {
    # With a fixed name, version and date, the same source gives the same kernel.
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
    declare -f build_rootfs make_ext4 make_initrd cpio_entry cpio_end cpio_pad
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

    install -m 755 -- "$root/sbin/init" "$work/result/bantam-agent"
    make_ext4 "$root" "$work/result/rootfs.ext4"
    make_initrd "$root/sbin/init" >"$work/result/initrd.cpio"
}

sysprep() {
    local inputs
    command -v cargo >/dev/null || die "missing cargo, see https://rustup.rs"
    inputs=$(sysprep_inputs)
    artefact sysprep "$inputs" build_sysprep
}

sysprep_inputs() {
    (cd -- "$sysprep" && sha256sum -- Cargo.toml helper/Cargo.toml helper/Cargo.lock $(find src helper/src -name '*.rs' | sort))
    declare -f build_sysprep make_initrd cpio_entry cpio_end cpio_pad
}

build_sysprep() {
    follow "sysprep: compiling the helper" \
        env CARGO_TARGET_DIR="$work/target" \
        RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
        cargo build --manifest-path "$sysprep/helper/Cargo.toml" --locked --release \
        --target x86_64-unknown-linux-gnu
    make_initrd "$work/target/x86_64-unknown-linux-gnu/release/bantam-sysprep-helper" \
        >"$work/result/sysprep.cpio"
}

# Without a journal, checksums and lazy initialization: a guest that runs for a second does not need
# them, and each makes mounting slower.
make_ext4() {
    local root=$1 image=$2 id=ba27a000-0000-4000-8000-000000000001 path field
    E2FSPROGS_FAKE_TIME=1 mke2fs -q -t ext4 -b 4096 -N 256 -m 0 -L bantam -U "$id" \
        -E hash_seed="$id",root_owner=0:0 -O none,extent,filetype,large_file,sparse_super \
        -d "$root" "$image" 16m >"$work/log"
    # The files still have the owner and the times of the build.
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

make_initrd() {
    cpio_entry dev 040755 0 0 /dev/null
    cpio_entry dev/console 020600 5 1 /dev/null
    cpio_entry init 0100755 0 0 "$1"
    cpio_end
}

# The distribution's kernel needs hardware virtualization, by the same rule by which Bantam looks for it.
has_hardware_virtualization() {
    [[ ! -e /sys/module/kvm_pvm ]] && grep --quiet --word-regexp --extended-regexp 'vmx|svm' /proc/cpuinfo
}

usage() {
    sed --quiet 's/^#   //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

case ${*:-} in
    "kernel small" | "kernel full")
        kernel "$2"
        printf '%s\n' "$folder/vmlinux"
        ;;
    "kernel distribution")
        distribution_kernel
        printf '%s\n' "$folder"/{vmlinux,config}-*
        ;;
    bzimages)
        bzimages
        printf '%s\n' "${compressions[@]/#/$folder/bzImage.}"
        ;;
    rootfs)
        rootfs
        printf '%s\n' "$folder"/{rootfs.ext4,initrd.cpio,bantam-agent}
        ;;
    sysprep)
        sysprep
        printf '%s\n' "$folder/sysprep.cpio"
        ;;
    run)
        if has_hardware_virtualization; then
            "$here/debian-kernel.sh"
        else
            kernel small
            printf '%s\n' "$folder/vmlinux"
        fi
        rootfs
        printf '%s\n' "$folder/rootfs.ext4"
        ;;
    all)
        kernel small
        printf '%s\n' "$folder/vmlinux"
        bzimages
        printf '%s\n' "${compressions[@]/#/$folder/bzImage.}"
        kernel full
        printf '%s\n' "$folder/vmlinux"
        distribution_kernel
        printf '%s\n' "$folder"/{vmlinux,config}-*
        rootfs
        printf '%s\n' "$folder"/{rootfs.ext4,initrd.cpio,bantam-agent}
        sysprep
        printf '%s\n' "$folder/sysprep.cpio"
        ;;
    "packages kernel")
        printf '%s\n' "${kernel_packages[@]}"
        ;;
    "packages kernel")
        printf '%s\n' "${kernel_packages[@]}"
        ;;
    "packages run" | "packages all")
        packages=("${rootfs_packages[@]}")
        [[ $2 == run ]] && has_hardware_virtualization || packages+=("${kernel_packages[@]}")
        [[ $2 == run ]] || packages+=("${bzimage_packages[@]}")
        printf '%s\n' "${packages[@]}" | sort --unique
        ;;
    *)
        usage
        ;;
esac
