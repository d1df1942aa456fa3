//! The end that has the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bantam_memory::{GuestBuffers, GuestMemory, PAGE_SIZE, PageSet};
use bantam_snapshot::StateFile;
use vm_memory::GuestAddress;

use crate::message::{ADDRESS, Head, Kind, MAX_PAGES};
use crate::{Connection, MigrationError};

/// What becomes of pages of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroes {
    /// They are left out, as the receiver has nothing else there yet.
    LeaveOut,
    /// They are sent, as the receiver may have something else there.
    Send,
}

/// How the machine was handed over.
#[derive(Debug)]
pub enum HandOver {
    /// The receiver has it.
    Done,
    /// The receiver has not answered: it may have the machine, or not.
    Unknown(MigrationError),
}

/// How much memory a source has dealt with, for other threads to watch.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    passed: AtomicU64,
}

impl Counters {
    /// Returns how many bytes of memory have been sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns the length of all pages that have been dealt with, in bytes: those that were sent and those of zeroes.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

/// The source's end of a migration.
#[derive(Debug)]
pub struct Outgoing {
    connection: Connection,
    counters: Arc<Counters>,
}

impl Outgoing {
    /// Offers a machine, and waits until the receiver has accepted it.
    ///
    /// # Errors
    /// If it refuses, or the connection fails.
    pub fn offer(connection: Connection, state: &StateFile) -> Result<Outgoing, MigrationError> {
        connection.greet()?;
        connection.send_state(Kind::Offer, state)?;
        connection.expect(Kind::Accepted)?;
        Ok(Outgoing {
            connection,
            counters: Arc::default(),
        })
    }

    /// Asks whether the receiver would accept a machine. It goes on waiting for one afterwards.
    ///
    /// # Errors
    /// If it would refuse, or the connection fails.
    pub fn try_offer(connection: &Connection, state: &StateFile) -> Result<(), MigrationError> {
        connection.greet()?;
        connection.send_state(Kind::Trial, state)?;
        connection.expect(Kind::Accepted)
    }

    /// Returns how much memory has been dealt with.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Sends `pages` of `memory`.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn send_pages(
        &mut self,
        memory: &Arc<GuestMemory>,
        pages: &PageSet,
        zeroes: Zeroes,
    ) -> Result<(), MigrationError> {
        for (start, len) in pages.runs(MAX_PAGES) {
            let end = start.0 + len as u64;
            let is_zero = |page: u64| memory.is_zero_page(GuestAddress(page));
            let mut page = start.0;
            while page < end {
                let has_zeroes = is_zero(page);
                let mut others = (page..end).step_by(PAGE_SIZE);
                let next = others.find(|&it| is_zero(it) != has_zeroes).unwrap_or(end);
                let (address, len) = (GuestAddress(page), (next - page) as usize);
                match (has_zeroes, zeroes) {
                    (false, _) => self.send_content(memory, address, len)?,
                    (true, Zeroes::Send) => self.send_zeroes(address, len)?,
                    (true, Zeroes::LeaveOut) => {}
                }
                self.counters
                    .passed
                    .fetch_add(len as u64, Ordering::Relaxed);
                page = next;
            }
        }
        Ok(())
    }

    fn send_content(
        &mut self,
        memory: &Arc<GuestMemory>,
        address: GuestAddress,
        len: usize,
    ) -> Result<(), MigrationError> {
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers
            .push(address, len as u32)
            .map_err(|error| MigrationError::Broken(std::io::Error::other(error)))?;
        let mut head = [0; 8 + ADDRESS];
        head[..8].copy_from_slice(&Head::bytes(Kind::Pages, ADDRESS + len));
        head[8..].copy_from_slice(&address.0.to_le_bytes());
        self.connection.send(&head)?;
        self.connection.send_buffers(&mut buffers)?;
        self.counters.sent.fetch_add(len as u64, Ordering::Relaxed);
        Ok(())
    }

    fn send_zeroes(&self, address: GuestAddress, len: usize) -> Result<(), MigrationError> {
        let mut body = [0; 2 * ADDRESS];
        body[..ADDRESS].copy_from_slice(&address.0.to_le_bytes());
        body[ADDRESS..].copy_from_slice(&(len as u64).to_le_bytes());
        self.connection.send_message(Kind::Zeroes, &body)
    }

    /// Waits until the receiver has taken all that was sent.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn end_round(&mut self) -> Result<(), MigrationError> {
        self.connection.send_message(Kind::RoundEnd, &[])?;
        self.connection.expect(Kind::RoundTaken)
    }

    /// Sends the state of the machine, which stands still, and waits until the receiver is ready to run it.
    ///
    /// # Errors
    /// If it cannot run the machine, or the connection fails. The machine is the source's then.
    pub fn send_state(&mut self, state: &StateFile) -> Result<(), MigrationError> {
        self.connection.send_state(Kind::State, state)?;
        self.connection.expect(Kind::Ready)
    }

    /// Hands the machine over, which `runs` there or stays paused. From now on, it is the receiver's.
    #[must_use]
    pub fn hand_over(self, runs: bool) -> HandOver {
        let told = self
            .connection
            .send_message(Kind::TakeOver, &[u8::from(runs)]);
        match told.and_then(|()| self.connection.expect(Kind::TakenOver)) {
            Ok(()) => HandOver::Done,
            Err(error) => HandOver::Unknown(error),
        }
    }

    /// Tells the receiver why it does not get the machine.
    pub fn give_up(&self, reason: &str) {
        // It notices the end of the connection otherwise.
        let _ = self.connection.send_failure(reason);
    }
}
