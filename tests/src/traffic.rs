//! The host's part in the load of a network card: threads that send or return frames, as the
//! payload `load` expects.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::network::packet_socket;

/// The EtherType of the load, reserved for experiments (IEEE 802).
const ETHER_TYPE: u16 = 0x88b5;
const ADDRESS_SIZE: usize = 6;
/// Size of the smallest Ethernet frame, without its check sequence.
const MIN_FRAME_SIZE: usize = 60;
const MAX_FRAME_SIZE: usize = 1514;

/// Frames handed to the kernel at a time.
const BATCH: usize = 64;
/// How long the sender pauses if the interface is full.
const PAUSE: Duration = Duration::from_micros(50);
/// How long a thread may take to notice that it has to end.
const NOTICE_MILLISECONDS: i64 = 50;
/// Room for every frame under way.
const RECEIVE_BUFFER_SIZE: usize = 4 << 20;

/// A thread that works until this is dropped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Traffic {
    /// Sends frames of `size` bytes into the interface `name` as fast as it takes them.
    ///
    /// # Panics
    ///
    /// If there is no such interface or it cannot be opened, or no frame is of that size.
    pub fn flood(name: &str, size: usize) -> Self {
        assert!(
            (MIN_FRAME_SIZE..=MAX_FRAME_SIZE).contains(&size),
            "no frame has {size} bytes"
        );
        let socket = packet_socket(name, ETHER_TYPE);
        send_past_the_queueing_discipline(&socket);
        let mut frame = vec![0; size];
        frame[..ADDRESS_SIZE].fill(0xff);
        frame[ADDRESS_SIZE] = 2;
        frame[2 * ADDRESS_SIZE..][..2].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        Self::start(move |stop| {
            while !stop.load(Ordering::Relaxed) {
                if !send_batch(&socket, &mut frame) {
                    return;
                }
            }
        })
    }

    /// Returns to the guest every frame of the load that it sends into the interface `name`.
    ///
    /// # Panics
    ///
    /// If there is no such interface or it cannot be opened.
    pub fn echo(name: &str) -> Self {
        let mut socket = packet_socket(name, ETHER_TYPE);
        send_past_the_queueing_discipline(&socket);
        setsockopt(&socket, RcvBuf, &RECEIVE_BUFFER_SIZE).expect("sockets have buffers");
        let timeout = TimeVal::milliseconds(NOTICE_MILLISECONDS);
        setsockopt(&socket, ReceiveTimeout, &timeout).expect("sockets have time-outs");
        Self::start(move |stop| {
            let mut buffer = [0; MAX_FRAME_SIZE];
            while !stop.load(Ordering::Relaxed) {
                let frame = match socket.read(&mut buffer) {
                    Ok(size) => &mut buffer[..size],
                    Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                    // The interface is gone.
                    Err(_) => return,
                };
                if let Some((target, rest)) = frame.split_at_mut_checked(ADDRESS_SIZE)
                    && let Some(source) = rest.get_mut(..ADDRESS_SIZE)
                {
                    target.swap_with_slice(source);
                    // The guest misses a frame that does not fit, and says so.
                    let _ = socket.write(frame);
                }
            }
        })
    }

    fn start(work: impl FnOnce(&AtomicBool) + Send + 'static) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let stop = stop.clone();
            move || work(&stop)
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("a thread that sends frames has panicked");
        }
    }
}

/// Makes frames go to the interface directly, so that the sender notices if it is full (packet(7)).
fn send_past_the_queueing_discipline(socket: &File) {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int, whose address and size are given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    Errno::result(result).expect("packet sockets have this option");
}

/// Sends a frame a number of times, and pauses if the interface is full. Returns `false` if the
/// interface is gone.
fn send_batch(socket: &File, frame: &mut [u8]) -> bool {
    let mut buffer = libc::iovec {
        iov_base: frame.as_mut_ptr().cast(),
        iov_len: frame.len(),
    };
    // SAFETY: all-zero message headers are valid, and have no address, buffer or control data.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_iov = &raw mut buffer;
        message.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the headers refer to the buffer and the frame, which outlive the call.
    let result = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            BATCH as libc::c_uint,
            0,
        )
    };
    match Errno::result(result) {
        Ok(sent) if sent as usize == BATCH => true,
        // The frame after the last one sent did not fit.
        Ok(_) | Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => {
            thread::sleep(PAUSE);
            true
        }
        Err(_) => false,
    }
}
