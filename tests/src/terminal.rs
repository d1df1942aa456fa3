//! A terminal, and the user in front of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

use crate::Bantam;

/// How long a test waits for output that should arrive at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// A terminal and its user.
#[derive(Debug)]
pub struct Terminal {
    /// The user's end.
    pub person: File,
    /// The programs' end.
    programs: OwnedFd,
    /// How it was set up at first.
    pub original: Termios,
    /// All that it has shown so far.
    pub seen: Vec<u8>,
}

impl Terminal {
    /// Makes a terminal.
    ///
    /// # Panics
    /// If the host has none.
    pub fn new() -> Self {
        let pty = openpty(None, None).expect("the host has pseudoterminals");
        Self {
            original: tcgetattr(&pty.slave).expect("it is a terminal"),
            person: pty.master.into(),
            programs: pty.slave,
            seen: Vec::new(),
        }
    }

    /// Returns the monitor with this terminal for input and output.
    ///
    /// # Panics
    /// If this process has no descriptors left.
    pub fn at(&self, bantam: Bantam) -> Bantam {
        let end = || self.programs.try_clone().expect("there are descriptors");
        bantam.stdin(end()).stdout(end())
    }

    /// Returns how the terminal is set up.
    ///
    /// # Panics
    /// If it is gone.
    pub fn settings(&self) -> Termios {
        tcgetattr(&self.programs).expect("it is a terminal")
    }

    /// Checks that keys go to a program as they are typed.
    ///
    /// # Panics
    /// If it is not so.
    #[track_caller]
    pub fn assert_raw(&self) {
        let flags = self.settings().local_flags;
        assert!(!flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    }

    /// Checks that the terminal is set up as it was at first.
    ///
    /// # Panics
    /// If it is not so.
    #[track_caller]
    pub fn assert_restored(&self) {
        assert_eq!(self.settings(), self.original);
    }

    /// Types keys.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.person.write_all(keys).expect("it is open");
    }

    /// Waits until `text` has been shown, and returns all that has been shown.
    ///
    /// # Panics
    /// If it is not shown soon.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let mut events = [PollFd::new(self.person.as_fd(), PollFlags::POLLIN)];
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).expect("it is short");
            let ready = poll(&mut events, left).expect("it can be polled");
            let seen = String::from_utf8_lossy(&self.seen);
            assert!(ready == 1, "no '{text}' on the terminal, only\n{seen}");
            let mut bytes = [0; 4096];
            let count = self.person.read(&mut bytes).expect("it is open");
            self.seen.extend_from_slice(&bytes[..count]);
        }
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}
