//! Standard input and output as a connection, for a source that has started this command by ssh.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use anyhow::Context;

/// Passes on what comes from standard input to a socket, and what comes from that to standard output.
pub struct Stdio {
    output: JoinHandle<()>,
}

impl Stdio {
    /// Returns the socket, and what passes on what comes and goes there.
    ///
    /// # Errors
    /// If the host is out of descriptors or threads.
    pub fn start() -> anyhow::Result<(UnixStream, Stdio)> {
        const FAILED: &str = "cannot use standard input and output as a connection";
        let (ours, theirs) = UnixStream::pair().context(FAILED)?;
        let to_socket = ours.try_clone().context(FAILED)?;
        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
            thread.context(FAILED)
        };
        start(
            "stdin",
            Box::new(move || {
                pass_on(io::stdin().lock(), &to_socket);
                // The receiver notices that the source is gone.
                let _ = to_socket.shutdown(Shutdown::Write);
            }),
        )?;
        let output = start(
            "stdout",
            Box::new(move || {
                pass_on(&ours, io::stdout().lock());
                let _ = ours.shutdown(Shutdown::Read);
            }),
        )?;
        Ok((theirs, Stdio { output }))
    }

    /// Waits until all that has been written to the socket, which is closed, has been passed on.
    pub fn finish(self) {
        // A panic of it has been reported.
        let _ = self.output.join();
    }
}

/// Passes bytes on until there are no more, or they cannot be passed on. Each is passed on at once.
fn pass_on(mut from: impl Read, mut to: impl Write) {
    let mut bytes = vec![0; 1 << 16];
    loop {
        let passed = match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => bytes
                .get(..count)
                .map_or(Ok(()), |bytes| to.write_all(bytes))
                .and_then(|()| to.flush()),
            Err(error) => Err(error),
        };
        match passed {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return,
            _ => {}
        }
    }
}
