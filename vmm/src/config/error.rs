//! Errors in a configuration.

use std::io;
use std::path::PathBuf;

use bantam_arch::layout::{MAX_MEMORY_SIZE, MAX_VCPUS, MAX_VIRTIO_DEVICES, MIN_MEMORY_SIZE};
use bantam_devices::virtio::block::MAX_QUEUES;
use bantam_devices::virtio::console::MAX_CHANNELS;
use bantam_devices::virtio::vsock::{MAX_GUEST_CID, MIN_GUEST_CID};

use super::memory_size::Bytes;
use super::{
    BalloonSize, ChannelName, DeviceName, DiskId, HugePages, InterfaceName, MacAddress, MemorySize,
    Mtu, QueuePairs, VsockConfig,
};

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The machine file could not be read.
    #[error("cannot read machine file '{}': {source}", path.display())]
    ReadMachineFile {
        /// The machine file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of the machine file is wrong.
    #[error("{}:{line}: {message}", path.display())]
    MachineFile {
        /// The machine file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
    /// The options of all sources together do not describe a machine.
    #[error("{message}")]
    Options {
        /// What is wrong with it.
        message: String,
    },
    /// There is nothing to boot.
    #[error("no kernel given: add '--kernel FILE', or 'kernel = \"FILE\"' in the machine file")]
    NoKernel,
    /// Not a number of vCPUs that a machine can have.
    #[error("invalid number of vCPUs '{text}': expected 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// What was given.
        text: String,
    },
    /// vCPUs are to share cores in pairs, but their number is odd.
    #[error(
        "{count} vCPUs cannot be paired into cores of two threads: use 1 or an even number of vCPUs"
    )]
    UnpairedVcpu {
        /// The number of vCPUs.
        count: u8,
    },
    /// Not a memory size.
    #[error(
        "invalid memory size '{text}': expected a number with an optional unit K, M, G or T, \
         such as 512M (a number alone counts MiB)"
    )]
    MemorySizeFormat {
        /// What was given.
        text: String,
    },
    /// Less or more memory than a machine can have.
    #[error(
        "memory size {text} is out of range: {} to {}",
        Bytes(MIN_MEMORY_SIZE),
        Bytes(MAX_MEMORY_SIZE)
    )]
    MemorySizeRange {
        /// What was given.
        text: String,
    },
    /// Not a whole number of pages.
    #[error("memory size {text} is not a multiple of 4K")]
    MemorySizePages {
        /// What was given.
        text: String,
    },
    /// Not a kind of pages that memory can consist of.
    #[error("invalid huge pages '{text}': expected none, transparent or 2M")]
    HugePages {
        /// What was given.
        text: String,
    },
    /// Not a whole number of the pages that memory is to consist of.
    #[error("memory size {memory} is not a multiple of {pages}, which the huge pages have")]
    HugePagesMemory {
        /// The memory size.
        memory: MemorySize,
        /// The huge pages.
        pages: HugePages,
    },
    /// Not a description of a disk.
    #[error("{reason}; a disk is PATH[,ro][,id=NAME][,KEY=VALUE]...")]
    DiskOption {
        /// What is wrong with it.
        reason: String,
    },
    /// Not a format that a disk image can have.
    #[error(
        "unknown disk format '{}': the formats are: raw, qcow2; an image of another format is to be converted \
         first",
        text.escape_debug()
    )]
    DiskFormat {
        /// What was given.
        text: String,
    },
    /// Not a block size that a disk can have.
    #[error("invalid block size {size}: expected 512 or 4096 bytes")]
    DiskBlockSize {
        /// What was given.
        size: i64,
    },
    /// Not a number of queues that a disk can have.
    #[error("invalid number of queues {count}: expected a number from 1 to {MAX_QUEUES}")]
    DiskQueueCount {
        /// What was given.
        count: i64,
    },
    /// Not a number of bytes or operations.
    #[error("invalid quantity '{text}': expected a number from 1 on, such as 500 or 10M")]
    Quantity {
        /// What was given.
        text: String,
    },
    /// A burst is given without the limit that it belongs to.
    #[error("{burst} of {device} does nothing without {limit}: give both, or neither")]
    BurstWithoutLimit {
        /// The disk or network device.
        device: String,
        /// Name of the option with the burst.
        burst: &'static str,
        /// Name of the option with its limit.
        limit: &'static str,
    },
    /// A limit that is neither a rate nor a bucket.
    #[error(
        "a limit is per-second, perhaps with burst, or size with refill-time, perhaps with \
         one-time-burst: give one of the two"
    )]
    LimitForm,
    /// Limits are given in two ways, one of which would silently win.
    #[error("both {key} and limits are given: give all limits of the device in one way")]
    LimitsTwice {
        /// Name of the option beside the table of limits.
        key: &'static str,
    },
    /// Not a time in which a bucket can fill.
    #[error("invalid time '{}' to refill: expected one such as 100ms, 1s or 250us", text.escape_debug())]
    RefillTime {
        /// What was given.
        text: String,
    },
    /// Not the name of a device.
    #[error(
        "invalid device name '{}': expected 1 to {} letters, digits and '.', '-', '_'",
        text.escape_debug(), DeviceName::MAX_SIZE
    )]
    DeviceName {
        /// What was given.
        text: String,
    },
    /// Two devices have the same name.
    #[error("device name '{name}' is given twice: give each device a name of its own")]
    RepeatedDeviceName {
        /// The name.
        name: DeviceName,
    },
    /// A device has the name that another one, which has no name of its own, has by its place.
    #[error(
        "device name '{name}' is what another device is called by its place: choose another name, or \
         give that device one too"
    )]
    PlaceDeviceName {
        /// The name.
        name: DeviceName,
    },
    /// A disk or network device has a name that is reserved for a device of another kind.
    #[error("device name '{name}' is that of another kind of device: choose another name")]
    FixedDeviceName {
        /// The name.
        name: DeviceName,
    },
    /// Not the id of a disk.
    #[error("invalid disk id '{}': expected 1 to {} printable ASCII characters",
        text.escape_debug(), DiskId::MAX_SIZE)]
    DiskId {
        /// What was given.
        text: String,
    },
    /// Two disks have the same id.
    #[error("disk id '{id}' is given to two disks: give each an id of its own")]
    RepeatedDiskId {
        /// The id.
        id: DiskId,
    },
    /// Two disks that are not both read-only have the same image.
    #[error(
        "disk '{}' is given twice: give each device a file of its own, or make both read-only",
        path.display()
    )]
    RepeatedDisk {
        /// The file, as given the second time.
        path: PathBuf,
    },
    /// The guest could overwrite what it is booted from.
    #[error(
        "the {what} '{}' is also a disk that the guest can write: make that disk read-only, or give it \
         a file of its own",
        path.display()
    )]
    WritableBootFile {
        /// What the file is: the kernel or the initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The serial port, console or a channel would write to a file that the machine reads.
    #[error(
        "the output of {stream} would go to '{}', which the machine uses otherwise: \
         choose another file",
        path.display()
    )]
    SerialFile {
        /// Which of them.
        stream: String,
        /// The file.
        path: PathBuf,
    },
    /// Not a description of a network device.
    #[error(
        "{reason}; a network device is one of user, nat, hostonly, network=NAME, tap=NAME, bridge=NAME, macvtap=NAME, passt=SOCKET and fd=N, with [,KEY=VALUE]..."
    )]
    NetOption {
        /// What is wrong with it.
        reason: String,
    },
    /// A network device is connected to nothing.
    #[error("neither a tap nor a network nor 'user' says what the device is connected to")]
    NetBackendMissing,
    /// A network device is connected to two networks.
    #[error("a device is on one tap or network only")]
    NetBackends,
    /// A device without a tap has an option of taps.
    #[error("'{key}' is for devices on a tap")]
    NetTapOption {
        /// The option.
        key: &'static str,
    },
    /// A device elsewhere has an option of networks of the host.
    #[error("'{key}' is for devices on a network of the host: nat, hostonly or network=NAME")]
    HostNetOption {
        /// The option.
        key: &'static str,
    },
    /// The guest cannot be called so on a network of the host.
    #[error(
        "invalid hostname '{name}': on a network of the host it is 1 to 63 letters, digits and '-'"
    )]
    NetHostName {
        /// The name.
        name: String,
    },
    /// Not a network namespace.
    #[error(
        "invalid network namespace '{text}': expected the name of one that 'ip netns' lists, or a path"
    )]
    Namespace {
        /// The text.
        text: String,
    },
    /// Not the number of a descriptor.
    #[error("{number} is not the number of a descriptor")]
    Descriptor {
        /// The number.
        number: i64,
    },
    /// A network device without a tap has several queues.
    #[error("'queues' is for devices on a tap")]
    UserNetQueues,
    /// A device on a tap has an option of user networks.
    #[error("'{key}' is for devices on a user network")]
    UserNetOption {
        /// The option.
        key: &'static str,
    },
    /// Not the name of a network interface.
    #[error(
        "invalid interface name '{}': expected 1 to {} ASCII characters without space, '/', ':' or '%'",
        text.escape_debug(), InterfaceName::MAX_SIZE
    )]
    InterfaceName {
        /// What was given.
        text: String,
    },
    /// Two network devices have the same MAC address.
    #[error(
        "the network devices on {first} and {second} have the same MAC address {mac}: give each an \
         address of its own"
    )]
    RepeatedMacAddress {
        /// The address.
        mac: MacAddress,
        /// What the first device is connected to.
        first: String,
        /// What the second is connected to.
        second: String,
    },
    /// Not a MAC address.
    #[error(
        "invalid MAC address '{}': expected one such as 52:54:00:12:34:56",
        text.escape_debug()
    )]
    MacAddressFormat {
        /// What was given.
        text: String,
    },
    /// A MAC address that no interface can have.
    #[error(
        "MAC address '{text}' is not that of one interface: \
         its first byte must be even, and it must not be all zeros"
    )]
    MacAddressKind {
        /// What was given.
        text: String,
    },
    /// Not a size that packets can have.
    #[error("mtu {size} is out of range: {} to {}", Mtu::MIN, Mtu::MAX)]
    Mtu {
        /// What was given.
        size: i64,
    },
    /// Not a number of pairs of queues that a network device can have.
    #[error(
        "queues {count} is out of range: {} to {}",
        QueuePairs::MIN,
        QueuePairs::MAX
    )]
    QueuePairs {
        /// What was given.
        count: i64,
    },
    /// Two network devices use the same interface.
    #[error("tap interface '{tap}' is given twice: give each network device one of its own")]
    RepeatedTap {
        /// The interface.
        tap: InterfaceName,
    },
    /// Not a description of a balloon.
    #[error(
        "{reason}; a balloon is size=SIZE[,deflate-on-oom=on][,reporting=on][,hinting=on][,statistics=SECONDS]"
    )]
    BalloonOption {
        /// What is wrong with it.
        reason: String,
    },
    /// Not a size that a balloon can have.
    #[error("invalid balloon size '{text}': expected whole MiB, such as 64M or 0")]
    BalloonSize {
        /// What was given.
        text: String,
    },
    /// Not an interval that statistics can have.
    #[error("invalid interval of statistics {seconds}: expected seconds, or 0 for none")]
    StatisticsInterval {
        /// What was given.
        seconds: i64,
    },
    /// A balloon gives back pages of 4 KiB, but guest memory consists of huge pages.
    #[error(
        "a balloon gives back pages of 4 KiB, and memory of huge pages has none: leave out one of them, \
         or use transparent huge pages"
    )]
    BalloonOfHugePages,
    /// The guest is to give up more memory than it has.
    #[error(
        "a balloon of {size} does not fit into the {memory} of guest memory: give it a smaller size"
    )]
    BalloonTooLarge {
        /// Size of the balloon.
        size: BalloonSize,
        /// Guest memory.
        memory: MemorySize,
    },
    /// A limit of the machine's control group is out of range.
    #[error("{key} of [cgroup] is {value}: expected {least} to {most}")]
    CgroupRange {
        /// The key.
        key: &'static str,
        /// Its value.
        value: u64,
        /// The least value.
        least: u64,
        /// The largest value.
        most: u64,
    },
    /// A period of the machine's control group has no quota.
    #[error("cpu-period of [cgroup] needs a cpu-quota: add that, or remove the period")]
    CgroupPeriod,
    /// Not a description of a socket device.
    #[error("{reason}; a socket device is cid=N,socket=PATH")]
    VsockOption {
        /// What is wrong with it.
        reason: String,
    },
    /// Not a description of SMBIOS tables.
    #[error(
        "{reason}; SMBIOS tables are KEY=VALUE,... with manufacturer, product, version, serial, uuid, sku, family and asset-tag"
    )]
    SmbiosOption {
        /// What is wrong with it.
        reason: String,
    },
    /// Not a text that an SMBIOS table can have.
    #[error("'{text}' cannot be in an SMBIOS table: use 1 to 64 printable ASCII characters")]
    SmbiosText {
        /// What was given.
        text: String,
    },
    /// Not a UUID.
    #[error("'{text}' is not a UUID such as 123e4567-e89b-12d3-a456-426614174000")]
    Uuid {
        /// What was given.
        text: String,
    },
    /// Not a context identifier that a guest can have.
    #[error("cid {cid} is out of range: {MIN_GUEST_CID} to {MAX_GUEST_CID}")]
    GuestCid {
        /// What was given.
        cid: i64,
    },
    /// The path of a socket device's socket is too long to add the suffix of a port.
    #[error(
        "socket path '{}' is too long: at most {} bytes, as the guest's connections to port N lead \
         to PATH_N",
        path.display(), VsockConfig::MAX_PATH_SIZE
    )]
    VsockPath {
        /// The path.
        path: PathBuf,
    },
    /// Metadata is to be served over no network device, so that no guest could reach it.
    #[error("metadata is served over no network device: name one")]
    MetadataWithoutNet,
    /// Metadata is to be served over a network device that does not exist.
    #[error("cannot serve metadata over '{name}': the machine has no network device of that name")]
    MetadataNet {
        /// Which device was named.
        name: DeviceName,
    },
    /// Not something that a serial port or console can lead to.
    #[error("invalid end '{text}': expected stdio, pty, file=PATH, socket=PATH or none")]
    Serial {
        /// What was given.
        text: String,
    },
    /// Not a place where gdb can connect.
    #[error(
        "invalid place for gdb '{text}': expected tcp:ADDRESS:PORT, such as tcp:127.0.0.1:1234, or unix:PATH"
    )]
    Gdb {
        /// What was given.
        text: String,
    },
    /// Not a description of a channel.
    #[error("{reason}; a channel is name=NAME and one of socket=PATH, file=PATH, pty and stdio")]
    ChannelOption {
        /// What is wrong with it.
        reason: String,
    },
    /// Not the name of a channel.
    #[error(
        "invalid channel name '{}': expected 1 to {} letters, digits and '.', '-', '_'",
        text.escape_debug(), ChannelName::MAX_SIZE
    )]
    ChannelName {
        /// What was given.
        text: String,
    },
    /// A channel that does not lead to exactly one place.
    #[error("channel '{name}' leads to none or several of socket, file, pty and stdio: name one")]
    ChannelEnd {
        /// The channel.
        name: ChannelName,
    },
    /// More channels than a machine can have.
    #[error("too many channels: {count}, but a machine has room for {MAX_CHANNELS}")]
    TooManyChannels {
        /// How many there are.
        count: usize,
    },
    /// Two channels have the same name.
    #[error("channel '{name}' is given twice: give each channel a name of its own")]
    RepeatedChannel {
        /// The name.
        name: ChannelName,
    },
    /// Two byte streams lead to standard input and output, which they cannot share.
    #[error(
        "both {first} and {second} lead to standard input and output: give one of them another end"
    )]
    RepeatedStdio {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// Two byte streams, or one and the socket device, lead to the same file or socket, which they cannot
    /// share.
    #[error("{stream} leads to '{}', and so does another: give each an end of its own", path.display())]
    RepeatedEnd {
        /// One of them.
        stream: String,
        /// The file or socket.
        path: PathBuf,
    },
    /// Not a boot protocol.
    #[error("invalid boot protocol '{text}': expected auto, pvh or linux64")]
    BootProtocol {
        /// What was given.
        text: String,
    },
    /// Not an action on reboot.
    #[error("invalid action on reboot '{text}': expected exit or restart")]
    OnReboot {
        /// What was given.
        text: String,
    },
    /// Not an action on halt.
    #[error("invalid action on halt '{text}': expected wait or exit")]
    OnHalt {
        /// What was given.
        text: String,
    },
    /// Not a meaning of the exit status.
    #[error("invalid meaning of the exit status '{text}': expected guest or monitor")]
    ExitStatus {
        /// What was given.
        text: String,
    },
    /// Not an answer to calls that a filter refuses.
    #[error("invalid filter of system calls '{text}': expected kill, log or off")]
    Seccomp {
        /// What was given.
        text: String,
    },
    /// Not a time that a guest may take to shut down.
    #[error(
        "invalid time '{text}' to shut down: expected a number of seconds, or one with a unit (500ms, \
         10s, 2m), up to an hour"
    )]
    ShutdownTimeout {
        /// What was given.
        text: String,
    },
    /// There are more devices than a machine has interrupts for.
    #[error(
        "too many devices: {count} disks, network devices and others, but a machine has room for \
         {MAX_VIRTIO_DEVICES}"
    )]
    TooManyDevices {
        /// How many there are.
        count: usize,
    },
}
