//! The console device, as a console and as channels, with clients that connect, send and leave.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use bantam_devices::serial::SerialEndpoint;
use bantam_devices::virtio::VirtioDevice;
use bantam_devices::virtio::console::Console;
use bantam_devices::virtio::transport::mmio::MmioLink;
use bantam_devices::{InterruptLine, ListeningSocket};
use bolero::TypeGenerator;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use vmm_sys_util::tempdir::TempDir;

use crate::Target;
use crate::driver::{DATA, Driver, HEADERS, readable, writable};
use crate::machine::{Machine, SEAM};
use crate::operation::Operation;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Control queues of a device of channels. A console has no such queues.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
/// Address of the drivers' indirect tables.
const TABLE: u64 = HEADERS + 0x100;
/// Most bytes that a client sends at a time.
const MAX_CHUNK: usize = 1024;

#[derive(Debug, Default, TypeGenerator)]
pub struct Options {
    has_channels: bool,
}

/// An interrupt line that is not connected.
struct Unconnected;

impl InterruptLine for Unconnected {
    fn trigger(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The host's ends of the device made last.
pub struct ConsoleTarget {
    folder: TempDir,
    /// The host's ends of the pipes of a console.
    pipes: Option<(File, File)>,
    clients: Vec<UnixStream>,
}

impl ConsoleTarget {
    pub fn new() -> ConsoleTarget {
        ConsoleTarget {
            folder: TempDir::new().unwrap(),
            pipes: None,
            clients: Vec::new(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.as_path().join("socket")
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap()
}

/// Makes a control message, which is written to memory first.
fn message(port: u32, event: u16, value: u16) -> Operation {
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    let address = HEADERS;
    Operation::Store { address, bytes }
}

impl Target for ConsoleTarget {
    type Options = Options;

    const QUEUES: u16 = 4;

    fn device(&mut self, options: &Options) -> Box<dyn VirtioDevice> {
        self.clients.clear();
        self.pipes = None;
        let link = MmioLink::new("owner".to_string(), Box::new(Unconnected)).driver();
        if options.has_channels {
            let device = Console::with_channels(vec!["name".to_string()]);
            let socket = ListeningSocket::bind(&self.socket()).unwrap();
            let handle = device.handle(link);
            handle.connect(1, SerialEndpoint::Listener(socket));
            return Box::new(device);
        }
        let device = Console::new();
        let (input, to_guest) = pipe();
        let (from_guest, output) = pipe();
        let handle = device.handle(link);
        let endpoint = SerialEndpoint::Descriptors {
            input: Some(input),
            output: Some(output),
        };
        handle.connect(0, endpoint);
        handle.resize(80, 25);
        self.pipes = Some((from_guest.into(), to_guest.into()));
        Box::new(device)
    }

    fn requests(driver: &mut Driver) -> Vec<Operation> {
        let mut operations = Vec::new();
        for _ in 0..2 {
            operations.extend(driver.request(CONTROL_RECEIVE, &[writable(DATA, 0x100)]));
        }
        for (port, event) in [(u32::MAX, 0), (1, 3), (1, 6)] {
            operations.push(message(port, event, 1));
            operations.extend(driver.request(CONTROL_TRANSMIT, &[readable(HEADERS, 8)]));
        }
        operations.push(Operation::HostSends { len: 100 });
        operations.extend(driver.request(RECEIVE, &[writable(DATA, 60)]));
        operations.extend(driver.request(RECEIVE, &[writable(SEAM - 30, 60)]));
        operations.extend(driver.request(TRANSMIT, &[readable(DATA, 1526)]));
        let parts = [readable(DATA, 20), readable(SEAM - 8, 16)];
        operations.extend(driver.indirect_request(TRANSMIT, TABLE, &parts));
        operations.push(message(1, 6, 0));
        operations.extend(driver.request(CONTROL_TRANSMIT, &[readable(HEADERS, 8)]));
        operations
    }

    /// Has clients connect and leave, send bytes, and read some of the output.
    fn host_sends(&mut self, len: u16) {
        let bytes = vec![0x5a; usize::from(len).min(MAX_CHUNK)];
        if let Some((from_guest, to_guest)) = &mut self.pipes {
            let _ = to_guest.write(&bytes);
            let _ = from_guest.read(&mut vec![0; bytes.len()]);
            return;
        }
        if len.is_multiple_of(3) && !self.clients.is_empty() {
            self.clients.remove(0);
        } else if self.clients.len() < 4 {
            self.clients.extend(UnixStream::connect(self.socket()));
        }
        for client in &mut self.clients {
            client.set_nonblocking(true).unwrap();
            let _ = client.write(&bytes);
            let _ = client.read(&mut vec![0; bytes.len()]);
        }
    }

    fn check_service(&mut self, options: &Options, machine: &mut Machine) {
        // A driver of two queues sees a console, which is not connected on a device of channels.
        let mut driver = Driver::plain(2);
        machine.initialize(&mut driver);
        machine.store(DATA, b"words of the guest");
        if let Some((from_guest, _)) = &mut self.pipes {
            while matches!(from_guest.read(&mut [0; MAX_CHUNK]), Ok(1..)) {
                machine.rest();
            }
        }
        for operation in driver.request(TRANSMIT, &[readable(DATA, 18)]) {
            machine.act(&operation);
        }
        machine.await_used(TRANSMIT, 1);
        if options.has_channels {
            return;
        }
        let Some((from_guest, _)) = &mut self.pipes else {
            return;
        };
        let mut bytes = Vec::new();
        match from_guest.read_to_end(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            result => assert!(result.is_ok()),
        }
        assert!(bytes.ends_with(b"words of the guest"));
    }
}
