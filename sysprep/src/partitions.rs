//! Partition tables: GPT (UEFI specification 2.10, section 5.3) and MBR, and the identifiers that Linux knows partitions by.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::identifiers::{IdentifierKind, Pool, Replacement, swap_guid, uuid_text};

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// The part of a header that is read; all fields are in it.
const HEADER: usize = 512;
/// The largest array of entries that is read.
const MAX_ENTRIES: u64 = 1 << 20;
/// The place of the signature of an MBR.
const MBR_ID: u64 = 440;

/// A partition table.
#[derive(Debug)]
pub(crate) enum Table {
    /// A GPT.
    Gpt(Box<Gpt>),
    /// An MBR, with its signature.
    Mbr([u8; 4]),
}

/// A GPT.
#[derive(Debug)]
pub(crate) struct Gpt {
    primary: GptCopy,
    /// The copy at the end of the disk, if it is intact.
    backup: Option<GptCopy>,
}

#[derive(Debug)]
struct GptCopy {
    block_size: u64,
    place: u64,
    header: [u8; HEADER],
    entries: Vec<u8>,
}

fn u32_of(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_le_bytes)
}

fn u64_of(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn guid_of(bytes: &[u8]) -> [u8; 16] {
    bytes.try_into().unwrap_or_default()
}

impl GptCopy {
    /// Reads the table whose header is at block `place`. `None` if there is no intact one.
    fn read(device: &File, block_size: u64, place: u64) -> io::Result<Option<GptCopy>> {
        let mut header = [0; HEADER];
        let Some(offset) = place.checked_mul(block_size) else {
            return Ok(None);
        };
        if !read_all(device, &mut header, offset)? || header[..8] != *SIGNATURE {
            return Ok(None);
        }
        let length = u32_of(&header[12..16]) as usize;
        let size = u64::from(u32_of(&header[84..88]));
        let total = u64::from(u32_of(&header[80..84])).checked_mul(size);
        let total = total.filter(|total| (128..=MAX_ENTRIES).contains(total) && size >= 128);
        let begin = u64_of(&header[72..80]).checked_mul(block_size);
        let (true, Some(total), Some(begin)) = ((92..=HEADER).contains(&length), total, begin)
        else {
            return Ok(None);
        };
        let mut entries = vec![0; total as usize];
        if !read_all(device, &mut entries, begin)? {
            return Ok(None);
        }
        let copy = GptCopy {
            block_size,
            place,
            header,
            entries,
        };
        let is_intact = copy.checksum() == u32_of(&header[16..20])
            && crc32fast::hash(&copy.entries) == u32_of(&header[88..92])
            && u64_of(&header[24..32]) == place;
        Ok(is_intact.then_some(copy))
    }

    fn checksum(&self) -> u32 {
        let length = u32_of(&self.header[12..16]) as usize;
        let mut header = self.header;
        header[16..20].fill(0);
        crc32fast::hash(&header[..length])
    }

    fn entry_size(&self) -> usize {
        u32_of(&self.header[84..88]) as usize
    }

    fn guid(&self) -> [u8; 16] {
        swap_guid(guid_of(&self.header[56..72]))
    }

    /// Returns the entries that are in use, with the numbers of their partitions.
    fn used(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let entries = self.entries.chunks_exact(self.entry_size());
        (1..)
            .zip(entries)
            .filter(|(_, entry)| entry[..16] != [0; 16])
    }

    fn write(&mut self, device: &File, guids: &NewGuids) -> io::Result<()> {
        let size = self.entry_size();
        for (number, entry) in (1..).zip(self.entries.chunks_exact_mut(size)) {
            if let Some(guid) = guids.partitions.get(&number) {
                entry[16..32].copy_from_slice(&swap_guid(*guid));
            }
        }
        self.header[56..72].copy_from_slice(&swap_guid(guids.disk));
        let checksum = crc32fast::hash(&self.entries);
        self.header[88..92].copy_from_slice(&checksum.to_le_bytes());
        let checksum = self.checksum();
        self.header[16..20].copy_from_slice(&checksum.to_le_bytes());
        let begin = u64_of(&self.header[72..80]) * self.block_size;
        device.write_all_at(&self.entries, begin)?;
        device.write_all_at(&self.header, self.place * self.block_size)?;
        device.sync_all()
    }
}

/// Reads all of `bytes`. Returns `false` if the device ends before.
fn read_all(device: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match device.read_exact_at(bytes, offset) {
        // Linux has no offsets that large.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| true),
    }
}

/// What is known of a partition by its table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PartitionInfo {
    /// The identifier, as blkid prints it.
    pub(crate) id: Option<String>,
    /// The name, which only a GPT has.
    pub(crate) label: Option<String>,
}

/// New identifiers of a table and its partitions.
#[derive(Debug)]
pub(crate) enum NewTable {
    /// Those of a GPT.
    Gpt(NewGuids),
    /// That of an MBR.
    Mbr([u8; 4]),
}

#[derive(Debug)]
pub(crate) struct NewGuids {
    disk: [u8; 16],
    partitions: BTreeMap<u32, [u8; 16]>,
}

impl Table {
    /// Reads the table of a disk; `None` if there is none that is intact.
    pub(crate) fn read(device: &File) -> io::Result<Option<Table>> {
        for block_size in [512, 4096] {
            if let Some(primary) = GptCopy::read(device, block_size, 1)? {
                let place = u64_of(&primary.header[32..40]);
                let backup = match place {
                    0 | 1 => None,
                    place => GptCopy::read(device, block_size, place)?,
                };
                return Ok(Some(Table::Gpt(Box::new(Gpt { primary, backup }))));
            }
        }
        let mut sector = [0; 512];
        let is_mbr = read_all(device, &mut sector, 0)? && sector[510..] == [0x55, 0xaa];
        // The MBR of a GPT has no identifiers that anything knows.
        let is_protective = (0..4).any(|entry| sector[446 + 16 * entry + 4] == 0xee);
        let id = [sector[440], sector[441], sector[442], sector[443]];
        Ok((is_mbr && !is_protective && id != [0; 4]).then_some(Table::Mbr(id)))
    }

    /// Returns whether it should have a copy, and has none that is intact.
    pub(crate) fn lacks_backup(&self) -> bool {
        matches!(self, Table::Gpt(gpt) if gpt.backup.is_none())
    }

    /// Returns what is known of the partition with this number.
    pub(crate) fn partition(&self, number: u32) -> PartitionInfo {
        match self {
            Table::Gpt(gpt) => {
                let mut used = gpt.primary.used();
                let Some((_, entry)) = used.find(|(it, _)| *it == number) else {
                    return PartitionInfo::default();
                };
                let units = entry[56..128].chunks_exact(2);
                let units = units.map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
                let label =
                    String::from_utf16_lossy(&units.take_while(|&it| it != 0).collect::<Vec<_>>());
                PartitionInfo {
                    id: Some(uuid_text(&swap_guid(guid_of(&entry[16..32])))),
                    label: (!label.is_empty()).then_some(label),
                }
            }
            Table::Mbr(id) => PartitionInfo {
                id: Some(mbr_partition(*id, number)),
                label: None,
            },
        }
    }

    /// Makes identifiers for the table and for the partitions with these numbers, and says what replaces what. `None` if
    /// the pool is empty.
    pub(crate) fn new_identifiers(
        &self,
        numbers: &[u32],
        pool: &mut Pool,
    ) -> Option<(NewTable, Vec<Replacement>)> {
        let mut replacements = Vec::new();
        let mut replace = |kind, old: String, new: String| {
            replacements.push(Replacement { kind, old, new });
        };
        let new = match self {
            Table::Gpt(gpt) => {
                let disk = pool.uuid()?;
                let old = gpt.primary.guid();
                replace(
                    IdentifierKind::PartitionTable,
                    uuid_text(&old),
                    uuid_text(&disk),
                );
                let mut partitions = BTreeMap::new();
                for (number, entry) in gpt.primary.used() {
                    let guid = pool.uuid()?;
                    let old = swap_guid(guid_of(&entry[16..32]));
                    replace(IdentifierKind::Partition, uuid_text(&old), uuid_text(&guid));
                    partitions.insert(number, guid);
                }
                NewTable::Gpt(NewGuids { disk, partitions })
            }
            Table::Mbr(old) => {
                let id: [u8; 4] = pool.take()?;
                replace(IdentifierKind::PartitionTable, mbr_text(*old), mbr_text(id));
                for &number in numbers {
                    let old = mbr_partition(*old, number);
                    replace(IdentifierKind::Partition, old, mbr_partition(id, number));
                }
                NewTable::Mbr(id)
            }
        };
        Some((new, replacements))
    }

    /// Writes the identifiers to the disk. The copy of a GPT is written first, so that one of both is always intact.
    pub(crate) fn change(self, device: &File, new: &NewTable) -> io::Result<()> {
        match (self, new) {
            (Table::Gpt(mut gpt), NewTable::Gpt(guids)) => {
                if let Some(backup) = &mut gpt.backup {
                    backup.write(device, guids)?;
                }
                gpt.primary.write(device, guids)
            }
            (Table::Mbr(_), NewTable::Mbr(id)) => {
                device.write_all_at(id, MBR_ID)?;
                device.sync_all()
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

fn mbr_text(id: [u8; 4]) -> String {
    format!("{:08x}", u32::from_le_bytes(id))
}

fn mbr_partition(id: [u8; 4], number: u32) -> String {
    format!("{}-{number:02x}", mbr_text(id))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    const LAYOUT: &str = "size=1MiB, name=\"EFI\", type=U\nsize=2MiB, name=\"root\"\n";

    fn run(program: &str, arguments: &[&str], path: &Path, input: &str) -> String {
        let mut child = Command::new(program)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args(arguments)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{program}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn disk(layout: &str) -> (tempfile::NamedTempFile, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        run("sfdisk", &["--quiet"], file.path(), layout);
        let device = file.reopen().unwrap();
        (file, device)
    }

    fn change(device: &File) -> Vec<Replacement> {
        let table = Table::read(device).unwrap().unwrap();
        assert!(!table.lacks_backup());
        let mut pool = Pool::new((0..=255).collect());
        let (new, replacements) = table.new_identifiers(&[1, 2], &mut pool).unwrap();
        table.change(device, &new).unwrap();
        assert!(replacements.iter().all(Replacement::is_well_formed));
        replacements
    }

    #[test]
    fn a_gpt_and_its_copy_get_other_guids() {
        let (file, device) = disk(&format!("label: gpt\n{LAYOUT}"));
        let before = run("sfdisk", &["--dump"], file.path(), "");
        let replacements = change(&device);
        assert_eq!(replacements.len(), 3);
        let verified = run("sfdisk", &["--verify"], file.path(), "");
        assert!(verified.contains("No errors detected"), "{verified}");
        let mut expected = before.to_lowercase();
        for it in &replacements {
            assert!(expected.contains(&it.old), "{expected}");
            expected = expected.replace(&it.old, &it.new);
        }
        let dump = |path| run("sfdisk", &["--dump"], path, "").to_lowercase();
        assert_eq!(dump(file.path()), expected);
        // Without the first table, the copy says the same.
        device.write_all_at(&[0; 512], 512).unwrap();
        assert_eq!(dump(file.path()), expected);
    }

    #[test]
    fn partitions_of_a_gpt_are_known_by_guid_and_name() {
        let (file, device) = disk(&format!("label: gpt\n{LAYOUT}"));
        let table = Table::read(&device).unwrap().unwrap();
        let info = table.partition(2);
        assert_eq!(info.label.as_deref(), Some("root"));
        let dump = run("sfdisk", &["--dump"], file.path(), "").to_lowercase();
        assert!(dump.contains(&format!("uuid={}", info.id.unwrap())));
        assert_eq!(table.partition(3), PartitionInfo::default());
    }

    #[test]
    fn an_mbr_gets_another_signature() {
        let (file, device) = disk("label: dos\nsize=1MiB\nsize=2MiB\n");
        let replacements = change(&device);
        let dump = run("sfdisk", &["--dump"], file.path(), "");
        assert!(
            dump.contains(&format!("label-id: 0x{}", replacements[0].new)),
            "{dump}"
        );
        assert_eq!(replacements.len(), 3);
        assert_eq!(replacements[2].new, format!("{}-02", replacements[0].new));
    }

    #[test]
    fn what_is_damaged_is_no_table() {
        let (_file, device) = disk(&format!("label: gpt\n{LAYOUT}"));
        device.write_all_at(&[1], 2 * 512 + 20).unwrap();
        assert!(Table::read(&device).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..400), fields: [u32; 4]) {
            let device = tempfile::tempfile().unwrap();
            device.set_len(64 << 10).unwrap();
            device.write_all_at(&bytes, 512).unwrap();
            device.write_all_at(SIGNATURE, 512).unwrap();
            for (place, field) in (0..).zip(fields) {
                device.write_all_at(&field.to_le_bytes(), 512 + 72 + 4 * place).unwrap();
            }
            Table::read(&device).unwrap();
        }
    }
}
