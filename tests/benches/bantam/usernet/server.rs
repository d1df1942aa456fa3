//! The host's end of the connections of a guest.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How much is received or sent at once.
const CHUNK_SIZE: usize = 1 << 20;
/// How long a thread may take to notice that it has to end.
const NOTICE: Duration = Duration::from_millis(20);

/// What a server does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Throws away what it receives.
    Discard,
    /// Sends zeros without end.
    Send,
    /// Ends it at once.
    Close,
    /// Sends back what it receives.
    Echo,
    /// Nothing: it has datagrams sent to it, and does not read them.
    Ignore,
}

/// A server, until this is dropped.
pub struct Server {
    address: SocketAddr,
    _datagrams: Option<UdpSocket>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a server at any port of `address`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(address: Ipv4Addr, service: Service) -> Self {
        let stop = Arc::<AtomicBool>::default();
        if service == Service::Ignore {
            let socket = UdpSocket::bind((address, 0)).expect("the address is the host's");
            return Self {
                address: socket.local_addr().expect("it is bound"),
                _datagrams: Some(socket),
                stop,
                thread: None,
            };
        }
        let listener = TcpListener::bind((address, 0)).expect("the address is the host's");
        let address = listener.local_addr().expect("it is bound");
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    if service != Service::Close
                        && let Err(error) = serve(stream, service, &stop)
                        && !is_end(&error)
                    {
                        eprintln!("usernet: the host's end of a connection: {error}");
                    }
                }
            }
        });
        Self {
            address,
            _datagrams: None,
            stop,
            thread: Some(thread),
        }
    }

    /// Where the server is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It waits for a connection.
            let _ = TcpStream::connect(self.address);
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, service: Service, stop: &AtomicBool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(NOTICE))?;
    stream.set_write_timeout(Some(NOTICE))?;
    let zeros = vec![0; CHUNK_SIZE];
    let mut bytes = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let done = match service {
            Service::Discard => discard(&stream),
            Service::Send => stream.write(&zeros),
            Service::Echo => stream.read(&mut bytes).and_then(|size| {
                stream.write_all(&bytes[..size])?;
                Ok(size)
            }),
            Service::Close | Service::Ignore => Ok(0),
        };
        match done {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives bytes and throws them away without a copy, as the copy is not what is measured.
fn discard(stream: &TcpStream) -> io::Result<usize> {
    // SAFETY: with MSG_TRUNC, a TCP socket writes nothing to the buffer (tcp(7)).
    let result = unsafe {
        libc::recv(
            stream.as_raw_fd(),
            ptr::null_mut(),
            CHUNK_SIZE,
            libc::MSG_TRUNC,
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether `error` is how a connection ends when its guest is stopped.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}
