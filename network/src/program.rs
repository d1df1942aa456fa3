//! Programs of the distribution.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::NetworkError;

/// How long a program may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Most output that is read of a program, in bytes.
const MAX_OUTPUT: u64 = 16 << 20;
/// Where programs for administrators are, as the search path of other users lacks these folders.
const ADMINISTRATORS_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// A program, and the Debian package that has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

/// Sets the rules of the host's packet filter.
pub(crate) const NFT: Program = Program {
    name: "nft",
    package: "nftables",
};

/// Serves addresses and names.
pub(crate) const DNSMASQ: Program = Program {
    name: "dnsmasq",
    package: "dnsmasq-base",
};

/// What a program has done.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    /// Its messages, on one line.
    pub(crate) messages: String,
}

impl Program {
    /// Finds the file of the program.
    ///
    /// # Errors
    /// [`NetworkError::ProgramMissing`] if it is in no folder in which programs are.
    pub(crate) fn find(self) -> Result<PathBuf, NetworkError> {
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = env::split_paths(&path).chain(ADMINISTRATORS_FOLDERS.map(PathBuf::from));
        let mut files = folders.map(|folder| folder.join(self.name));
        let found = files.find(|file| is_executable(file));
        found.ok_or(NetworkError::ProgramMissing {
            program: self.name,
            package: self.package,
        })
    }

    /// Runs the program to `action`, with `input` as its standard input, and returns its output.
    ///
    /// # Errors
    /// If it is missing, takes too long, or ends with an error.
    pub(crate) fn run(
        self,
        action: &str,
        arguments: &[&str],
        input: &[u8],
    ) -> Result<Vec<u8>, NetworkError> {
        let output = self.try_run(action, arguments, input)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let reason = match output.messages.is_empty() {
            true => output.status.to_string(),
            false => output.messages,
        };
        Err(self.error(action, reason))
    }

    /// Runs the program like [`Program::run`], and returns what it has done even if that is an error.
    ///
    /// # Errors
    /// If it is missing, or takes too long.
    pub(crate) fn try_run(
        self,
        action: &str,
        arguments: &[&str],
        input: &[u8],
    ) -> Result<Output, NetworkError> {
        let path = self.find()?;
        let run = || -> io::Result<Output> {
            let mut stdin = File::from(memfd_create(c"input", MFdFlags::MFD_CLOEXEC)?);
            stdin.write_all(input)?;
            stdin.rewind()?;
            let mut child = Command::new(path)
                .args(arguments)
                .env("LC_ALL", "C")
                .stdin(stdin)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            let pipes = (child.stdout.take(), child.stderr.take());
            let read = match pipes {
                (Some(stdout), Some(stderr)) => read_both(stdout, stderr),
                _ => Err(io::Error::other("its output is missing")),
            };
            if read.is_err() {
                child.kill()?;
            }
            let status = child.wait()?;
            let (stdout, stderr) = read?;
            let stderr = String::from_utf8_lossy(&stderr);
            let lines = stderr
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty());
            let messages = lines.collect::<Vec<_>>().join("; ");
            Ok(Output {
                status,
                stdout,
                messages,
            })
        };
        run().map_err(|error| self.error(action, error.to_string()))
    }

    fn error(self, action: &str, reason: String) -> NetworkError {
        NetworkError::Program {
            action: action.to_owned(),
            program: self.name,
            reason,
        }
    }
}

fn is_executable(file: &Path) -> bool {
    let found = fs::metadata(file);
    found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Reads two pipes to their ends.
fn read_both(stdout: impl Read + AsFd, stderr: impl Read + AsFd) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let deadline = Instant::now() + LIMIT;
    let (mut output, mut messages) = (Vec::new(), Vec::new());
    let (mut stdout, mut stderr) = (Some(stdout.take(MAX_OUTPUT)), Some(stderr.take(MAX_OUTPUT)));
    while stdout.is_some() || stderr.is_some() {
        let left = deadline.saturating_duration_since(Instant::now());
        let out = stdout.as_ref().map(|pipe| pipe.get_ref().as_fd());
        let err = stderr.as_ref().map(|pipe| pipe.get_ref().as_fd());
        let pipes = [out, err].into_iter().flatten();
        let mut pipes: Vec<_> = pipes
            .map(|pipe| PollFd::new(pipe, PollFlags::POLLIN))
            .collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        if left.is_zero() || poll(&mut pipes, timeout)? == 0 {
            let seconds = LIMIT.as_secs();
            return Err(io::Error::other(format!(
                "it has not ended within {seconds} s"
            )));
        }
        let mut is_ready = pipes.iter().map(|pipe| pipe.any().unwrap_or_default());
        let out_is_ready = out.is_some() && is_ready.next().unwrap_or_default();
        let err_is_ready = err.is_some() && is_ready.next().unwrap_or_default();
        if out_is_ready && read_some(&mut stdout, &mut output)? == 0 {
            stdout = None;
        }
        if err_is_ready && read_some(&mut stderr, &mut messages)? == 0 {
            stderr = None;
        }
    }
    Ok((output, messages))
}

fn read_some(pipe: &mut Option<impl Read>, bytes: &mut Vec<u8>) -> io::Result<usize> {
    let mut piece = [0; 4096];
    let size = match pipe {
        Some(pipe) => pipe.read(&mut piece)?,
        None => 0,
    };
    bytes.extend(&piece[..size]);
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHELL: Program = Program {
        name: "sh",
        package: "dash",
    };

    #[test]
    fn output_and_errors_are_told_apart() {
        let script = "cat; echo trouble >&2; echo more >&2";
        let output = SHELL.try_run("test", &["-c", script], b"input").unwrap();
        assert_eq!(output.stdout, b"input");
        assert_eq!(output.messages, "trouble; more");
        let failing = format!("{script}; exit 3");
        let error = SHELL.run("test it", &["-c", &failing], b"").unwrap_err();
        assert_eq!(error.to_string(), "cannot test it: sh: trouble; more");
        let error = SHELL.run("test it", &["-c", "exit 3"], b"").unwrap_err();
        assert_eq!(error.to_string(), "cannot test it: sh: exit status: 3");
    }

    #[test]
    fn much_output_is_read() {
        let script = "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2";
        let output = SHELL.run("test", &["-c", script], b"").unwrap();
        assert_eq!(output.len(), 300_000);
    }

    #[test]
    fn a_program_that_is_missing_is_named_with_its_package() {
        let missing = Program {
            name: "no-such-program-of-bantam",
            package: "no-such-package",
        };
        let error = missing.find().unwrap_err().to_string();
        assert!(error.contains("'no-such-program-of-bantam'"), "{error}");
        assert!(error.contains("'no-such-package'"), "{error}");
    }
}
