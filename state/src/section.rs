use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{RestoreError, SaveError};

/// Largest payload of a section in bytes. The largest parts of a machine need a few tens of KiB.
pub const MAX_PAYLOAD: usize = 16 << 20;

/// The saved form of the state of one kind of part.
///
/// Every change of the type that changes its encoding increases the version: adding, removing or
/// moving a field, or giving it another type.
pub trait SavedState: Serialize + DeserializeOwned {
    /// Name of the kind of part: 1 to 255 ASCII characters.
    const KIND: &'static str;
    /// Version of the encoding.
    const VERSION: u16;
}

/// The saved state of one part. It may contain the sections of parts within it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    kind: String,
    version: u16,
    payload: Vec<u8>,
}

impl Section {
    /// Encodes `state`.
    ///
    /// # Errors
    /// If the value cannot be encoded, or takes more than [`MAX_PAYLOAD`] bytes.
    pub fn of<T: SavedState>(state: &T) -> Result<Self, SaveError> {
        const { assert!(!T::KIND.is_empty() && T::KIND.len() <= 255 && T::KIND.is_ascii()) };
        let failed = |reason: String| SaveError::Encode {
            part: T::KIND.to_owned(),
            reason,
        };
        let payload = postcard::to_stdvec(state).map_err(|error| failed(error.to_string()))?;
        if payload.len() > MAX_PAYLOAD {
            return Err(failed(format!(
                "{} bytes are more than the {MAX_PAYLOAD} of a section",
                payload.len()
            )));
        }
        Ok(Self {
            kind: T::KIND.to_owned(),
            version: T::VERSION,
            payload,
        })
    }

    /// Name of the kind of part.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Decodes the state of a part. The part itself must check that the values fit it.
    ///
    /// # Errors
    /// If the section is of another kind or version, or does not hold exactly one value.
    pub fn decode<T: SavedState>(&self) -> Result<T, RestoreError> {
        if self.kind != T::KIND {
            return Err(RestoreError::Kind {
                expected: T::KIND.to_owned(),
                found: self.kind.clone(),
            });
        }
        if self.version != T::VERSION {
            return Err(RestoreError::Version {
                kind: self.kind.clone(),
                known: T::VERSION,
                found: self.version,
            });
        }
        match postcard::take_from_bytes(&self.payload) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(self.damaged(&format!("{} bytes too many", rest.len()))),
            Err(error) => Err(self.damaged(&error.to_string())),
        }
    }

    fn damaged(&self, reason: &str) -> RestoreError {
        RestoreError::Damaged {
            reason: format!("section '{}': {reason}", self.kind),
        }
    }

    /// Writes the section with its frame.
    ///
    /// # Errors
    /// Those of `writer`.
    pub fn write_to(&self, writer: &mut impl Write) -> io::Result<()> {
        let mut frame = Vec::with_capacity(self.kind.len() + self.payload.len() + 11);
        // Neither is truncated: of() and read_from() check the bounds.
        frame.push(self.kind.len() as u8);
        frame.extend_from_slice(self.kind.as_bytes());
        frame.extend_from_slice(&self.version.to_le_bytes());
        frame.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        frame.extend_from_slice(&self.payload);
        let checksum = crc32fast::hash(&frame);
        frame.extend_from_slice(&checksum.to_le_bytes());
        writer.write_all(&frame)
    }

    /// Reads a section with its frame, and nothing beyond it.
    ///
    /// # Errors
    /// Those of `reader`, and if the data ends within the section or is damaged.
    pub fn read_from(reader: &mut impl Read) -> Result<Self, RestoreError> {
        let damaged = |reason: &str| RestoreError::Damaged {
            reason: reason.to_owned(),
        };
        let mut checksum = crc32fast::Hasher::new();
        let mut read = |len: usize| -> Result<Vec<u8>, RestoreError> {
            // Grows as bytes arrive, so a false length allocates nothing.
            let mut bytes = Vec::new();
            let count = reader.take(len as u64).read_to_end(&mut bytes)?;
            if count < len {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            checksum.update(&bytes);
            Ok(bytes)
        };

        let kind_len = read(1)?[0];
        let kind = String::from_utf8(read(usize::from(kind_len))?)
            .ok()
            .filter(|kind| !kind.is_empty() && kind.is_ascii())
            .ok_or_else(|| damaged("the kind of a section is not a name"))?;
        let version = read(2)?;
        let len = read(4)?;
        let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
        if len > MAX_PAYLOAD {
            return Err(damaged(&format!(
                "section '{kind}' claims a length of {len} bytes"
            )));
        }
        let payload = read(len)?;
        let expected = checksum.finalize().to_le_bytes();
        let mut found = [0; 4];
        reader.read_exact(&mut found)?;
        if found != expected {
            return Err(damaged(&format!("section '{kind}' fails its checksum")));
        }
        Ok(Self {
            kind,
            version: u16::from_le_bytes([version[0], version[1]]),
            payload,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Part {
        number: u64,
        flag: bool,
        list: Vec<u16>,
        name: Option<String>,
    }

    impl SavedState for Part {
        const KIND: &'static str = "part";
        const VERSION: u16 = 3;
    }

    #[derive(Debug, Serialize, Deserialize)]
    struct Other(u8);

    impl SavedState for Other {
        const KIND: &'static str = "other";
        const VERSION: u16 = 1;
    }

    /// [`Part`] in a later version of the program.
    #[derive(Debug, Serialize, Deserialize)]
    struct LaterPart(u64);

    impl SavedState for LaterPart {
        const KIND: &'static str = "part";
        const VERSION: u16 = 4;
    }

    fn part() -> Part {
        Part {
            number: u64::MAX,
            flag: true,
            list: vec![1, 300],
            name: Some("x".to_owned()),
        }
    }

    fn written(section: &Section) -> Vec<u8> {
        let mut bytes = Vec::new();
        section.write_to(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_format_stays_as_documented() {
        let bytes = written(&Section::of(&Other(7)).unwrap());
        assert_eq!(
            bytes[..13],
            [5, b'o', b't', b'h', b'e', b'r', 1, 0, 1, 0, 0, 0, 7]
        );
        assert_eq!(bytes[13..], crc32fast::hash(&bytes[..13]).to_le_bytes());
    }

    #[test]
    fn a_section_of_another_kind_or_version_is_refused() {
        let section = Section::of(&part()).unwrap();
        assert!(matches!(
            section.decode::<Other>(),
            Err(RestoreError::Kind { expected, found }) if expected == "other" && found == "part"
        ));
        assert!(matches!(
            section.decode::<LaterPart>(),
            Err(RestoreError::Version {
                known: 4,
                found: 3,
                ..
            })
        ));
    }

    #[test]
    fn a_payload_with_bytes_missing_or_left_over_is_refused() {
        let mut section = Section::of(&part()).unwrap();
        section.payload.push(0);
        assert!(matches!(
            section.decode::<Part>(),
            Err(RestoreError::Damaged { .. })
        ));
        section.payload.truncate(section.payload.len() - 2);
        assert!(matches!(
            section.decode::<Part>(),
            Err(RestoreError::Damaged { .. })
        ));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_read() {
        let mut bytes = written(&Section::of(&Other(7)).unwrap());
        bytes[8..12].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        assert!(matches!(
            Section::read_from(&mut bytes.as_slice()),
            Err(RestoreError::Damaged { reason }) if reason.contains("claims a length")
        ));
    }

    #[test]
    fn a_large_state_is_refused() {
        #[derive(Serialize, Deserialize)]
        struct Large(Vec<u8>);
        impl SavedState for Large {
            const KIND: &'static str = "large";
            const VERSION: u16 = 1;
        }
        assert!(matches!(
            Section::of(&Large(vec![0; MAX_PAYLOAD])),
            Err(SaveError::Encode { .. })
        ));
    }

    proptest! {
        #[test]
        fn a_section_survives_a_file(
            number: u64,
            flag: bool,
            list: Vec<u16>,
            name in proptest::option::of(".{0,20}"),
        ) {
            let part = Part { number, flag, list, name };
            let section = Section::of(&part).unwrap();
            let mut bytes = written(&section);
            let end = bytes.len();
            bytes.extend_from_slice(b"what follows");

            let mut reader = bytes.as_slice();
            let read = Section::read_from(&mut reader).unwrap();
            prop_assert_eq!(reader.len(), bytes.len() - end, "nothing beyond it is read");
            prop_assert_eq!(read.decode::<Part>().unwrap(), part);
        }

        #[test]
        fn a_section_with_any_bit_changed_or_its_end_missing_is_refused(position: usize) {
            let bytes = written(&Section::of(&part()).unwrap());
            let bit = position % (bytes.len() * 8);
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Section::read_from(&mut changed.as_slice()).is_err());
            prop_assert!(Section::read_from(&mut &bytes[..bit / 8]).is_err());
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused() {
        bolero::check!().for_each(|bytes| {
            if let Ok(section) = Section::read_from(&mut &*bytes) {
                let _ = section.decode::<Part>();
                assert!(bytes.starts_with(&written(&section)));
            }
            // Without the frame, as its checksum stops nearly all random bytes.
            let section = Section {
                kind: "part".to_owned(),
                version: 3,
                payload: bytes.to_vec(),
            };
            let _ = section.decode::<Part>();
        });
    }
}
