//! Identifiers of file systems and partitions: how new ones are made, and how text that names old ones follows.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// What an identifier identifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdentifierKind {
    /// A file system or a swap area.
    FileSystem,
    /// A partition.
    Partition,
    /// A partition table.
    PartitionTable,
}

/// An identifier that was replaced. Both have the same length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replacement {
    /// What it identifies.
    pub kind: IdentifierKind,
    /// The identifier until then, as blkid prints it.
    pub old: String,
    /// The identifier from then on.
    pub new: String,
}

impl Replacement {
    /// Returns whether both texts are hexadecimal numbers in one of the forms that identifiers have: `8-4-4-4-12` digits (a UUID),
    /// `4-4` (a serial number of FAT), `8-2` (a partition of an MBR) or `8` (an MBR).
    pub fn is_well_formed(&self) -> bool {
        let groups = |text: &str| -> Option<Vec<usize>> {
            let is_hex = |group: &str| group.bytes().all(|byte| byte.is_ascii_hexdigit());
            let groups = text.split('-').map(|it| is_hex(it).then_some(it.len()));
            groups.collect()
        };
        let form = groups(&self.old);
        let known = [&[8, 4, 4, 4, 12][..], &[4, 4], &[8, 2], &[8]];
        form.is_some()
            && form == groups(&self.new)
            && known.contains(&form.unwrap_or_default().as_slice())
    }
}

/// Replaces identifiers in text, wherever they stand as words of their own. The text keeps its length. Returns `None` if there
/// are none in it.
pub fn replace_identifiers(text: &[u8], replacements: &[Replacement]) -> Option<Vec<u8>> {
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    let known: BTreeMap<_, _> = replacements
        .iter()
        .map(|it| (it.old.to_ascii_lowercase().into_bytes(), it.new.as_bytes()))
        .collect();
    let mut replaced = text.to_vec();
    let mut is_changed = false;
    for word in replaced.chunk_by_mut(|a, b| is_part(a) == is_part(b)) {
        if let Some(new) = known.get(&word.to_ascii_lowercase())
            && new.len() == word.len()
        {
            word.copy_from_slice(new);
            is_changed = true;
        }
    }
    is_changed.then_some(replaced)
}

/// Random bytes that new identifiers are made of.
#[derive(Debug)]
pub(crate) struct Pool(Vec<u8>);

impl Pool {
    pub(crate) fn new(random: Vec<u8>) -> Pool {
        Pool(random)
    }

    /// Returns bytes that were not returned before; `None` if there are no more.
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let rest = self.0.len().checked_sub(N)?;
        self.0.split_off(rest).try_into().ok()
    }

    /// Returns a new random UUID (RFC 9562, version 4).
    pub(crate) fn uuid(&mut self) -> Option<[u8; 16]> {
        let mut uuid = self.take::<16>()?;
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Some(uuid)
    }
}

/// Writes a UUID whose bytes are in the order of its digits.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (place, byte) in uuid.iter().enumerate() {
        if matches!(place, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Converts a GUID between the order of its digits and that of partition tables, whose first three numbers are little-endian.
pub(crate) fn swap_guid(guid: [u8; 16]) -> [u8; 16] {
    let mut swapped = guid;
    swapped[0..4].reverse();
    swapped[4..6].reverse();
    swapped[6..8].reverse();
    swapped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OLD: &str = "0b2f3d6e-11a2-4c3b-8a77-0123456789ab";
    const NEW: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";

    fn replacement(old: &str, new: &str) -> Replacement {
        Replacement {
            kind: IdentifierKind::FileSystem,
            old: old.to_owned(),
            new: new.to_owned(),
        }
    }

    fn replaced(text: &str) -> Option<String> {
        let replacements = [replacement(OLD, NEW), replacement("ABCD-1234", "0123-4567")];
        let bytes = replace_identifiers(text.as_bytes(), &replacements)?;
        Some(String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn identifiers_are_replaced_where_they_are_words() {
        let text = format!("UUID={OLD} / ext4\n# {OLD}\n\"UUID=abcd-1234\"");
        let expected = format!("UUID={NEW} / ext4\n# {NEW}\n\"UUID=0123-4567\"");
        assert_eq!(replaced(&text), Some(expected));
        let upper = OLD.to_uppercase();
        assert_eq!(
            replaced(&format!("/dev/disk/by-uuid/{upper}")),
            Some(format!("/dev/disk/by-uuid/{NEW}"))
        );
        assert_eq!(replaced(&format!("x{OLD} {OLD}-1 ABCD-12345")), None);
    }

    #[test]
    fn only_identifiers_are_well_formed() {
        assert!(replacement(OLD, NEW).is_well_formed());
        assert!(replacement("ABCD-1234", "0123-4567").is_well_formed());
        assert!(replacement("1234abcd-02", "00000000-02").is_well_formed());
        assert!(replacement("1234abcd", "00000000").is_well_formed());
        for (old, new) in [
            ("", ""),
            ("ro", "rw"),
            (OLD, "ABCD-1234"),
            ("beef", "dead"),
            ("ABCD-1234", "0123-45 7"),
        ] {
            assert!(!replacement(old, new).is_well_formed(), "{old} {new}");
        }
    }

    #[test]
    fn uuids_are_random_ones_and_not_repeated() {
        let mut pool = Pool::new((0..40).collect());
        let uuid = pool.uuid().unwrap();
        assert_eq!(uuid_text(&uuid), "18191a1b-1c1d-4e1f-a021-222324252627");
        assert_ne!(pool.uuid().unwrap(), uuid);
        assert_eq!(pool.take::<16>(), None);
        assert_eq!(pool.take::<8>(), Some([0, 1, 2, 3, 4, 5, 6, 7]));
    }

    #[test]
    fn guids_are_swapped_as_partition_tables_have_them() {
        let digits: [u8; 16] = std::array::from_fn(|place| place as u8);
        let swapped = swap_guid(digits);
        assert_eq!(swapped[..8], [3, 2, 1, 0, 5, 4, 7, 6]);
        assert_eq!(swap_guid(swapped), digits);
    }

    proptest! {
        #[test]
        fn any_text_keeps_its_length(text: Vec<u8>) {
            if let Some(replaced) = replace_identifiers(&text, &[replacement(OLD, NEW)]) {
                prop_assert_eq!(replaced.len(), text.len());
            }
        }
    }
}
