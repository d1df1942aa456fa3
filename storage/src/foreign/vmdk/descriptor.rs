//! The descriptor: text that says of which extents a disk is made.

use super::super::OpenError;

/// The most bytes of a descriptor. Each extent has a line, and an extent of 2 GiB is the smallest in use.
pub const MAX_SIZE: u64 = 1 << 20;
/// The most extents. Each can be a file.
const MAX_EXTENTS: usize = 4096;
const FIRST_LINE: &str = "# Disk DescriptorFile";
/// A content ID that no image has.
const NO_PARENT: u32 = 0xffff_ffff;

/// What a descriptor says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// The content ID, which changes with the content.
    pub cid: u32,
    /// That of the image that this one depends on.
    pub parent_cid: u32,
    /// The type that its creator has given the image.
    pub create_type: String,
    /// The extents, in the order of the disk.
    pub extents: Vec<ExtentLine>,
}

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// Its length in sectors.
    pub sectors: u64,
    /// The word for its type.
    pub kind: String,
    /// The file that holds it, if it has one.
    pub file: Option<String>,
    /// The sector of the file where it begins.
    pub offset: u64,
}

/// Whether a file that begins with `start` is a descriptor.
pub fn probe(start: &[u8]) -> bool {
    let text = String::from_utf8_lossy(start);
    // Comments and empty lines may come first; the version must be the first assignment.
    let mut lines = text.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    first.eq_ignore_ascii_case(FIRST_LINE)
        && lines
            .find(|line| !line.is_empty() && !line.starts_with('#'))
            .is_some_and(|line| assignment(line).is_some_and(|(key, _)| key == "version"))
}

/// Reads a descriptor, which ends with the first NUL.
///
/// # Errors
/// If it is not a descriptor, or that of an image which depends on another.
pub fn parse(bytes: &[u8]) -> Result<Descriptor, OpenError> {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let mut descriptor = Descriptor {
        cid: 0,
        parent_cid: NO_PARENT,
        create_type: String::new(),
        extents: Vec::new(),
    };
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some((key, value)) = assignment(line) {
            let id = || {
                u32::from_str_radix(value, 16).map_err(|_| {
                    OpenError::damaged(format!("the content ID '{value}' is not a number"))
                })
            };
            match key {
                "CID" => descriptor.cid = id()?,
                "parentCID" => descriptor.parent_cid = id()?,
                "createType" => descriptor.create_type = value.to_owned(),
                _ => {}
            }
        } else if let Some(extent) = extent(line)? {
            if descriptor.extents.len() == MAX_EXTENTS {
                return Err(OpenError::unsupported(format!(
                    "more than {MAX_EXTENTS} extents are not supported"
                )));
            }
            descriptor.extents.push(extent);
        }
    }
    if descriptor.parent_cid != NO_PARENT {
        return Err(OpenError::unsupported(
            "it is a VMDK image that holds only what differs from another one, as for a snapshot; merge them \
             with vmware-vdiskmanager -r or vmkfstools -i",
        ));
    }
    Ok(descriptor)
}

fn assignment(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (key, value) = (key.trim(), value.trim().trim_matches('"'));
    (!key.contains(char::is_whitespace)).then_some((key, value))
}

/// Reads the line of an extent: `RW 1000 FLAT "name" 0`. Other lines are none.
fn extent(line: &str) -> Result<Option<ExtentLine>, OpenError> {
    let wrong = || OpenError::damaged(format!("its descriptor has the extent '{line}'"));
    let mut quoted = line.split('"');
    let mut words = quoted.next().unwrap_or_default().split_whitespace();
    match words.next() {
        Some("RW" | "RDONLY") => {}
        Some("NOACCESS") => {
            return Err(OpenError::unsupported(
                "it has an extent that must not be accessed (NOACCESS)",
            ));
        }
        _ => return Ok(None),
    }
    let sectors = words.next().and_then(|word| word.parse().ok());
    let sectors = sectors.ok_or_else(wrong)?;
    let kind = words.next().ok_or_else(wrong)?.to_owned();
    let file = quoted.next().map(str::to_owned);
    let offset = quoted.next().unwrap_or_default().split_whitespace().next();
    let offset = offset.map_or(Ok(0), str::parse).map_err(|_| wrong())?;
    Ok(Some(ExtentLine {
        sectors,
        kind,
        file,
        offset,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_read() {
        let text = b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                     createType = \"twoGbMaxExtentFlat\"\n\n# Extent description\n\
                     RW 4192256 FLAT \"my disk-f001.vmdk\" 0\nRW 63 ZERO\n\
                     RDONLY 8 FLAT \"b\" 128\nddb.adapterType = \"ide\"\n\0RW 1 FLAT \"no\" 0\n";
        assert!(probe(text));
        let descriptor = parse(text).unwrap();
        assert_eq!(descriptor.cid, 0xffff_fffe);
        assert_eq!(descriptor.create_type, "twoGbMaxExtentFlat");
        let extent = |sectors, kind: &str, file: Option<&str>, offset| ExtentLine {
            sectors,
            kind: kind.to_owned(),
            file: file.map(str::to_owned),
            offset,
        };
        assert_eq!(
            descriptor.extents,
            [
                extent(4_192_256, "FLAT", Some("my disk-f001.vmdk"), 0),
                extent(63, "ZERO", None, 0),
                extent(8, "FLAT", Some("b"), 128),
            ]
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (line, part) in [
            ("parentCID=12345678", "differs from another"),
            ("RW x FLAT \"a\" 0", "RW x FLAT"),
            ("RW 1 FLAT \"a\" -1", "RW 1 FLAT"),
            ("NOACCESS 1 FLAT \"a\" 0", "NOACCESS"),
        ] {
            let text = format!("# Disk DescriptorFile\nversion=1\n{line}\n");
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let many = "RW 1 ZERO\n".repeat(MAX_EXTENTS + 1);
        assert!(parse(many.as_bytes()).is_err());
    }

    #[test]
    fn other_text_is_not_a_descriptor() {
        assert!(!probe(b"# Disk DescriptorFile\nnothing"));
        assert!(!probe(b"version=1\n"));
        assert!(!probe(b""));
    }
}
