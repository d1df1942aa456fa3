//! Disks.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bantam_devices::virtio::block::MAX_QUEUES;
use bantam_devices::virtio::owner::{DeviceCommand, PresentImage};
use bantam_storage::ImageFormat;
use serde::{Deserialize, Deserializer, Serialize};

use super::forms::Listed;
use super::limits::ShortKeys;
use super::short_keys::serde_with_short_keys;
use super::{ConfigError, DeviceName, LimitsConfig, is_default, option_string, whole_number};

/// Describes a disk of the guest, which is kept in a file or block device of the host.
///
/// On the command line `PATH[,ro][,id=NAME][,KEY=VALUE]...`, where a comma in the path or name is
/// doubled; in a machine file a `[[disk]]` table with the same keys, and `readonly` for `ro`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    remote = "Self",
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a disk: a table with a path"
)]
pub struct DiskConfig {
    /// File or block device with the disk's contents.
    #[serde(with = "super::path")]
    pub path: PathBuf,
    /// Whether the guest cannot write to it.
    #[serde(default, skip_serializing_if = "is_default", alias = "ro")]
    pub readonly: bool,
    /// Serial number by which the guest can tell the disk from others.
    pub id: Option<DiskId>,
    /// Name of the disk on the host; see [`DiskConfig::device_name`].
    pub name: Option<DeviceName>,
    /// Where written data is kept until a flush.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache: CacheModeOption,
    /// How requests are executed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub engine: BlockEngineOption,
    /// The image's format. If it is not given, the image is qcow2 if its name ends in `.qcow2` and otherwise
    /// raw, and an image whose name suggests another format is refused.
    pub format: Option<DiskFormatOption>,
    /// Whether the image may have backing files, which are then opened too.
    #[serde(
        default = "backing_by_default",
        skip_serializing_if = "is_backing_default"
    )]
    pub backing: bool,
    /// Block size that the guest is told. By default, the block size of a block device, and 512 for a file.
    pub block_size: Option<DiskBlockSize>,
    /// Whether other programs must leave the image alone.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lock: DiskLockOption,
    /// Number of queues; by default one for each vCPU, up to [`DiskConfig::DEFAULT_MAX_QUEUES`].
    pub queues: Option<DiskQueueCount>,
    /// Whether a thread of its own serves the disk.
    #[serde(default, skip_serializing_if = "is_default")]
    pub iothread: bool,
    /// Whether that thread polls for requests for longer than a moment before it sleeps.
    #[serde(default, skip_serializing_if = "is_default")]
    pub poll: bool,
    /// Limits of what the guest can do.
    #[serde(
        default,
        skip_serializing_if = "is_default",
        alias = "bytes-per-second",
        alias = "burst-bytes",
        alias = "operations-per-second",
        alias = "burst-operations"
    )]
    pub limits: LimitsConfig,
    /// Whether an image is accepted rather than refused if it is empty, or is writable and ends within a
    /// block. The guest does not see what is beyond the last whole block.
    #[serde(default, skip_serializing_if = "is_default")]
    pub any_size: bool,
}

/// Block size of a disk that is kept in a file, if no other is configured.
const SECTOR_SIZE: u32 = 512;

serde_with_short_keys!(DiskConfig);

impl DiskConfig {
    /// Maximum number of queues of a disk whose number of queues is not given.
    pub const DEFAULT_MAX_QUEUES: u16 = 4;

    /// Describes a disk that the guest can read and write, without an id and with defaults for all else.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            id: None,
            name: None,
            cache: CacheModeOption::default(),
            engine: BlockEngineOption::default(),
            format: None,
            backing: true,
            block_size: None,
            lock: DiskLockOption::default(),
            queues: None,
            iothread: false,
            poll: false,
            limits: LimitsConfig::default(),
            any_size: false,
        }
    }

    /// Returns the name of the disk at `place`, counted from zero: its name or, if it has none, its id. A
    /// disk with neither is named after its place, such as `disk0`, and so is one whose id is not a
    /// [`DeviceName`] or could be the name of another device.
    pub fn device_name(&self, place: usize) -> DeviceName {
        let id = || {
            let name: DeviceName = self.id.as_ref()?.as_str().parse().ok()?;
            (!name.is_fixed() && !name.is_by_place()).then_some(name)
        };
        let name = self.name.clone().or_else(id);
        name.unwrap_or_else(|| DeviceName::by_place("disk", place))
    }

    /// Applies the change that `command` has made to the device.
    pub(super) fn apply(&mut self, command: &DeviceCommand) {
        match command {
            DeviceCommand::ReplaceImage { path, format } => {
                // An image that its name says to be qcow2 is replaced by another one, whatever that is called.
                let is_qcow2 =
                    self.format.is_none() && ImageFormat::of_name(&self.path) == ImageFormat::Qcow2;
                let format = format.or(is_qcow2.then_some(ImageFormat::Qcow2));
                self.path.clone_from(path);
                self.format = format.map(Into::into).or(self.format);
            }
            DeviceCommand::SetLimits(limits) => self.limits = (*limits).into(),
            _ => {}
        }
    }

    /// Gives the disk another image.
    pub(super) fn apply_image(&mut self, image: &PresentImage) {
        self.path.clone_from(&image.path);
        self.format = Some(image.format.into());
        // A block device may have had larger blocks than a file.
        if self.block_size.is_none() && image.block_size != SECTOR_SIZE {
            self.block_size = DiskBlockSize::try_from(i64::from(image.block_size)).ok();
        }
    }

    /// Returns the number of queues in a machine with `vcpus` vCPUs.
    pub fn queue_count(&self, vcpus: u8) -> u16 {
        match self.queues {
            Some(count) => count.get(),
            None => u16::from(vcpus).min(Self::DEFAULT_MAX_QUEUES),
        }
    }

    /// Checks that each burst of the disk has its limit.
    pub(super) fn validate_bursts(&self) -> Result<(), ConfigError> {
        let device = || format!("disk '{}'", self.path.display());
        self.limits.check_bursts(device)
    }
}

fn backing_by_default() -> bool {
    true
}

fn is_backing_default(backing: &bool) -> bool {
    *backing
}

impl Listed for DiskConfig {
    const NAME: &'static str = "disk";
    const EXAMPLE: &'static str = "path = \"disk.img\"";
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for DiskConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        option_string::parse(text, Some("path")).map_err(|error| ConfigError::DiskOption {
            reason: error.to_string(),
        })
    }
}

/// Writes the option string, which cannot express limits that are buckets.
impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&option_string::escape(&self.path.to_string_lossy()))?;
        if self.readonly {
            f.write_str(",ro")?;
        }
        if let Some(id) = &self.id {
            write!(f, ",id={}", option_string::escape(id.as_str()))?;
        }
        if let Some(name) = &self.name {
            write!(f, ",name={name}")?;
        }
        if self.cache != CacheModeOption::default() {
            write!(f, ",cache={}", self.cache)?;
        }
        if self.engine != BlockEngineOption::default() {
            write!(f, ",engine={}", self.engine)?;
        }
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        if !self.backing {
            f.write_str(",backing=off")?;
        }
        if let Some(size) = self.block_size {
            write!(f, ",block-size={}", size.get())?;
        }
        if self.lock != DiskLockOption::default() {
            write!(f, ",lock={}", self.lock)?;
        }
        if let Some(queues) = self.queues {
            write!(f, ",queues={}", queues.get())?;
        }
        if self.iothread {
            f.write_str(",iothread=on")?;
        }
        if self.poll {
            f.write_str(",poll=on")?;
        }
        for (key, quantity) in self.limits.rates() {
            write!(f, ",{key}={}", quantity.get())?;
        }
        if self.any_size {
            f.write_str(",any-size=on")?;
        }
        Ok(())
    }
}

/// Where data that the guest has written is kept until the guest flushes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheModeOption {
    /// In the host's page cache.
    #[default]
    Writeback,
    /// Nowhere: an acknowledged write is on stable storage.
    Writethrough,
    /// In the storage's own cache; the host's page cache is bypassed.
    None,
    /// In the host's page cache, and flushes do nothing.
    Unsafe,
}

impl fmt::Display for CacheModeOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::None => "none",
            Self::Unsafe => "unsafe",
        })
    }
}

/// How the requests of a disk are executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockEngineOption {
    /// Each in the way that is best for it and that the host offers.
    #[default]
    Auto,
    /// All by io_uring.
    IoUring,
    /// One after the other.
    Sync,
}

impl fmt::Display for BlockEngineOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Sync => "sync",
        })
    }
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum DiskFormatOption {
    /// The bytes of the file are those of the disk.
    Raw,
    /// The format of QEMU.
    Qcow2,
}

impl From<ImageFormat> for DiskFormatOption {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<DiskFormatOption> for ImageFormat {
    fn from(format: DiskFormatOption) -> Self {
        match format {
            DiskFormatOption::Raw => Self::Raw,
            DiskFormatOption::Qcow2 => Self::Qcow2,
        }
    }
}

impl FromStr for DiskFormatOption {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ConfigError::DiskFormat { text: text.into() }),
        }
    }
}

impl TryFrom<String> for DiskFormatOption {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl fmt::Display for DiskFormatOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Whether a disk image must be locked to be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskLockOption {
    /// An image that another program uses is refused, and so is one that cannot be locked.
    #[default]
    On,
    /// An image that [`DiskLockOption::On`] would refuse is used, with a warning.
    Warn,
    /// The image is not locked, nor is it checked whether another program uses it.
    Off,
    /// An image that another program uses is refused; one on a file system without locks is used, with a
    /// warning.
    WherePossible,
}

impl fmt::Display for DiskLockOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Warn => "warn",
            Self::Off => "off",
            Self::WherePossible => "where-possible",
        })
    }
}

/// Block size that a guest is told: 512 or 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DiskBlockSize(u32);

impl DiskBlockSize {
    /// Returns the size in bytes.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<i64> for DiskBlockSize {
    type Error = ConfigError;

    fn try_from(size: i64) -> Result<Self, ConfigError> {
        match u32::try_from(size) {
            Ok(size @ (512 | 4096)) => Ok(Self(size)),
            _ => Err(ConfigError::DiskBlockSize { size }),
        }
    }
}

impl<'de> Deserialize<'de> for DiskBlockSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole_number::deserialize(deserializer, Self::try_from)
    }
}

/// Number of queues of a disk, from 1 to [`MAX_QUEUES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DiskQueueCount(u16);

impl DiskQueueCount {
    /// Returns the number as an integer.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<i64> for DiskQueueCount {
    type Error = ConfigError;

    fn try_from(count: i64) -> Result<Self, ConfigError> {
        match u16::try_from(count) {
            Ok(count @ 1..=MAX_QUEUES) => Ok(Self(count)),
            _ => Err(ConfigError::DiskQueueCount { count }),
        }
    }
}

impl<'de> Deserialize<'de> for DiskQueueCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole_number::deserialize(deserializer, Self::try_from)
    }
}

/// Serial number of a disk: 1 to 20 printable ASCII characters, the most that a virtio block device can
/// tell its driver (virtio 1.3, section 5.2.6).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct DiskId(String);

impl DiskId {
    /// Maximum number of bytes.
    pub const MAX_SIZE: usize = 20;

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DiskId {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let printable = |byte| matches!(byte, b' '..=b'~');
        if !(1..=Self::MAX_SIZE).contains(&text.len()) || !text.bytes().all(printable) {
            return Err(ConfigError::DiskId { text });
        }
        Ok(Self(text))
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{LimitConfig, Quantity};
    use super::*;

    fn disk(text: &str) -> Result<DiskConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    fn rate(per_second: i64, burst: Option<i64>) -> LimitConfig {
        let quantity = |number| Quantity::try_from(number).unwrap();
        LimitConfig::Rate {
            per_second: Some(quantity(per_second)),
            burst: burst.map(quantity),
        }
    }

    #[test]
    fn reads_the_option_string() {
        assert_eq!(disk("root.img"), Ok(DiskConfig::new("root.img")));
        let id = DiskId::try_from("root disk".to_owned()).unwrap();
        let expected = DiskConfig {
            path: "/a=b,c.img".into(),
            readonly: true,
            id: Some(id),
            name: Some("root".parse().unwrap()),
            cache: CacheModeOption::None,
            engine: BlockEngineOption::IoUring,
            format: Some(DiskFormatOption::Raw),
            backing: false,
            block_size: Some(DiskBlockSize(4096)),
            lock: DiskLockOption::Warn,
            queues: Some(DiskQueueCount(3)),
            iothread: true,
            poll: true,
            limits: LimitsConfig {
                bytes: rate(10 << 20, None),
                operations: rate(500, Some(2048)),
            },
            any_size: false,
        };
        let text = "/a=b,,c.img,id=root disk,name=root,ro,cache=none,engine=io_uring,queues=3,iothread=on,\
                    poll=on,format=raw,backing=off,block-size=4096,lock=warn,bytes-per-second=10M,operations-per-second=500,burst-operations=2K";
        assert_eq!(disk(text), Ok(expected));
        assert!(!disk("a,iothread=off").unwrap().iothread);
    }

    #[test]
    fn errors_show_the_accepted_form() {
        assert_eq!(
            disk("root.img,rw").unwrap_err(),
            "unknown option 'rw', expected one of 'readonly', 'ro', 'id', 'name', 'cache', \
             'engine', 'format', 'backing', 'block-size', 'lock', 'queues', 'iothread', 'poll', 'burst-bytes', \
             'burst-operations', 'bytes-per-second', 'operations-per-second', 'any-size'; a disk is PATH[,ro][,id=NAME][,KEY=VALUE]..."
        );
        assert!(
            disk("root.img,cache=no")
                .unwrap_err()
                .contains("expected one of `writeback`")
        );
        for (text, reason) in [
            ("a,queues=0", "from 1 to 8"),
            ("a,queues=9", "from 1 to 8"),
            ("a,iothread=1", "'iothread' is on or off"),
            ("a,engine", "engine=VALUE"),
            (
                "a,format=vmdk",
                "unknown disk format 'vmdk': the formats are: raw, qcow2",
            ),
            ("a,block-size=1024", "512 or 4096"),
            ("a,lock=yes", "expected one of `on`, `warn`, `off`"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn there_are_as_many_queues_as_vcpus_up_to_a_limit() {
        let counts = |text| [1, 2, 32].map(|vcpus| disk(text).unwrap().queue_count(vcpus));
        assert_eq!(counts("a"), [1, 2, 4]);
        assert_eq!(counts("a,queues=8"), [8, 8, 8]);
    }

    #[test]
    fn a_disk_is_called_by_its_name_its_id_or_its_place() {
        for (text, name) in [
            ("a,name=root,id=other", "root"),
            ("a,id=root", "root"),
            ("a", "disk3"),
            ("a,id=root disk", "disk3"),
            ("a,id=console", "disk3"),
            ("a,id=net0", "disk3"),
        ] {
            assert_eq!(disk(text).unwrap().device_name(3).as_str(), name);
        }
    }

    #[test]
    fn a_disk_is_described_with_the_image_that_it_has() {
        let replaced = |text: &str, path: &str, format| {
            let mut disk = disk(text).unwrap();
            let path = path.into();
            disk.apply(&DeviceCommand::ReplaceImage { path, format });
            disk.to_string()
        };
        for (text, path, format, expected) in [
            ("a", "b", None, "b"),
            ("a", "b.qcow2", None, "b.qcow2"),
            ("a,format=raw", "b.qcow2", None, "b.qcow2,format=raw"),
            ("a.qcow2", "b", None, "b,format=qcow2"),
            ("a.qcow2", "b", Some(ImageFormat::Raw), "b,format=raw"),
            ("a", "b", Some(ImageFormat::Qcow2), "b,format=qcow2"),
        ] {
            assert_eq!(replaced(text, path, format), expected);
        }
        let mut disk = disk("a,cache=unsafe,backing=off").unwrap();
        disk.apply_image(&PresentImage {
            path: "b".into(),
            format: ImageFormat::Qcow2,
            block_size: 512,
        });
        assert_eq!(disk.to_string(), "b,cache=unsafe,format=qcow2,backing=off");
        disk.apply_image(&PresentImage {
            path: "c".into(),
            format: ImageFormat::Raw,
            block_size: 4096,
        });
        assert_eq!(disk.block_size, Some(DiskBlockSize(4096)));
    }

    #[test]
    fn an_id_fits_the_device() {
        assert!(disk("a,id=12345678901234567890").is_ok());
        for id in ["123456789012345678901", "tab\there", "é"] {
            let error = disk(&format!("a,id={id}")).unwrap_err();
            assert!(
                error.contains("1 to 20 printable ASCII characters"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(
            path in ".+",
            readonly: bool,
            id in proptest::option::of("[ -~]{1,20}"),
            cache in prop_oneof![Just(CacheModeOption::Writeback), Just(CacheModeOption::Unsafe)],
            engine in prop_oneof![Just(BlockEngineOption::Auto), Just(BlockEngineOption::Sync)],
            block_size in proptest::option::of(prop_oneof![Just(512), Just(4096)]),
            format in proptest::option::of(prop_oneof![
                Just(DiskFormatOption::Raw),
                Just(DiskFormatOption::Qcow2),
            ]),
            backing: bool,
            lock in prop_oneof![
                Just(DiskLockOption::On),
                Just(DiskLockOption::Warn),
                Just(DiskLockOption::Off),
                Just(DiskLockOption::WherePossible),
            ],
            queues in proptest::option::of(1..=MAX_QUEUES),
            iothread: bool,
            poll: bool,
            limit in proptest::option::of(1..=i64::MAX),
            name in proptest::option::of("[a-z0-9._-]{1,64}"),
            any_size: bool,
        ) {
            let id = id.map(|id| DiskId::try_from(id).unwrap());
            let disk = DiskConfig {
                path: path.into(),
                readonly,
                id,
                name: name.map(|name| name.parse().unwrap()),
                cache,
                engine,
                format,
                backing,
                block_size: block_size.map(DiskBlockSize),
                lock,
                queues: queues.map(DiskQueueCount),
                iothread,
                poll,
                limits: LimitsConfig {
                    bytes: limit.map_or_else(LimitConfig::default, |limit| rate(limit, None)),
                    operations: LimitConfig::default(),
                },
                any_size,
            };
            prop_assert_eq!(disk.to_string().parse::<DiskConfig>().unwrap(), disk);
        }
    }
}
