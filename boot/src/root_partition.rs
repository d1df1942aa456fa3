//! Finds the partition of a disk that holds the root file system.
//!
//! A guest may have written the partition table. All that it decides is which of its own partitions the guest's kernel
//! mounts; and whatever it says, few bytes are read.

use std::io;

/// Bytes of a master boot record.
const MBR_SIZE: usize = 512;
const MBR_SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// Offset of the four entries of a master boot record, of 16 bytes each.
const MBR_ENTRIES: usize = 446;
const MBR_ENTRY_SIZE: usize = 16;
/// Type of a partition with a file system of Linux.
const MBR_LINUX: u8 = 0x83;
/// Type of the entry by which a master boot record says that there is a GUID partition table.
const MBR_PROTECTIVE: u8 = 0xee;

/// The beginning of the header of a GUID partition table (UEFI 2.10, 5.3.2).
const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";
const GPT_HEADER_SIZE: usize = 92;
/// Linux takes entries of this size only.
const GPT_ENTRY_SIZE: usize = 128;
/// How many entries are looked at: what partitioning tools make room for.
const GPT_MAX_ENTRIES: u32 = 128;
/// Type of a root file system for x86-64, 4f68bce3-e8cd-4db1-96e7-fbcaf984b709 (Discoverable Partitions Specification).
const GPT_ROOT: [u8; 16] = [
    0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
];
/// Type of any other file system of Linux, 0fc63daf-8483-4772-8e79-3d69d8477de4.
const GPT_LINUX: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

/// Returns the number, from 1, of the partition that holds the root file system: the one whose type says so, or else the
/// largest one with a file system of Linux. `None` if the disk has no partition table, or no such partition.
///
/// `read` fills bytes with those from an offset of the disk on. Blocks of the disk have `block_size` bytes.
///
/// # Errors
/// Those of `read`.
pub fn find_root_partition(
    block_size: u32,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<u32>> {
    let mut record = [0; MBR_SIZE];
    read(&mut record, 0)?;
    let (entries, signature) = record[MBR_ENTRIES..].split_at(4 * MBR_ENTRY_SIZE);
    let entries: Vec<&[u8]> = entries.chunks_exact(MBR_ENTRY_SIZE).collect();
    // A file system without partitions can have the same signature. Linux tells it by the first byte of an entry, too.
    if signature != MBR_SIGNATURE || entries.iter().any(|entry| entry[0] & 0x7f != 0) {
        return Ok(None);
    }
    if entries.iter().any(|entry| entry[4] == MBR_PROTECTIVE) {
        return find_in_gpt(u64::from(block_size), read);
    }
    let entries = (1..).zip(entries);
    let linux = entries.filter(|(_, entry)| entry[4] == MBR_LINUX);
    Ok(largest(linux.map(|(number, entry)| {
        (number, u64::from(u32_at(entry, 12)))
    })))
}

fn find_in_gpt(
    block_size: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<u32>> {
    let mut header = [0; GPT_HEADER_SIZE];
    read(&mut header, block_size)?;
    let count = u32_at(&header, 80).min(GPT_MAX_ENTRIES);
    let begin = u64_at(&header, 72).checked_mul(block_size);
    let is_valid = header.starts_with(GPT_SIGNATURE)
        && usize::try_from(u32_at(&header, 84)) == Ok(GPT_ENTRY_SIZE);
    let Some(begin) = begin.filter(|_| is_valid) else {
        return Ok(None);
    };
    let mut table = vec![0; GPT_ENTRY_SIZE * count as usize];
    read(&mut table, begin)?;
    let entries = || (1..).zip(table.chunks_exact(GPT_ENTRY_SIZE));
    if let Some((number, _)) = entries().find(|(_, entry)| entry.starts_with(&GPT_ROOT)) {
        return Ok(Some(number));
    }
    let linux = entries().filter(|(_, entry)| entry.starts_with(&GPT_LINUX));
    Ok(largest(linux.map(|(number, entry)| {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        (number, last.saturating_sub(first))
    })))
}

/// Returns the number of the largest partition, of those of the same size the first.
fn largest(partitions: impl Iterator<Item = (u32, u64)>) -> Option<u32> {
    let partitions = partitions.map(|(number, size)| (size, std::cmp::Reverse(number)));
    partitions.max().map(|(_, number)| number.0)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let bytes = bytes[offset..offset + 4].try_into();
    u32::from_le_bytes(bytes.expect("it has this length"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes[offset..offset + 8].try_into();
    u64::from_le_bytes(bytes.expect("it has this length"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    fn find(disk: &[u8], block_size: u32) -> io::Result<Option<u32>> {
        find_root_partition(block_size, |bytes, offset| {
            let begin = usize::try_from(offset).ok();
            let end = begin.and_then(|begin| begin.checked_add(bytes.len()));
            let there = begin.zip(end).and_then(|(begin, end)| disk.get(begin..end));
            bytes.copy_from_slice(there.ok_or(io::ErrorKind::InvalidInput)?);
            Ok(())
        })
    }

    /// Has sfdisk write the partition table that `script` describes, and returns a disk of 64 MiB.
    fn partitioned(script: &str) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let mut sfdisk = Command::new("/sbin/sfdisk")
            .args(["--quiet", "--no-reread", "--no-tell-kernel"])
            .arg(file.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("there is fdisk");
        let mut stdin = sfdisk.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        drop(stdin);
        assert!(sfdisk.wait().unwrap().success());
        std::fs::read(file.path()).unwrap()
    }

    const ROOT: &str = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709";
    const LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";
    const BIOS: &str = "21686148-6449-6E6F-744E-656564454649";
    const EFI: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";

    #[test]
    fn the_partition_of_the_type_for_roots_is_taken() {
        // As in Debian's images: the root is the first partition and the last on the disk.
        let disk = partitioned(&format!(
            "label: gpt\n14: size=1MiB, type={BIOS}\n15: size=8MiB, type={EFI}\n\
             2: size=30MiB, type={LINUX}\n1: type={ROOT}\n"
        ));
        assert_eq!(find(&disk, 512).unwrap(), Some(1));
    }

    #[test]
    fn else_the_largest_of_linux_is() {
        // As in Fedora's images, whose /boot has the same type as the root.
        let disk = partitioned(&format!(
            "label: gpt\nsize=1MiB, type={BIOS}\nsize=40MiB, type={EFI}\nsize=5MiB, type={LINUX}\n\
             size=10MiB, type={LINUX}\n"
        ));
        assert_eq!(find(&disk, 512).unwrap(), Some(4));
        let disk = partitioned("label: dos\nsize=40MiB, type=c\nsize=5MiB, type=83\ntype=83\n");
        assert_eq!(find(&disk, 512).unwrap(), Some(3));
    }

    #[test]
    fn a_table_of_large_blocks_is_found() {
        let small = partitioned(&format!("label: gpt\ntype={EFI}, size=9MiB\ntype={ROOT}\n"));
        let mut disk = vec![0; 64 << 10];
        disk[..512].copy_from_slice(&small[..512]);
        for block in 1..8 {
            disk[block * 4096..][..512].copy_from_slice(&small[block * 512..][..512]);
        }
        assert_eq!(find(&disk, 4096).unwrap(), Some(2));
        assert_eq!(find(&disk, 512).unwrap(), None);
    }

    #[test]
    fn a_disk_without_a_table_or_a_partition_of_linux_has_none() {
        assert_eq!(find(&[0; 4096], 512).unwrap(), None);
        let disk = partitioned(&format!("label: gpt\ntype={EFI}\n"));
        assert_eq!(find(&disk, 512).unwrap(), None);
        let disk = partitioned("label: dos\ntype=c\n");
        assert_eq!(find(&disk, 512).unwrap(), None);
        // A file system with a boot sector.
        let mut disk = [0x20; 4096];
        disk[510..512].copy_from_slice(&MBR_SIGNATURE);
        assert_eq!(find(&disk, 512).unwrap(), None);
        // A table that begins behind the end of any disk.
        let mut disk = partitioned(&format!("label: gpt\ntype={ROOT}\n"));
        disk[512 + 72..][..8].fill(0xff);
        assert_eq!(find(&disk, 512).unwrap(), None);
        disk[512 + 78..][..2].fill(0);
        find(&disk, 512).unwrap_err();
    }

    proptest! {
        #[test]
        fn any_table_is_read_or_refused(
            mut disk in proptest::collection::vec(any::<u8>(), 32 << 10),
            place in 0_u64..100,
            type_of_entry in prop_oneof![Just(MBR_LINUX), Just(MBR_PROTECTIVE), any::<u8>()],
            block_size in prop_oneof![Just(512_u32), Just(4096)],
        ) {
            for entry in disk[MBR_ENTRIES..510].chunks_exact_mut(MBR_ENTRY_SIZE) {
                entry[0] &= 0x80;
            }
            disk[MBR_ENTRIES + 4] = type_of_entry;
            disk[510..512].copy_from_slice(&MBR_SIGNATURE);
            let header = &mut disk[block_size as usize..];
            header[..8].copy_from_slice(GPT_SIGNATURE);
            header[72..80].copy_from_slice(&place.to_le_bytes());
            header[84..88].copy_from_slice(&128_u32.to_le_bytes());
            if let Ok(Some(number)) = find(&disk, block_size) {
                prop_assert!((1..=GPT_MAX_ENTRIES).contains(&number));
            }
        }
    }
}
