//! Tap interfaces: the host's end of a guest's network card.

mod adopted;
mod error;
mod interface;
mod link;
mod station;

use std::ffi::{c_char, c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use bantam_storage::patiently;
use libc::ifreq;
use nix::errno::Errno;

pub use error::TapError;
use error::{attach_error, control_error};
use interface::{Interface, TemporaryMtu};

/// The device that makes taps.
const CONTROL_DEVICE: &str = "/dev/net/tun";

/// Size in bytes of the header before each packet: `struct virtio_net_hdr` with its `num_buffers` (virtio
/// 1.3, section 5.1.6).
pub const PACKET_HEADER_SIZE: usize = 12;

/// Most packets that [`Tap::discard_queued`] throws away, so that a flood does not keep it busy for ever. A
/// tap queues 1000 unless its administrator says otherwise.
const MAX_DISCARDED_PACKETS: usize = 4096;

mod request {
    //! Requests to a tap (`linux/if_tun.h`). Their numbers encode a size other than that of their argument,
    //! so nix's "bad" forms are the right ones.
    use super::{c_int, ifreq};

    nix::ioctl_write_ptr_bad!(attach, libc::TUNSETIFF, ifreq);
    nix::ioctl_read_bad!(get_flags, libc::TUNGETIFF, ifreq);
    nix::ioctl_write_int_bad!(set_offloads, libc::TUNSETOFFLOAD);
    nix::ioctl_write_int_bad!(set_owner, libc::TUNSETOWNER);
    nix::ioctl_write_ptr_bad!(set_filter, libc::TUNSETTXFILTER, u8);
    nix::ioctl_write_ptr_bad!(set_queue, libc::TUNSETQUEUE, ifreq);
    nix::ioctl_read_bad!(get_header_size, libc::TUNGETVNETHDRSZ, c_int);
    nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, c_int);
}

/// Work on packets that their reader does in place of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// It takes packets whose checksum is not complete. The other offloads require this one.
    pub checksum: bool,
    /// It takes TCP segments over IPv4 that are larger than the MTU.
    pub tcp4_segmentation: bool,
    /// It takes TCP segments over IPv6 that are larger than the MTU.
    pub tcp6_segmentation: bool,
    /// Such TCP segments may carry explicit congestion notification.
    pub ecn: bool,
    /// It takes several UDP datagrams, over IPv4 or IPv6, as one packet that is larger than the MTU.
    pub udp_segmentation: bool,
}

impl Offloads {
    /// Returns the `TUN_F_*` bits. The host refuses bits whose prerequisites are missing.
    fn bits(self) -> libc::c_uint {
        if !self.checksum {
            return 0;
        }
        let tcp = self.tcp4_segmentation || self.tcp6_segmentation;
        [
            (true, libc::TUN_F_CSUM),
            (self.tcp4_segmentation, libc::TUN_F_TSO4),
            (self.tcp6_segmentation, libc::TUN_F_TSO6),
            (tcp && self.ecn, libc::TUN_F_TSO_ECN),
            (self.udp_segmentation, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ]
        .into_iter()
        .filter_map(|(wanted, bits)| wanted.then_some(bits))
        .sum()
    }
}

/// Selects the frames that the host hands out by their destination address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameFilter {
    /// Every frame.
    All,
    /// Frames to one of `addresses`, and with `all_multicast` those to any group. The host filters up to
    /// eight addresses exactly; with more it also hands out frames that were not asked for.
    Only {
        /// Addresses of interfaces and groups, and the broadcast address if it is wanted.
        addresses: Vec<[u8; 6]>,
        /// Whether to hand out frames to any group.
        all_multicast: bool,
    },
}

/// How many queues a tap is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueCount {
    /// This many; otherwise it is an error.
    Exactly(usize),
    /// This many, or one if the tap was made with a single queue.
    AtMost(usize),
}

impl QueueCount {
    /// Returns the largest number.
    pub fn get(self) -> usize {
        let (QueueCount::Exactly(count) | QueueCount::AtMost(count)) = self;
        count
    }
}

/// One queue of a tap. Each read takes one packet that the host sent to the interface, and each write sends
/// one to the host, preceded by a header of [`PACKET_HEADER_SIZE`] bytes. Neither blocks.
#[derive(Debug)]
pub struct TapQueue(File);

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An open tap.
///
/// The host spreads the packets that it sends over the queues in use. Those of one connection go to the queue
/// on which that connection last sent a packet. At first only the first queue is in use; the others neither
/// deliver nor take packets.
#[derive(Debug)]
pub struct Tap {
    /// At least one.
    queues: Vec<TapQueue>,
    queues_in_use: AtomicUsize,
    name: String,
    created: bool,
    offloads: Offloads,
    /// The header size in bytes that an existing tap had before.
    found_header_size: Option<c_int>,
    /// The MTU that was set, if it differed from the tap's own.
    temporary_mtu: Option<TemporaryMtu>,
    /// Whether it can be told which frames to hand out, which a tap beside another interface cannot.
    selects_frames: bool,
}

impl Tap {
    /// Attaches to the tap called `name`, which is created and brought up if it does not exist. Waits a
    /// quarter of a second for a tap that is in use.
    ///
    /// An existing tap stays up or down as its administrator set it. If `mtu` is given, in bytes, it is set
    /// on either kind of tap; on an existing one until this value is dropped.
    ///
    /// # Errors
    /// If the host has no taps, the name is not that of a free tap, it does not have the queues that are
    /// asked for, or this user may not do it.
    pub fn open(name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError> {
        check_name(name)?;
        let is_busy = |error: &TapError| matches!(error, TapError::InUse { .. });
        patiently(is_busy, || {
            let first = open_control_device().map_err(|source| control_error(name, source))?;
            Tap::attach(first, name, mtu, queues)
        })
    }

    /// Does the work of [`Tap::open`] with `first` as the control device.
    fn attach(
        first: File,
        name: &str,
        mtu: Option<u16>,
        queues: QueueCount,
    ) -> Result<Tap, TapError> {
        // The kernel gives a tap with a single queue to one user only, but one with many queues to any number
        // of users, and hands some packets to each. So check before taking packets from another user, and
        // once more afterwards, as two users may have checked at once.
        if attached_queues(name)? > 0 {
            return Err(TapError::InUse {
                name: name.to_string(),
            });
        }
        let has_many_queues = attach_first_queue(&first, name, queues.get() > 1)?;
        let count = match queues {
            QueueCount::Exactly(count) if count > 1 && !has_many_queues => {
                return Err(TapError::SingleQueue {
                    name: name.to_string(),
                    queues: count,
                });
            }
            _ if !has_many_queues => 1,
            queues => queues.get(),
        };
        if attached_queues(name)? > 1 {
            return Err(TapError::InUse {
                name: name.to_string(),
            });
        }
        let mut tap = Tap::of(first, name);
        tap.created = !tap.is_persistent()?;
        if !tap.created {
            let found = tap.header_size();
            tap.found_header_size =
                Some(found.map_err(|errno| tap.io_error("read the header size of", errno))?);
        }
        tap.set_header_size(PACKET_HEADER_SIZE as c_int)
            .map_err(|errno| tap.io_error("set the header size of", errno))?;
        for _ in 1..count {
            let queue = open_control_device().map_err(|source| control_error(name, source))?;
            attach_queue(&queue, name, true).map_err(|errno| attach_error(name, errno))?;
            set_queue_in_use(&queue, false)
                .map_err(|errno| tap.io_error("set aside a queue of", errno))?;
            tap.queues.push(TapQueue(queue));
        }
        tap.offloads = tap.probe_offloads();
        // This also undoes what the last user of an existing tap may have left.
        tap.forget_driver().map_err(|source| TapError::Io {
            name: name.to_string(),
            action: "set the offloads of",
            source,
        })?;
        if let Some(mtu) = mtu {
            tap.temporary_mtu = Interface::new(name)?.set_mtu_temporarily(mtu)?;
        }
        if tap.created {
            tap.keep_from_others()?;
            Interface::new(name)?.bring_up()?;
        }
        Ok(tap)
    }

    /// Returns the interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether [`Tap::open`] has created the interface. If so, it vanishes with this value.
    pub fn created(&self) -> bool {
        self.created
    }

    /// Returns all queues, including those not in use; at least one.
    pub fn queues(&self) -> &[TapQueue] {
        &self.queues
    }

    /// Returns the offloads that the host supports.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Uses the first `count` queues from now on. Packets in the others are lost.
    ///
    /// # Errors
    /// Those of the `TUNSETQUEUE` request: the tap is gone. Further queues may then be in use already.
    pub fn use_queues(&self, count: usize) -> io::Result<()> {
        let present = self.queues_in_use.load(Ordering::Relaxed);
        for (index, queue) in self.queues.iter().enumerate().skip(1) {
            if (index < present) != (index < count) {
                set_queue_in_use(&queue.0, index < count)?;
            }
        }
        self.queues_in_use.store(count, Ordering::Relaxed);
        Ok(())
    }

    /// Makes a tap of its first queue, as one that exists already and on which nothing is set yet.
    fn of(first: File, name: &str) -> Tap {
        Tap {
            queues: vec![TapQueue(first)],
            queues_in_use: AtomicUsize::new(1),
            name: name.to_string(),
            created: false,
            offloads: Offloads::default(),
            found_header_size: None,
            temporary_mtu: None,
            selects_frames: true,
        }
    }

    /// Sets which work on packets the host may leave to the reader from now on.
    ///
    /// # Errors
    /// Those of the `TUNSETOFFLOAD` request: the host does not support them, or the tap is gone.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: the request takes its argument by value.
        unsafe { request::set_offloads(self.control(), offloads.bits() as c_int) }?;
        Ok(())
    }

    /// Sets which frames the host hands out from now on, for as long as the tap exists. A tap beside another interface
    /// hands out those that are addressed to it in any case.
    ///
    /// # Errors
    /// Those of the `TUNSETTXFILTER` request: the tap is gone.
    pub fn set_filter(&self, filter: &FrameFilter) -> io::Result<()> {
        if !self.selects_frames {
            return Ok(());
        }
        let filter = encode_filter(filter);
        // SAFETY: the request reads a struct tun_filter and, after it, the number of addresses that its count
        // states. `filter` consists of exactly these.
        unsafe { request::set_filter(self.control(), filter.as_ptr()) }?;
        Ok(())
    }

    /// Undoes all settings made on behalf of a driver: no work is left to the reader, every frame is handed
    /// out, and only the first queue is in use.
    ///
    /// # Errors
    /// If the tap is gone.
    pub fn forget_driver(&self) -> io::Result<()> {
        self.set_offloads(Offloads::default())?;
        self.set_filter(&FrameFilter::All)?;
        self.use_queues(1)
    }

    /// Returns the queue through which requests to the tap as a whole are made.
    fn control(&self) -> RawFd {
        self.queues[0].as_raw_fd()
    }

    fn probe_offloads(&self) -> Offloads {
        let mut known = Offloads::default();
        let with: [fn(&mut Offloads); 5] = [
            |offloads| offloads.checksum = true,
            |offloads| offloads.tcp4_segmentation = true,
            |offloads| offloads.tcp6_segmentation = true,
            |offloads| offloads.ecn = true,
            |offloads| offloads.udp_segmentation = true,
        ];
        for add in with {
            let mut wanted = known;
            add(&mut wanted);
            if self.set_offloads(wanted).is_ok() {
                known = wanted;
            }
        }
        known
    }

    /// Throws away the packets in the first queue.
    pub fn discard_queued(&self) {
        // Reading only a packet's header removes the whole packet.
        let mut header = [0; PACKET_HEADER_SIZE];
        for _ in 0..MAX_DISCARDED_PACKETS {
            if !matches!((&self.queues[0].0).read(&mut header), Ok(1..)) {
                break;
            }
        }
    }

    /// Makes the tap this user's: any user can attach to further queues of one that has no owner.
    fn keep_from_others(&self) -> Result<(), TapError> {
        let owner = nix::unistd::geteuid().as_raw();
        // SAFETY: the request takes its argument by value.
        let done = unsafe { request::set_owner(self.control(), owner as c_int) };
        done.map(drop)
            .map_err(|errno| self.io_error("set the owner of", errno))
    }

    fn is_persistent(&self) -> Result<bool, TapError> {
        let mut answer = interface_request(&self.name);
        // SAFETY: the request writes an ifreq to the place it is given.
        unsafe { request::get_flags(self.control(), &mut answer) }
            .map_err(|errno| self.io_error("examine", errno))?;
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        let flags = unsafe { answer.ifr_ifru.ifru_flags };
        Ok(c_int::from(flags) & libc::IFF_PERSIST != 0)
    }

    fn header_size(&self) -> Result<c_int, Errno> {
        let mut size = 0;
        // SAFETY: the request writes an int to the place it is given.
        unsafe { request::get_header_size(self.control(), &mut size) }?;
        Ok(size)
    }

    fn set_header_size(&self, size: c_int) -> Result<(), Errno> {
        set_header_size(self.control(), size)
    }

    fn io_error(&self, action: &'static str, errno: Errno) -> TapError {
        TapError::Io {
            name: self.name.clone(),
            action,
            source: errno.into(),
        }
    }
}

/// An existing tap gets its settings back before another program can attach to it: that program may rely on
/// the usual header size.
impl Drop for Tap {
    fn drop(&mut self) {
        self.temporary_mtu = None;
        let Some(size) = self.found_header_size else {
            return;
        };
        match self.set_header_size(size) {
            // The tap has been removed.
            Ok(()) | Err(Errno::EBADFD) => {}
            Err(errno) => tracing::warn!("{}", self.io_error("set back the header size of", errno)),
        }
    }
}

/// A stand-in for a tap: any descriptor that preserves packet boundaries.
#[cfg(test)]
impl From<std::os::fd::OwnedFd> for Tap {
    fn from(socket: std::os::fd::OwnedFd) -> Tap {
        Tap::of(File::from(socket), "stand-in")
    }
}

fn open_control_device() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CONTROL_DEVICE)
}

/// Makes `file` the first queue of the tap called `name`, and returns whether the tap may have more. A new
/// tap may if `many` are wanted; an existing one is as it was made.
fn attach_first_queue(file: &File, name: &str, many: bool) -> Result<bool, TapError> {
    for many in [many, !many] {
        match attach_queue(file, name, many) {
            Ok(()) => return Ok(many),
            // The tap was made the other way.
            Err(Errno::EINVAL) => {}
            Err(errno) => return Err(attach_error(name, errno)),
        }
    }
    Err(attach_error(name, Errno::EINVAL))
}

fn attach_queue(file: &File, name: &str, is_one_of_many: bool) -> Result<(), Errno> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if is_one_of_many {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut attachment = interface_request(name);
    attachment.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request reads an ifreq and writes the name back to it; it is our own.
    unsafe { request::attach(file.as_raw_fd(), &attachment) }?;
    Ok(())
}

fn set_header_size(queue: RawFd, size: c_int) -> Result<(), Errno> {
    // SAFETY: the request reads an int from the place it is given.
    unsafe { request::set_header_size(queue, &size) }?;
    Ok(())
}

fn set_queue_in_use(queue: &File, in_use: bool) -> Result<(), Errno> {
    let mut change = interface_request("");
    let flag = if in_use {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    change.ifr_ifru.ifru_flags = flag as c_short;
    // SAFETY: the request reads an ifreq from the place it is given.
    unsafe { request::set_queue(queue.as_raw_fd(), &change) }?;
    Ok(())
}

/// Returns how many queues of the tap called `name` are attached, as far as the kernel counts them: it does
/// not count the queue of a tap with a single queue.
fn attached_queues(name: &str) -> Result<u32, TapError> {
    let count = link::attached_queues(name).map_err(|source| TapError::Io {
        name: name.to_string(),
        action: "find out who uses",
        source,
    })?;
    Ok(count.unwrap_or(0))
}

/// Encodes a `struct tun_filter`: flags, the number of addresses, and the addresses.
fn encode_filter(filter: &FrameFilter) -> Vec<u8> {
    let (addresses, all_multicast) = match filter {
        // A filter without addresses lets everything pass.
        FrameFilter::All => (&[][..], false),
        FrameFilter::Only {
            addresses,
            all_multicast,
        } => (&addresses[..], *all_multicast),
    };
    // No frame is sent to the all-zero address, so a filter with only this address lets none pass.
    let addresses = if addresses.is_empty() && *filter != FrameFilter::All {
        &[[0; 6]]
    } else {
        addresses
    };
    let addresses = &addresses[..addresses.len().min(u16::MAX.into())];
    let flags = if all_multicast {
        libc::TUN_FLT_ALLMULTI as u16
    } else {
        0
    };
    let count = addresses.len() as u16;
    [
        &flags.to_ne_bytes(),
        &count.to_ne_bytes(),
        addresses.as_flattened(),
    ]
    .concat()
}

/// Checks a name as the host does, and refuses '%', with which the host would choose a name itself.
fn check_name(name: &str) -> Result<(), TapError> {
    let reason = if name.is_empty() {
        "an interface has a name"
    } else if name.len() >= libc::IFNAMSIZ {
        "an interface's name has at most 15 bytes"
    } else if name == "." || name == ".." {
        "an interface cannot be called so"
    } else if name.bytes().any(|byte| {
        matches!(byte, b'/' | b':' | b'%') || byte.is_ascii_whitespace() || byte.is_ascii_control()
    }) {
        "an interface's name has no '/', ':', '%' or white space"
    } else {
        return Ok(());
    };
    let name = name.to_string();
    Err(TapError::Name { name, reason })
}

/// Returns the name in a request.
fn interface_name(request: &ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|&byte| byte as u8);
    let name: Vec<u8> = bytes.take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&name).into_owned()
}

/// Makes a request about the interface called `name`. A name that is too long is cut.
fn interface_request(name: &str) -> ifreq {
    // SAFETY: it consists of integers and pointers, all of which may be zero.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let room = libc::IFNAMSIZ - 1;
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *target = byte as c_char;
    }
    request
}

#[cfg(test)]
mod tests;
