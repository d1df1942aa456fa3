//! The exchange disk: how the host and the helper machine tell each other what is to be done, and what was done.
//!
//! | bytes | content |
//! | --- | --- |
//! | 0 to 64 KiB | the task: 8 bytes of magic, the length of a JSON text in 8 bytes, the text |
//! | 64 to 128 KiB | random bytes, of which the helper machine makes new identifiers |
//! | 128 KiB to 1 MiB | the outcome, in the form of the task; zeroes until there is one |
//!
//! Its size bounds what the host reads. Numbers are little-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::task::{Outcome, Report, Task, tame};

/// The size of the disk in bytes.
pub const SIZE: u64 = 1 << 20;
/// The serial number of the disk in the helper machine.
pub const SERIAL: &str = "bantam-exchange";
/// The number of random bytes on it.
pub const RANDOM_SIZE: usize = 64 << 10;

const TASK: Section = Section {
    magic: *b"BANTAMt1",
    begin: 0,
    end: 64 << 10,
};
const RANDOM: u64 = TASK.end;
const OUTCOME: Section = Section {
    magic: *b"BANTAMr1",
    begin: RANDOM + RANDOM_SIZE as u64,
    end: SIZE,
};

/// The length of what comes before the text of a section.
const HEADER: u64 = 16;

struct Section {
    magic: [u8; 8],
    begin: u64,
    end: u64,
}

impl Section {
    fn write(&self, disk: &File, value: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(value)?;
        let length = text.len() as u64;
        if length > self.end - self.begin - HEADER {
            return Err(io::Error::other("it is too long for the exchange disk"));
        }
        disk.write_all_at(&text, self.begin + HEADER)?;
        // The header is what says that the text is complete.
        disk.sync_all()?;
        let mut header = self.magic.to_vec();
        header.extend(length.to_le_bytes());
        disk.write_all_at(&header, self.begin)?;
        disk.sync_all()
    }

    fn read<T: DeserializeOwned>(&self, disk: &File) -> io::Result<Option<T>> {
        let mut header = [0; HEADER as usize];
        disk.read_exact_at(&mut header, self.begin)?;
        let (magic, length) = header.split_at(8);
        let length = length.try_into().map_or(0, u64::from_le_bytes);
        if magic != self.magic || length > self.end - self.begin - HEADER {
            return Ok(None);
        }
        let mut text = vec![0; length as usize];
        disk.read_exact_at(&mut text, self.begin + HEADER)?;
        Ok(Some(serde_json::from_slice(&text)?))
    }
}

/// Writes a task, with `random` bytes for new identifiers, to a disk that is empty.
///
/// # Errors
/// If the task is too long, or the file cannot be written to.
pub fn write_task(disk: &File, task: &Task, random: &[u8; RANDOM_SIZE]) -> io::Result<()> {
    disk.set_len(SIZE)?;
    disk.write_all_at(random, RANDOM)?;
    TASK.write(disk, task)
}

/// Reads the task and the random bytes, in the helper machine.
pub(crate) fn read_task(disk: &File) -> io::Result<(Task, Vec<u8>)> {
    let task = TASK.read(disk)?;
    let task = task.ok_or_else(|| io::Error::other("there is no task of this version"))?;
    let mut random = vec![0; RANDOM_SIZE];
    disk.read_exact_at(&mut random, RANDOM)?;
    Ok((task, random))
}

/// Writes the outcome, in the helper machine.
pub(crate) fn write_outcome(disk: &File, outcome: &Outcome) -> io::Result<()> {
    let outcome = outcome.clone().map(Report::tame);
    OUTCOME.write(disk, &outcome)
}

/// Reads the outcome, on the host. Whatever the disk holds, it is bounded, and without control characters.
///
/// # Errors
/// If there is none, or it is not an outcome, or the disk cannot be read.
pub fn read_outcome(disk: &File) -> io::Result<Outcome> {
    let outcome: Option<Outcome> = OUTCOME.read(disk)?;
    let outcome = outcome.ok_or_else(|| io::Error::other("there is no report"))?;
    Ok(outcome.map(Report::tame).map_err(|reason| tame(&reason)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::task::TaskDisk;
    use crate::{IdentifierKind, Operation, OperationSet, Replacement};

    fn disk() -> File {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(SIZE).unwrap();
        disk
    }

    #[test]
    fn a_task_and_its_outcome_are_read_as_they_were_written() {
        let disk = disk();
        let task = Task {
            operations: OperationSet::default(),
            host_name: Some("web2".to_owned()),
            disks: vec![TaskDisk {
                name: "disk0".to_owned(),
                place: 0,
            }],
        };
        write_task(&disk, &task, &[7; RANDOM_SIZE]).unwrap();
        assert_eq!(read_task(&disk).unwrap(), (task, vec![7; RANDOM_SIZE]));
        assert!(read_outcome(&disk).is_err());
        let mut report = Report::default();
        report.changed(Operation::Hostname, "/etc/hostname", "web2");
        write_outcome(&disk, &Ok(report.clone())).unwrap();
        assert_eq!(read_outcome(&disk).unwrap(), Ok(report));
        write_outcome(&disk, &Err("no".to_owned())).unwrap();
        assert_eq!(read_outcome(&disk).unwrap(), Err("no".to_owned()));
    }

    #[test]
    fn a_hostile_outcome_is_harmless() {
        let disk = disk();
        let mut report = Report::default();
        for _ in 0..2000 {
            report.changed(Operation::Hostname, "\x1b[2J", "x".repeat(300));
        }
        report.identifiers.push(Replacement {
            kind: IdentifierKind::FileSystem,
            old: "ro".to_owned(),
            new: "init=/bin/sh".to_owned(),
        });
        // As a helper machine would write it that was taken over.
        OUTCOME.write(&disk, &Ok::<_, String>(report)).unwrap();
        let report = read_outcome(&disk).unwrap().unwrap();
        assert_eq!(report.changes.len(), 1024);
        assert_eq!(report.changes[0].object, "\u{fffd}[2J");
        assert_eq!(report.changes[0].detail.chars().count(), 201);
        assert_eq!(report.identifiers, []);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_outcome_or_refused(mut bytes: Vec<u8>, has_magic: bool, length in 0..64u64) {
            let disk = disk();
            if has_magic {
                let mut header = OUTCOME.magic.to_vec();
                header.extend(length.to_le_bytes());
                header.append(&mut bytes);
                bytes = header;
            }
            disk.write_all_at(&bytes, OUTCOME.begin).unwrap();
            let _ = read_outcome(&disk);
        }
    }
}
