//! A stream socket as the host's side of a card: the protocol of passt, gvproxy and QEMU, in which each frame
//! follows its size.

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard};

use bantam_memory::GuestBuffers;
use nix::sys::socket::{MsgFlags, send};

use super::MAX_PACKET_SIZE;
use super::backend::{NetBackend, NetQueue, PacketBuffer};
use crate::lock::lock;
use crate::tap::{FrameFilter, Offloads, PACKET_HEADER_SIZE};

/// Bytes of the number, the most significant first, that says how large a frame is.
const SIZE_SIZE: usize = 4;
/// The smallest and the largest frame.
const MIN_FRAME_SIZE: usize = 14;
const MAX_FRAME_SIZE: usize = MAX_PACKET_SIZE - PACKET_HEADER_SIZE;
/// How much is read at once: many small frames, and at least a large one.
const INPUT_SIZE: usize = 2 * (SIZE_SIZE + MAX_FRAME_SIZE);
/// Most frames that are thrown away when a driver is reset, so that a flood does not keep that busy for ever.
const MAX_DISCARDED_FRAMES: usize = 4096;

/// Makes a connection to the other side.
type Connect = dyn Fn() -> io::Result<UnixStream> + Send + Sync;

/// The connection to a program that is the network.
pub struct FrameStream {
    label: String,
    connect: Box<Connect>,
    queue: StreamQueue,
}

struct StreamQueue(Mutex<Connection>);

/// One connection, from its first frame to its last.
struct Connection {
    socket: UnixStream,
    input: Input,
    output: Output,
}

/// What has been read.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    /// Where the next frame's size begins, and where the bytes end that have come.
    start: usize,
    end: usize,
}

/// What is to be written: the rest of a frame that the socket has taken the start of.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize,
    /// Whether the frame is that of a packet that the driver's queue still has.
    is_offered_again: bool,
}

impl FrameStream {
    /// Makes a card's other side of what `connect`, which must not wait, connects to now, and again whenever the
    /// connection has ended. Messages call it `label`.
    ///
    /// # Errors
    /// Those of `connect`, or if the socket cannot be made non-blocking.
    pub fn connect(
        label: String,
        connect: impl Fn() -> io::Result<UnixStream> + Send + Sync + 'static,
    ) -> io::Result<FrameStream> {
        let connection = Connection::new(connect()?)?;
        Ok(FrameStream {
            label,
            connect: Box::new(connect),
            queue: StreamQueue(Mutex::new(connection)),
        })
    }
}

impl NetBackend for FrameStream {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn queue(&self, index: usize) -> Option<&dyn NetQueue> {
        (index == 0).then_some(&self.queue)
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn takes_unfinished_packets(&self) -> bool {
        // The protocol has no place for what is missing.
        false
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_filter(&self, _: &FrameFilter) -> io::Result<()> {
        // The driver copes with frames for others.
        Ok(())
    }

    fn use_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn forget_driver(&self) -> io::Result<()> {
        let Connection {
            socket,
            input,
            output,
        } = &mut *self.queue.connection();
        // The next packet is another one. What is left of this one has to be sent all the same.
        output.is_offered_again = false;
        for _ in 0..MAX_DISCARDED_FRAMES {
            match input.frame(socket) {
                Ok(_) => input.take_frame(),
                // The next driver is told.
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn can_reconnect(&self) -> bool {
        true
    }

    fn reconnect(&self) -> io::Result<()> {
        let connection = Connection::new((self.connect)()?)?;
        *self.queue.connection() = connection;
        Ok(())
    }

    fn remedy(&self, error: &io::Error) -> Option<String> {
        let is_protocol = error.kind() == ErrorKind::InvalidInput;
        is_protocol.then(|| format!("as {} takes whole Ethernet frames only", self.label))
    }
}

impl AsRawFd for StreamQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.connection().socket.as_raw_fd()
    }
}

impl StreamQueue {
    fn connection(&self) -> MutexGuard<'_, Connection> {
        lock(&self.0)
    }
}

impl Connection {
    fn new(socket: UnixStream) -> io::Result<Connection> {
        socket.set_nonblocking(true)?;
        Ok(Connection {
            socket,
            input: Input::default(),
            output: Output::default(),
        })
    }
}

impl NetQueue for StreamQueue {
    fn write(&self, packet: &mut GuestBuffers) -> io::Result<()> {
        let Connection { socket, output, .. } = &mut *self.connection();
        output.flush(socket)?;
        if std::mem::take(&mut output.is_offered_again) {
            return Ok(());
        }
        let size = packet.len().saturating_sub(PACKET_HEADER_SIZE);
        if !(MIN_FRAME_SIZE..=MAX_FRAME_SIZE).contains(&size) {
            return Err(ErrorKind::InvalidInput.into());
        }
        output.bytes.extend((size as u32).to_be_bytes());
        output.bytes.resize(SIZE_SIZE + size, 0);
        packet.read_at(PACKET_HEADER_SIZE, &mut output.bytes[SIZE_SIZE..]);
        match output.flush(socket) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if output.sent == 0 {
                    output.bytes.clear();
                } else {
                    output.is_offered_again = true;
                }
                Err(error)
            }
            done => done,
        }
    }

    fn read(&self, buffer: &mut PacketBuffer<'_>) -> io::Result<usize> {
        let Connection { socket, input, .. } = &mut *self.connection();
        let frame = input.frame(socket)?;
        buffer.write_at(0, &[0; PACKET_HEADER_SIZE]);
        buffer.write_at(PACKET_HEADER_SIZE, frame);
        let size = frame.len();
        input.take_frame();
        Ok(PACKET_HEADER_SIZE + size)
    }

    fn has_packets(&self) -> bool {
        matches!(self.connection().input.size(), Ok(Some(_)))
    }
}

impl Output {
    /// Writes what is left.
    fn flush(&mut self, socket: &UnixStream) -> io::Result<()> {
        while self.sent < self.bytes.len() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(socket.as_raw_fd(), &self.bytes[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(error) => return Err(gone(error.into())),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }
}

impl Input {
    /// Returns the size of the next frame if all of it has come.
    fn size(&self) -> io::Result<Option<usize>> {
        let bytes = &self.bytes[self.start..self.end];
        let Some((size, rest)) = bytes.split_first_chunk::<SIZE_SIZE>() else {
            return Ok(None);
        };
        let size = u32::from_be_bytes(*size) as usize;
        if !(MIN_FRAME_SIZE..=MAX_FRAME_SIZE).contains(&size) {
            // Where the next frame begins is not known any more.
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        Ok((size <= rest.len()).then_some(size))
    }

    /// Returns the next frame, which stays until [`Input::take_frame`].
    fn frame(&mut self, socket: &UnixStream) -> io::Result<&[u8]> {
        let size = loop {
            if let Some(size) = self.size()? {
                break size;
            }
            self.fill(socket)?;
        };
        let start = self.start + SIZE_SIZE;
        Ok(&self.bytes[start..start + size])
    }

    fn take_frame(&mut self) {
        if let Ok(Some(size)) = self.size() {
            self.start += SIZE_SIZE + size;
        }
    }

    /// Reads more, by one call.
    fn fill(&mut self, mut socket: &UnixStream) -> io::Result<()> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.bytes.resize(INPUT_SIZE, 0);
        match socket.read(&mut self.bytes[self.end..]) {
            Ok(0) => Err(io::Error::from_raw_os_error(libc::EBADFD)),
            Ok(count) => {
                self.end += count;
                Ok(())
            }
            Err(error) => Err(gone(error)),
        }
    }
}

/// Makes of the errors of a connection that has ended the one by which a card is told that it has.
fn gone(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => ErrorKind::WouldBlock.into(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected => {
            io::Error::from_raw_os_error(libc::EBADFD)
        }
        _ => error,
    }
}
