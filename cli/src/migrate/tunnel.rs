//! Ways to another host that this command has, and the machine does not: the machine connects to a socket of this command.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, process};

use anyhow::{Context, bail};
use bantam_manager::MachineName;
use bantam_vmm::{ListeningSocket, MigrationAddress};

use super::endpoint::{SshHost, TlsPlace};
use super::tls::{self, SecureStream};

/// How long a connection that is broken may take to say why.
const EXPLANATION_TIME: Duration = Duration::from_secs(1);

/// A socket of this host that leads to a receiver on another one.
pub struct Tunnel {
    path: PathBuf,
    /// Removed from the file system with this.
    _socket: ListeningSocket,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Tunnel {
    /// Leads whoever connects, once, to a receiver that `ssh` starts on `host`. It calls the machine `name` if that is given.
    ///
    /// # Errors
    /// If the host has no room for a socket.
    pub fn by_ssh(host: &SshHost, name: Option<&MachineName>) -> anyhow::Result<Tunnel> {
        let mut command = Command::new("ssh");
        if let Some(port) = host.port {
            command.arg("-p").arg(port.to_string());
        }
        // No shell of the other host finds anything special in these words.
        command.arg("-T").arg(&host.host);
        command.args(["bantam", "migrate", "--receive", "stdio"]);
        if let Some(name) = name {
            command.args(["--name", name.as_str()]);
        }
        Tunnel::start(move |listener| {
            let (stream, _) = listener.accept()?;
            let mut child = command
                .stdin(OwnedFd::from(stream.try_clone()?))
                .stdout(OwnedFd::from(stream))
                .spawn()
                .context("cannot start ssh")?;
            // It has the connection now.
            drop(command);
            let status = child.wait()?;
            match status.success() {
                true => Ok(()),
                false => bail!("the receiver's command has ended with {status}"),
            }
        })
    }

    /// Leads those who connect, so many times, to a receiver that speaks TLS, with the certificates in `folder`.
    ///
    /// # Errors
    /// If the receiver is not there, or one of the ends does not accept the other's certificate.
    pub fn by_tls(place: &TlsPlace, folder: &Path, connections: u8) -> anyhow::Result<Tunnel> {
        let config = tls::client_config(folder)?;
        let first = SecureStream::connect(config.clone(), place)?;
        let place = place.clone();
        Tunnel::start(move |listener| {
            let (stream, _) = listener.accept()?;
            thread::scope(|scope| {
                let mut relays = vec![scope.spawn(move || first.relay(stream))];
                for _ in 1..connections {
                    let (stream, _) = listener.accept()?;
                    let connect = || SecureStream::connect(config.clone(), &place)?.relay(stream);
                    relays.push(scope.spawn(connect));
                }
                // A panic of one has been reported.
                let relays = relays.into_iter().filter_map(|it| it.join().ok());
                relays.fold(Ok(()), anyhow::Result::and)
            })
        })
    }

    /// Calls `lead` with a new socket, in a thread.
    fn start(
        lead: impl FnOnce(UnixListener) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Tunnel> {
        let path = env::temp_dir().join(format!("bantam-migrate-{}.sock", process::id()));
        let failed = || format!("cannot listen on '{}'", path.display());
        let socket = ListeningSocket::bind_private(&path).with_context(failed)?;
        let listener = socket.try_clone_listener().with_context(failed)?;
        listener.set_nonblocking(false).with_context(failed)?;
        let thread = thread::Builder::new().name("tunnel".into());
        let thread = thread.spawn(move || lead(listener));
        Ok(Tunnel {
            path,
            _socket: socket,
            thread: thread.context("cannot start a thread for the connection")?,
        })
    }

    /// Returns the address of the socket.
    pub fn address(&self) -> MigrationAddress {
        MigrationAddress::Unix(self.path.clone())
    }

    /// Waits until all has been passed on, and the receiver's command has ended if this end has started it.
    ///
    /// # Errors
    /// If the connection or the command has failed.
    pub fn finish(self) -> anyhow::Result<()> {
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the thread of the connection has panicked"),
        }
    }

    /// Adds to an error of the machine why there was no way to the receiver, if that is so.
    pub fn explain(self, error: anyhow::Error) -> anyhow::Error {
        let begin = Instant::now();
        // The machine notices the end of a connection before this thread does.
        while !self.thread.is_finished() && begin.elapsed() < EXPLANATION_TIME {
            thread::sleep(Duration::from_millis(5));
        }
        match self.thread.is_finished().then(|| self.finish()) {
            Some(Err(reason)) => reason.context(error.to_string()),
            _ => error,
        }
    }
}
