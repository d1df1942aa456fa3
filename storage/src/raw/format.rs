//! Guessing an image's format from its name and first bytes.
//!
//! A guest can write any bytes to an image that it has as a raw disk, so the bytes decide nothing: they are
//! only worth a warning. The name was chosen by the user.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The bytes of the file are those of the disk.
    Raw,
    /// The format of QEMU.
    Qcow2,
}

impl ImageFormat {
    /// Returns the format that the name of an image says: qcow2 if it ends in `.qcow2`, otherwise raw.
    pub fn of_name(path: &Path) -> ImageFormat {
        format_of_name(path)
    }

    /// Returns the format's name, as images have it for that of their backing file.
    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

/// A format that other programs know.
struct Foreign {
    /// The name that `qemu-img` has for it.
    name: &'static str,
    /// The extensions of such files, without the dot.
    extensions: &'static [&'static str],
    /// Its magic numbers, each with its offset.
    marks: &'static [(usize, &'static [u8])],
}

const FOREIGN: [Foreign; 5] = [
    Foreign {
        name: "qcow2",
        extensions: &["qcow2", "qcow"],
        marks: &[(0, b"QFI\xfb")],
    },
    Foreign {
        name: "vmdk",
        extensions: &["vmdk"],
        marks: &[(0, b"KDMV"), (0, b"COWD"), (0, b"# Disk DescriptorFile")],
    },
    Foreign {
        name: "vpc",
        extensions: &["vhd"],
        marks: &[(0, b"conectix")],
    },
    Foreign {
        name: "vhdx",
        extensions: &["vhdx"],
        marks: &[(0, b"vhdxfile")],
    },
    Foreign {
        name: "vdi",
        extensions: &["vdi"],
        marks: &[(64, &[0x7f, 0x10, 0xda, 0xbe])],
    },
];

/// How many of an image's first bytes [`of_bytes`] examines.
pub(super) const HEAD_SIZE: usize = 512;

/// Returns the format that the name of `path` says: qcow2 if it ends in `.qcow2`, otherwise raw.
pub(crate) fn format_of_name(path: &Path) -> ImageFormat {
    match path.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("qcow2") => ImageFormat::Qcow2,
        _ => ImageFormat::Raw,
    }
}

/// Returns the format other than raw that the name of `path` suggests, as `qemu-img` calls it.
pub(super) fn of_name(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?;
    let is_one = |format: &&Foreign| {
        let mut extensions = format.extensions.iter();
        extensions.any(|known| extension.eq_ignore_ascii_case(known))
    };
    FOREIGN.iter().find(is_one).map(|format| format.name)
}

/// Returns the format other than raw that an image with these first bytes could have.
pub(super) fn of_bytes(head: &[u8]) -> Option<&'static str> {
    let has = |&(offset, mark): &(usize, &[u8])| {
        head.get(offset..)
            .is_some_and(|bytes| bytes.starts_with(mark))
    };
    let is_one = |format: &&Foreign| format.marks.iter().any(has);
    FOREIGN.iter().find(is_one).map(|format| format.name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_say_a_format_and_others_do_not() {
        for (name, format) in [
            ("a.qcow2", Some("qcow2")),
            ("/x/a.QCOW2", Some("qcow2")),
            ("a.qcow", Some("qcow2")),
            ("a.vmdk", Some("vmdk")),
            ("a.vhd", Some("vpc")),
            ("a.vhdx", Some("vhdx")),
            ("a.img.vdi", Some("vdi")),
            ("a.img", None),
            ("qcow2", None),
            (".qcow2", None),
            ("a.qcow2/disk", None),
            ("a.qcow2.raw", None),
        ] {
            assert_eq!(of_name(Path::new(name)), format, "{name}");
        }
    }

    #[test]
    fn marks_are_found_where_they_are() {
        let mut head = [0; HEAD_SIZE];
        assert_eq!(of_bytes(&head), None);
        head[64..68].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        assert_eq!(of_bytes(&head), Some("vdi"));
        head[..4].copy_from_slice(b"QFI\xfb");
        assert_eq!(of_bytes(&head), Some("qcow2"));
        assert_eq!(of_bytes(b"QFI"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(head in prop::collection::vec(any::<u8>(), 0..HEAD_SIZE)) {
            let _ = of_bytes(&head);
        }
    }
}
