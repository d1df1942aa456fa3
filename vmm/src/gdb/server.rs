//! The thread that talks to gdb.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use bantam_devices::ListeningSocket;
use bantam_devices::opener::Opener;
use bantam_memory::GuestMemory;
use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, MultiThreadStopReason};
use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{Connection, Ended, Next, Stream};
use super::debugger::Debugger;
use super::target::MachineTarget;
use crate::config::{GdbConfig, VcpuCount};
use crate::error::Error;
use crate::exit_reason::ExitReason;
use crate::hooks::{ThreadHook, ThreadRole};
use crate::run_control::{EndOnPanic, RunControl};
use crate::threads;

/// How long to wait after an error of the listening socket, in milliseconds.
const RETRY_TIME: u16 = 1000;

/// Why a session ends without a word of gdb.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Ended(#[from] Ended),
    #[error("{0}")]
    Protocol(#[from] GdbStubError<Ended, Ended>),
}

/// The socket to which gdb connects.
pub(crate) enum GdbListener {
    Tcp(TcpListener),
    Unix(ListeningSocket),
}

impl GdbListener {
    /// Opens the socket that `config` names.
    ///
    /// # Errors
    /// If it cannot be listened on.
    pub(crate) fn open(config: &GdbConfig, opener: &dyn Opener) -> Result<GdbListener, Error> {
        match config {
            GdbConfig::Tcp(address) => {
                GdbListener::open_tcp(*address, opener).map_err(|source| Error::ListenTcp {
                    address: *address,
                    source,
                })
            }
            GdbConfig::Unix(path) => {
                let socket = opener.listen(path).map_err(|source| Error::Listen {
                    path: path.clone(),
                    purpose: "gdb".to_owned(),
                    source,
                })?;
                Ok(GdbListener::Unix(socket))
            }
        }
    }

    fn open_tcp(address: SocketAddr, opener: &dyn Opener) -> io::Result<GdbListener> {
        let listener = opener.listen_tcp(address)?;
        listener.set_nonblocking(true)?;
        Ok(GdbListener::Tcp(listener))
    }

    /// Returns what gdb's command `target remote` takes.
    fn name(&self) -> String {
        match self {
            GdbListener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => address.to_string(),
                Err(error) => error.to_string(),
            },
            GdbListener::Unix(socket) => socket.path().display().to_string(),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            GdbListener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                // Each packet is an answer that gdb waits for.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            GdbListener::Unix(socket) => socket.accept().map(Stream::Unix),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        let descriptor = match self {
            GdbListener::Tcp(listener) => listener.as_raw_fd(),
            GdbListener::Unix(socket) => socket.as_raw_fd(),
        };
        // SAFETY: the descriptor is open for as long as the socket exists, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(descriptor) }
    }
}

/// Serves one gdb at a time, for as long as the machine exists.
pub(crate) struct GdbServer {
    listener: GdbListener,
    debugger: Arc<Debugger>,
    control: Arc<RunControl>,
}

impl GdbServer {
    /// Creates the server of a machine with `vcpu_count` vCPUs, which is not served yet.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(crate) fn new(
        listener: GdbListener,
        kvm: &Kvm,
        control: &Arc<RunControl>,
        memory: &Arc<GuestMemory>,
        vcpu_count: VcpuCount,
    ) -> Result<GdbServer, Error> {
        let debugger = Debugger::new(kvm, control, memory, vcpu_count.get());
        Ok(GdbServer {
            listener,
            debugger: Arc::new(debugger.map_err(Error::resource("an event for gdb"))?),
            control: control.clone(),
        })
    }

    /// Returns what the threads of vCPUs report to.
    pub(crate) fn debugger(&self) -> Arc<Debugger> {
        self.debugger.clone()
    }

    /// Starts the thread. The vCPUs are held until gdb lets them go on.
    ///
    /// # Errors
    /// If the host is out of threads, or the program's hook refuses.
    pub(crate) fn start(self, hook: Option<&Arc<dyn ThreadHook>>) -> Result<JoinHandle<()>, Error> {
        threads::spawn("bantam-gdb", &ThreadRole::Debugger, hook, move || {
            let _end_on_panic = EndOnPanic(self.control.clone());
            tracing::warn!(
                "the guest waits for gdb: target remote {}",
                self.listener.name()
            );
            while let Some(stream) = self.accept() {
                self.serve(stream);
            }
        })
    }

    /// Waits for a client; `None` if the machine ends.
    fn accept(&self) -> Option<Stream> {
        let mut timeout = PollTimeout::NONE;
        loop {
            let mut events = [
                PollFd::new(self.control.exit_event(), PollFlags::POLLIN),
                PollFd::new(self.listener.descriptor(), PollFlags::POLLIN),
            ];
            // After an error, the listening socket would only report it again at once.
            let count = if timeout.is_none() { 2 } else { 1 };
            match poll(&mut events[..count], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!("cannot wait for gdb: {errno}");
                    return None;
                }
            }
            if self.control.is_stopping() {
                return None;
            }
            timeout = match self.listener.accept() {
                Ok(stream) => return Some(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => PollTimeout::NONE,
                Err(error) => {
                    tracing::error!("cannot accept a connection of gdb: {error}");
                    RETRY_TIME.into()
                }
            };
        }
    }

    /// Stops the machine for a client, does what it says, and lets the machine go on when it is gone.
    fn serve(&self, stream: Stream) {
        if !self.debugger.stop_all() {
            return;
        }
        self.debugger.attach();
        tracing::info!("gdb is connected");
        let ended = self.session(Connection::new(stream, self.debugger.clone()));
        match ended {
            Ok(DisconnectReason::Kill) => {
                tracing::info!("gdb has killed the machine");
                self.control.finish(Ok(ExitReason::Stopped));
            }
            Ok(_) => tracing::info!("gdb has detached: the machine goes on"),
            Err(error) if self.control.is_stopping() => tracing::debug!("gdb: {error}"),
            Err(error) => tracing::warn!("gdb is gone, and the machine goes on: {error}"),
        }
        self.debugger.detach();
    }

    fn session(&self, connection: Connection) -> Result<DisconnectReason, SessionError> {
        use GdbStubStateMachine::{CtrlCInterrupt, Disconnected, Idle, Running};

        let mut machine = MachineTarget::new(self.debugger.clone());
        let mut gdb = GdbStub::new(connection).run_state_machine(&mut machine)?;
        loop {
            gdb = match gdb {
                Idle(mut idle) => {
                    let byte = idle.borrow_conn().next_byte()?;
                    idle.incoming_data(&mut machine, byte)?
                }
                Running(mut running) => match running.borrow_conn().next() {
                    Ok(Next::Byte(byte)) => running.incoming_data(&mut machine, byte)?,
                    Ok(Next::Stopped) => match machine.stop() {
                        Ok(reason) => running.report_stop(&mut machine, reason)?,
                        Err(_) => running.report_stop(&mut machine, self.end())?,
                    },
                    Err(Ended::Machine) => running.report_stop(&mut machine, self.end())?,
                    Err(ended) => return Err(ended.into()),
                },
                CtrlCInterrupt(interrupted) => {
                    let reason = match machine.is_running() {
                        true => Some(machine.stop().unwrap_or_else(|_| self.end())),
                        false => None,
                    };
                    interrupted.interrupt_handled(&mut machine, reason)?
                }
                Disconnected(mut disconnected) => {
                    let reason = disconnected.get_reason();
                    if reason == DisconnectReason::Kill {
                        // gdb waits for it, and the stub does not send it.
                        disconnected.borrow_conn().send_ok()?;
                    }
                    return Ok(reason);
                }
            };
        }
    }

    /// Returns how the machine's end is reported to gdb.
    fn end(&self) -> MultiThreadStopReason<u64> {
        match self.control.exit_reason() {
            Some(Some(ExitReason::Number(number))) => MultiThreadStopReason::Exited(number),
            Some(Some(ExitReason::Panic)) => MultiThreadStopReason::Terminated(Signal::SIGABRT),
            Some(Some(ExitReason::Stopped)) => MultiThreadStopReason::Terminated(Signal::SIGKILL),
            Some(None) => MultiThreadStopReason::Terminated(Signal::SIGSEGV),
            _ => MultiThreadStopReason::Exited(0),
        }
    }
}
