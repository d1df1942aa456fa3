//! A device under attack: how to prepare it for an attack, how it reacts, and whether it works
//! afterwards.

use alloc::boxed::Box;
use alloc::format;
use core::fmt;
use core::time::Duration;
use runtime::time::{self, Deadline};
use runtime::virtio::balloon::{Balloon, PAGE_SIZE};
use runtime::virtio::block::{Block, RequestHeader, RequestType, SECTOR_SIZE, STATUS_OK};
use runtime::virtio::console::{Channels, Console, console_feature};
use runtime::virtio::net::{HEADER_SIZE, Header, Net};
use runtime::virtio::queue::{DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor};
use runtime::virtio::rng::Rng;
use runtime::virtio::vsock::Vsock;
use runtime::virtio::{Completion, Error, MmioDevice, SplitQueue, Transport, device_id, feature};
use runtime::{arguments, heap, report};

use crate::balloon::Page;

pub const QUEUE_SIZE: u16 = 16;
/// The transmit queue of the network card, the socket device and a console.
const TRANSMIT_QUEUE: u16 = 1;
/// A port of the host to which nothing listens.
const UNUSED_PORT: u32 = 1;
/// A spoilt request there costs no memory.
const BALLOON_DEFLATE_QUEUE: u16 = 1;
const FRAME_SIZE: usize = 60;
/// How long a device may take to react to an attack.
const REACTION_TIMEOUT: Duration = Duration::from_millis(500);
const STATUS_INTERVAL: Duration = Duration::from_micros(200);

/// A device to attack.
pub struct Target {
    pub device: MmioDevice,
    pub id: u32,
}

/// The reaction of a device to an attack.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// It asked for a reset.
    NeedsReset,
    /// It refused, in a way that is visible before it was live.
    Refused,
    /// It returned the request as failed, or of a kind that cannot fail.
    Failed,
    /// It returned the request as if it were valid.
    Done,
    /// Nothing.
    Silent,
    /// It went on as if it had not been attacked, which is correct for a mere nuisance.
    Unimpressed,
    /// A valid request right after a mere nuisance did not work.
    Disturbed,
    /// It wrote to memory that its reset had given back to the driver.
    WroteAfterReset,
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NeedsReset => "it needs a reset",
            Self::Refused => "it refused",
            Self::Failed => "the request failed",
            Self::Done => "the request was done",
            Self::Silent => "nothing happened",
            Self::Unimpressed => "it went on",
            Self::Disturbed => "a valid request after it did not work",
            Self::WroteAfterReset => "it wrote to memory after its reset",
        })
    }
}

/// The correct reaction of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// To notice: it needs a reset, refuses, or fails the request.
    Notice,
    /// Anything, as long as a reset brings it back.
    Anything,
}

impl Target {
    pub fn new(device: MmioDevice) -> Self {
        Self {
            device,
            id: device.device_id(),
        }
    }

    /// The queue whose requests the device answers by itself.
    pub fn request_queue(&self) -> Option<u16> {
        match self.id {
            device_id::RNG | device_id::BLOCK => Some(0),
            device_id::NET | device_id::VSOCK | device_id::CONSOLE => Some(TRANSMIT_QUEUE),
            device_id::BALLOON => Some(BALLOON_DEFLATE_QUEUE),
            _ => None,
        }
    }

    /// Initialises the device from the beginning and lets it execute a valid request.
    pub fn works(&self) -> Result<(), Error> {
        match self.id {
            device_id::RNG => {
                let mut bytes = [0; 16];
                match Rng::open(self.device, QUEUE_SIZE)?.read(&mut bytes, Completion::Polled)? {
                    0 => Err(Error::WrongLength(0)),
                    _ => Ok(()),
                }
            }
            device_id::BLOCK => {
                let mut sector = [0; SECTOR_SIZE];
                Block::open(self.device, QUEUE_SIZE)?.read(0, &mut sector, Completion::Polled)
            }
            device_id::NET => {
                let mut frame = [0; FRAME_SIZE];
                frame[..6].fill(0xff);
                let mut net = Net::open(self.device, QUEUE_SIZE, 0)?;
                net.send(Header::default(), &frame, Completion::Polled)
            }
            device_id::BALLOON => {
                let mut balloon = Balloon::open(self.device, QUEUE_SIZE)?;
                let page = Page::new();
                balloon.inflate(&[page.number()])?;
                if !page.is_zero() {
                    return Err(Error::WrongLength(0));
                }
                balloon.deflate(&[page.number()])
            }
            device_id::CONSOLE
                if self.device.offered_features() & console_feature::MULTIPORT != 0 =>
            {
                let mut channels = Channels::open(self.device, QUEUE_SIZE)?;
                channels.open_all()?;
                channels.ports[1].send(&self.device, b"text")
            }
            device_id::CONSOLE => {
                let mut console = Console::open(self.device, QUEUE_SIZE)?;
                console.port.send(&self.device, b"text")
            }
            device_id::VSOCK => Vsock::open(self.device, QUEUE_SIZE)?.is_refused(UNUSED_PORT),
            _ => {
                let features = self.device.initialise(0)?;
                let mut index = 0;
                while self.device.queue_size_max(index) != 0 {
                    self.device.set_up_queue(index, QUEUE_SIZE, features)?;
                    index += 1;
                }
                self.device.set_driver_ok();
                if self.device.needs_reset() {
                    Err(Error::NeedsReset)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// Runs one attack and reports the result: `attack` returns the device's reaction, or why it
    /// could not be tried.
    pub fn check(
        &self,
        name: impl fmt::Display,
        expected: Expected,
        attack: impl FnOnce() -> Result<Outcome, Error>,
    ) {
        let name = format!(
            "device {} at {:#x}: {name}",
            self.id,
            self.device.window().address
        );
        // SAFETY: the device is reset before the memory it was given is taken back, and what
        // comes out has no memory of its own.
        let (outcome, recovered) = unsafe {
            heap::reclaim_after(|| {
                let outcome = attack();
                let recovered = self.device.reset().and_then(|()| self.works());
                (outcome, recovered.and_then(|()| self.device.reset()))
            })
        };
        match (outcome, recovered) {
            (Ok(outcome), Err(error)) => {
                report::fail(name, format!("{outcome}, and after a reset: {error}"));
            }
            (Err(error), _) => report::fail(name, format!("the attack did not begin: {error}")),
            (Ok(outcome @ (Outcome::Disturbed | Outcome::WroteAfterReset)), Ok(())) => {
                report::fail(name, outcome);
            }
            (Ok(outcome @ (Outcome::Done | Outcome::Silent)), Ok(()))
                if expected == Expected::Notice && !arguments::flag("lenient") =>
            {
                report::fail(name, outcome);
            }
            (Ok(outcome), Ok(())) => report::ok(format!("{name} ({outcome})")),
        }
    }

    /// Runs an attack that must not disturb a valid request that follows without a reset.
    pub fn check_undisturbed(
        &self,
        name: &str,
        attack: impl FnOnce(&mut Session) -> Result<(), Error>,
    ) {
        self.check(name, Expected::Notice, || {
            let mut session = Session::open(self)?;
            attack(&mut session)?;
            session.lay_out();
            session.submit(0);
            Ok(match session.wait() {
                Outcome::Done => Outcome::Unimpressed,
                // The only end of a request there.
                Outcome::Failed
                    if matches!(
                        self.id,
                        device_id::NET | device_id::VSOCK | device_id::BALLOON | device_id::CONSOLE
                    ) =>
                {
                    Outcome::Unimpressed
                }
                _ => Outcome::Disturbed,
            })
        });
    }
}

/// The memory of a valid request.
#[repr(C, align(64))]
pub struct Request {
    header: RequestHeader,
    status: u8,
    data: [u8; SECTOR_SIZE],
    frame: [u8; HEADER_SIZE + FRAME_SIZE],
    page: u32,
}

/// A live device with a queue in which every word can be written.
pub struct Session {
    pub device: MmioDevice,
    pub queue: SplitQueue,
    pub features: u64,
    id: u32,
    request: Box<Request>,
}

impl Session {
    /// Brings the device up to `DRIVER_OK` with its request queue.
    pub fn open(target: &Target) -> Result<Self, Error> {
        let session = Self::prepare(target)?;
        session.device.attach_queue(&session.queue);
        session.device.set_driver_ok();
        Ok(session)
    }

    /// Initialises the device up to the set-up of its queue, which is left to the caller.
    pub fn prepare(target: &Target) -> Result<Self, Error> {
        let index = target.request_queue().unwrap_or(0);
        let features = target.device.initialise(feature::INDIRECT_DESCRIPTORS)?;
        let max = target.device.queue_size_max(index);
        let size = u32::from(QUEUE_SIZE).min(max) as u16;
        if size == 0 {
            return Err(Error::QueueTooSmall(max));
        }
        let mut frame = [0; HEADER_SIZE + FRAME_SIZE];
        frame[HEADER_SIZE..HEADER_SIZE + 6].fill(0xff);
        Ok(Self {
            device: target.device,
            queue: SplitQueue::new(index, size, false),
            features,
            id: target.id,
            request: Box::new(Request {
                header: RequestHeader {
                    kind: RequestType::Read as u32,
                    reserved: 0,
                    sector: 0,
                },
                status: 0xff,
                data: [0; SECTOR_SIZE],
                frame,
                page: (end_of_low_ram() / PAGE_SIZE) as u32 - 1,
            }),
        })
    }

    /// Another queue of the same index and size.
    pub fn other_queue(&self) -> SplitQueue {
        SplitQueue::new(self.queue.index(), self.queue.size(), false)
    }

    /// The descriptors of a valid request, not linked.
    pub fn valid_request(&mut self) -> ([Descriptor; 3], u16) {
        let describe = |address: u64, length: usize, flags| Descriptor {
            address,
            length: length as u32,
            flags,
            next: 0,
        };
        let data = describe(
            &raw mut self.request.data as u64,
            SECTOR_SIZE,
            DESCRIPTOR_WRITE,
        );
        match self.id {
            device_id::BLOCK => {
                let header = describe(
                    &raw const self.request.header as u64,
                    size_of::<RequestHeader>(),
                    0,
                );
                let status = describe(&raw mut self.request.status as u64, 1, DESCRIPTOR_WRITE);
                ([header, data, status], 3)
            }
            // To the socket device, it is a packet of an unknown connection, and to a console
            // output.
            device_id::NET | device_id::VSOCK | device_id::CONSOLE => {
                let size = self.request.frame.len();
                let frame = describe(&raw const self.request.frame as u64, size, 0);
                ([frame, Descriptor::default(), Descriptor::default()], 1)
            }
            device_id::BALLOON => {
                let page = describe(&raw const self.request.page as u64, size_of::<u32>(), 0);
                ([page, Descriptor::default(), Descriptor::default()], 1)
            }
            _ => ([data, Descriptor::default(), Descriptor::default()], 1),
        }
    }

    /// Writes a valid request to the descriptors from 0, and returns how many it takes.
    pub fn lay_out(&mut self) -> u16 {
        let (descriptors, count) = self.valid_request();
        for index in 0..count {
            let mut descriptor = descriptors[usize::from(index)];
            if index + 1 < count {
                descriptor.flags |= DESCRIPTOR_NEXT;
                descriptor.next = index + 1;
            }
            self.queue.set_descriptor(index, descriptor);
        }
        count
    }

    /// Changes a descriptor of the queue.
    pub fn change(&mut self, index: u16, change: impl FnOnce(&mut Descriptor)) {
        let mut descriptor = self.queue.descriptor(index);
        change(&mut descriptor);
        self.queue.set_descriptor(index, descriptor);
    }

    /// Makes the chain at `head` available, unchecked, and rings the doorbell.
    pub fn submit(&mut self, head: u16) {
        self.queue.make_available(head);
        self.notify();
    }

    /// Rings the doorbell.
    pub fn notify(&self) {
        self.device.notify(u32::from(self.queue.index()));
    }

    /// Waits for the device's reaction to the submitted chain.
    pub fn wait(&mut self) -> Outcome {
        let deadline = Deadline::after(REACTION_TIMEOUT);
        while !deadline.passed() {
            if self.device.needs_reset() {
                return Outcome::NeedsReset;
            }
            if self.queue.has_used() {
                return self.judge();
            }
            time::delay(STATUS_INTERVAL);
        }
        Outcome::Silent
    }

    fn judge(&mut self) -> Outcome {
        let written = self
            .queue
            .take_used_element()
            .map_or(0, |(_, length)| length);
        // SAFETY: a byte of the request, which the device wrote behind the compiler's back.
        let status = unsafe { (&raw const self.request.status).read_volatile() };
        match self.id {
            device_id::BLOCK if status == STATUS_OK => Outcome::Done,
            device_id::RNG if written != 0 => Outcome::Done,
            // A frame, a packet or output can only be dropped, and a page only taken back.
            _ => Outcome::Failed,
        }
    }

    /// Clears the memory that the device writes.
    pub fn clear_data(&mut self) {
        // SAFETY: bytes of the request.
        unsafe {
            (&raw mut self.request.data).write_volatile([0; SECTOR_SIZE]);
            (&raw mut self.request.status).write_volatile(0xff);
        }
    }

    /// Returns whether nothing was written since [`clear_data`](Self::clear_data).
    pub fn data_is_clear(&self) -> bool {
        // SAFETY: bytes of the request.
        let (data, status) = unsafe {
            (
                (&raw const self.request.data).read_volatile(),
                (&raw const self.request.status).read_volatile(),
            )
        };
        data == [0; SECTOR_SIZE] && status == 0xff
    }
}

/// Waits for the device's reaction to a chain in a queue.
pub fn wait_for_reaction(device: &MmioDevice, queue: &SplitQueue) -> Outcome {
    let deadline = Deadline::after(REACTION_TIMEOUT);
    while !deadline.passed() {
        if device.needs_reset() {
            return Outcome::NeedsReset;
        }
        if queue.has_used() {
            return Outcome::Done;
        }
        time::delay(STATUS_INTERVAL);
    }
    Outcome::Silent
}

/// Bytes beyond the RAM below 4 GiB.
pub fn end_of_low_ram() -> u64 {
    runtime::BootInfo::get()
        .ram()
        .map(|range| range.end())
        .filter(|&end| end <= 1 << 32)
        .max()
        .unwrap_or(1 << 20)
}
