//! What partitions hold: file systems and swap areas, and their identifiers.

mod btrfs;
mod ext;
mod swap;
mod vfat;
mod xfs;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::identifiers::{Pool, uuid_text};

/// What a partition, or a disk without partitions, holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// FAT.
    Vfat,
    /// A swap area.
    Swap,
    /// Something that is known and left alone.
    Other(&'static str),
    /// Nothing that is known.
    Unknown,
}

/// The identifier of a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// It has none.
    None,
    /// It has one that cannot be changed.
    Fixed {
        /// The identifier, as blkid prints it.
        id: Option<String>,
        /// Why not.
        reason: String,
    },
    /// It has one that can be changed.
    Changeable {
        /// The identifier, as blkid prints it.
        id: String,
    },
}

/// An identifier that a content is to get.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewIdentity([u8; 16]);

/// Reads as much as there is, and zeroes beyond it.
fn read_at<const N: usize>(device: &File, offset: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    match device.read_exact_at(&mut bytes, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok([0; N]),
        result => result.map(|()| bytes),
    }
}

/// Returns `N` bytes of a structure, at an offset that it has.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    std::array::from_fn(|place| bytes[offset + place])
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(field(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}

/// Text that ends at the first zero.
fn text_of(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).trim_end().to_owned()
}

impl Content {
    /// Finds out what a device holds.
    pub(crate) fn detect(device: &File) -> io::Result<Content> {
        let head: [u8; 8192] = read_at(device, 0)?;
        let has = |offset: usize, magic: &[u8]| head[offset..].starts_with(magic);
        let is_lvm = (0..4)
            .any(|sector| has(sector * 512, b"LABELONE") && has(sector * 512 + 24, b"LVM2 001"));
        Ok(if has(0, b"LUKS\xba\xbe") {
            Content::Other("an encrypted volume (LUKS)")
        } else if is_lvm {
            Content::Other("a physical volume of LVM")
        } else if has(0, &0xa92b_4efc_u32.to_le_bytes())
            || has(4096, &0xa92b_4efc_u32.to_le_bytes())
        {
            Content::Other("a member of a RAID")
        } else if swap::is_swap(&head) {
            Content::Swap
        } else if has(0, b"XFSB") {
            Content::Xfs
        } else if has(1024 + 0x38, &0xef53_u16.to_le_bytes()) {
            Content::Ext
        } else if btrfs::is_btrfs(device)? {
            Content::Btrfs
        } else if has(1024, &0xf2f5_2010_u32.to_le_bytes()) {
            Content::Other("a file system of type f2fs")
        } else if has(0, b"hsqs") {
            Content::Other("a file system of type squashfs")
        } else if has(3, b"NTFS    ") {
            Content::Other("a file system of type ntfs")
        } else if vfat::is_vfat(&head) {
            Content::Vfat
        } else if read_at::<5>(device, 0x8001)? == *b"CD001" {
            Content::Other("a file system of type iso9660")
        } else {
            Content::Unknown
        })
    }

    /// Returns the type of file system as mount(2) takes it; `None` if it cannot be mounted.
    pub(crate) fn mount_type(self) -> Option<&'static str> {
        match self {
            Content::Ext => Some("ext4"),
            Content::Xfs => Some("xfs"),
            Content::Btrfs => Some("btrfs"),
            Content::Vfat => Some("vfat"),
            Content::Swap | Content::Other(_) | Content::Unknown => None,
        }
    }

    /// Returns what it is, for a report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Content::Ext => "ext4",
            Content::Xfs => "xfs",
            Content::Btrfs => "btrfs",
            Content::Vfat => "vfat",
            Content::Swap => "swap",
            Content::Other(name) => name,
            Content::Unknown => "unknown",
        }
    }

    /// Returns its identifier.
    pub(crate) fn identity(self, device: &File) -> io::Result<Identity> {
        match self {
            Content::Ext => ext::identity(device),
            Content::Xfs => xfs::identity(device),
            Content::Btrfs => btrfs::identity(device),
            Content::Vfat => vfat::identity(device),
            Content::Swap => swap::identity(device),
            Content::Other(name) => Ok(Identity::Fixed {
                id: None,
                reason: format!("it is {name}"),
            }),
            Content::Unknown => Ok(Identity::None),
        }
    }

    /// Returns its label; an empty one is none.
    pub(crate) fn label(self, device: &File) -> io::Result<Option<String>> {
        let label = match self {
            Content::Ext => text_of(&read_at::<16>(device, 1024 + 0x78)?),
            Content::Xfs => text_of(&read_at::<12>(device, 108)?),
            Content::Btrfs => btrfs::label(device)?,
            Content::Vfat => vfat::label(device)?,
            Content::Swap | Content::Other(_) | Content::Unknown => return Ok(None),
        };
        Ok((!label.is_empty()).then_some(label))
    }

    /// Makes an identifier, with its text as blkid prints it. `None` if the pool is empty, or it has none.
    pub(crate) fn new_identity(self, pool: &mut Pool) -> Option<(NewIdentity, String)> {
        match self {
            Content::Ext | Content::Xfs | Content::Btrfs | Content::Swap => {
                let uuid = pool.uuid()?;
                Some((NewIdentity(uuid), uuid_text(&uuid)))
            }
            Content::Vfat => {
                let serial: [u8; 4] = pool.take()?;
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&serial);
                Some((NewIdentity(bytes), vfat::text(serial)))
            }
            Content::Other(_) | Content::Unknown => None,
        }
    }

    /// Changes its identifier, which was found to be changeable. It must not be mounted.
    pub(crate) fn change(self, device: &File, new: NewIdentity) -> io::Result<()> {
        let NewIdentity(new) = new;
        match self {
            Content::Ext => ext::change(device, &new),
            Content::Xfs => xfs::change(device, &new),
            Content::Btrfs => btrfs::change(device, &new),
            Content::Vfat => vfat::change(device, field(&new, 0)),
            Content::Swap => swap::change(device, &new),
            Content::Other(_) | Content::Unknown => Err(io::ErrorKind::Unsupported.into()),
        }?;
        device.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// An image that a tool of the host has made.
    struct Made {
        _folder: TempDir,
        path: PathBuf,
        device: File,
    }

    fn run(program: &str, arguments: &[&str], path: &Path) -> String {
        let output = Command::new(program)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args(arguments)
            .arg(path)
            .output()
            .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {text} {errors}");
        text.trim().to_owned()
    }

    fn made(size: u64, program: &str, arguments: &[&str]) -> Made {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        File::create(&path).unwrap().set_len(size).unwrap();
        run(program, arguments, &path);
        let mut options = File::options();
        let device = options.read(true).write(true).open(&path).unwrap();
        Made {
            _folder: folder,
            path,
            device,
        }
    }

    /// Changes the identifier, and has the tools of the host say that nothing is wrong, and what it is now.
    fn changed(made: &Made, content: Content, check: Option<(&str, &[&str])>) {
        assert_eq!(Content::detect(&made.device).unwrap(), content);
        let blkid = |tag| {
            run(
                "blkid",
                &["--probe", "--output=value", "--match-tag", tag],
                &made.path,
            )
        };
        let Identity::Changeable { id } = content.identity(&made.device).unwrap() else {
            panic!("it can be changed");
        };
        assert_eq!(id, blkid("UUID"));
        assert_eq!(
            content.label(&made.device).unwrap(),
            Some("LABEL".to_owned()).filter(|_| content != Content::Swap)
        );
        let mut pool = Pool::new((0..=255).collect());
        for _ in 0..2 {
            let (new, text) = content.new_identity(&mut pool).unwrap();
            content.change(&made.device, new).unwrap();
            assert_eq!(blkid("UUID"), text);
            assert_eq!(blkid("LABEL"), "LABEL");
            if let Some((program, arguments)) = check {
                run(program, arguments, &made.path);
            }
            let identity = content.identity(&made.device).unwrap();
            assert_eq!(identity, Identity::Changeable { id: text });
        }
    }

    #[test]
    fn ext_gets_another_uuid_in_all_its_forms() {
        let forms: [&[&str]; 7] = [
            &["-t", "ext2"],
            &["-t", "ext3"],
            &["-t", "ext4", "-O", "^metadata_csum,^uninit_bg"],
            &["-t", "ext4", "-O", "metadata_csum,^metadata_csum_seed"],
            &["-t", "ext4", "-O", "metadata_csum,metadata_csum_seed,64bit"],
            &[
                "-t",
                "ext4",
                "-O",
                "metadata_csum,sparse_super2,^resize_inode",
                "-b",
                "4096",
            ],
            &[
                "-t",
                "ext4",
                "-O",
                "^sparse_super,^resize_inode",
                "-b",
                "1024",
                "-g",
                "8192",
            ],
        ];
        for form in forms {
            let mut arguments = vec!["-q", "-F", "-L", "LABEL", "-g", "1024", "-b", "1024"];
            arguments.extend(form);
            let made = made(64 << 20, "mke2fs", &arguments);
            changed(&made, Content::Ext, Some(("e2fsck", &["-f", "-n"])));
            // A backup is as good as the first one.
            let group = run("dumpe2fs", &["-h"], &made.path);
            assert!(
                group.contains("Filesystem state:         clean"),
                "{form:?} {group}"
            );
        }
    }

    #[test]
    fn backups_of_ext_follow() {
        let made = made(
            64 << 20,
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-b", "1024", "-L", "LABEL"],
        );
        changed(&made, Content::Ext, None);
        let first = run("dumpe2fs", &["-h"], &made.path);
        let backup = run(
            "dumpe2fs",
            &["-h", "-o", "superblock=8193", "-o", "blocksize=1024"],
            &made.path,
        );
        let uuid = |text: &str| {
            text.lines()
                .find(|line| line.contains("UUID"))
                .unwrap()
                .to_owned()
        };
        assert_eq!(uuid(&first), uuid(&backup));
    }

    #[test]
    fn ext_with_checksums_of_the_uuid_in_its_groups_is_left() {
        let made = made(
            16 << 20,
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
        );
        let identity = Content::Ext.identity(&made.device).unwrap();
        assert!(matches!(identity, Identity::Fixed { reason, .. } if reason.contains("uninit_bg")));
    }

    #[test]
    fn btrfs_gets_another_uuid() {
        let made = made(128 << 20, "mkfs.btrfs", &["--quiet", "--label", "LABEL"]);
        changed(
            &made,
            Content::Btrfs,
            Some(("btrfs", &["check", "--readonly", "--quiet"])),
        );
    }

    #[test]
    fn fat_gets_another_serial_number() {
        for (size, bits) in [(4 << 20, "12"), (32 << 20, "16"), (64 << 20, "32")] {
            let made = made(size, "mkfs.vfat", &["-F", bits, "-n", "LABEL"]);
            changed(&made, Content::Vfat, Some(("fsck.vfat", &["-n"])));
        }
    }

    #[test]
    fn swap_gets_another_uuid() {
        let made = made(1 << 20, "mkswap", &["--label", "LABEL"]);
        changed(&made, Content::Swap, None);
    }

    #[test]
    fn xfs_gets_another_uuid() {
        let made = made(300 << 20, "mkfs.xfs", &["-q", "-L", "LABEL"]);
        changed(&made, Content::Xfs, Some(("xfs_repair", &["-n"])));
    }

    #[test]
    fn what_is_not_changed_is_named() {
        let device = tempfile::tempfile().unwrap();
        device.write_all_at(b"LUKS\xba\xbe", 0).unwrap();
        device.set_len(1 << 20).unwrap();
        assert_eq!(
            Content::detect(&device).unwrap().name(),
            "an encrypted volume (LUKS)"
        );
        device.set_len(0).unwrap();
        assert_eq!(Content::detect(&device).unwrap(), Content::Unknown);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_are_read_without_harm(seed: [u8; 32], place in 0..5usize, length in 0..200_000u64) {
            let contents = [Content::Ext, Content::Xfs, Content::Btrfs, Content::Vfat, Content::Swap];
            let content = contents[place];
            let device = tempfile::tempfile().unwrap();
            let bytes: Vec<u8> = seed.iter().copied().cycle().take(length as usize).collect();
            device.write_all_at(&bytes, 0).unwrap();
            Content::detect(&device).unwrap();
            let _ = content.label(&device);
            let _ = content.identity(&device);
            let (new, _) = content.new_identity(&mut Pool::new(bytes)).unwrap_or((NewIdentity([1; 16]), String::new()));
            let _ = content.change(&device, new);
        }
    }
}
