# SPDX-License-Identifier: Apache-2.0
#
# Writes archives in the "newc" format of cpio. They contain device files, which only root can make on
# disk, so this script writes the format itself.

# cpio_entry NAME MODE MAJOR MINOR CONTENT: one entry of an archive.
cpio_entry() {
    local name=$1 size
    size=$(wc -c <"$5")
    # Magic, inode, mode, owner, group, links, time, size, device, special device, name length, sum.
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X' \
        0 "$2" 0 0 1 0 "$size" 0 0 "$3" "$4" $((${#name} + 1)) 0
    printf '%s\0' "$name"
    cpio_pad $((110 + ${#name} + 1))
    cat -- "$5"
    cpio_pad "$size"
}

# The last entry of every archive.
cpio_end() {
    cpio_entry 'TRAILER!!!' 0 0 0 /dev/null
}

# Pads SIZE bytes to the next multiple of four.
cpio_pad() {
    head -c $((-$1 & 3)) /dev/zero
}
