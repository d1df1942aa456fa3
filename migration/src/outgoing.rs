//! The end that has the machine.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bantam_memory::{GuestBuffers, GuestMemory, PAGE_SIZE, PageSet};
use bantam_snapshot::StateFile;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;
use zstd::bulk::Compressor;

use crate::message::{ADDRESS, Head, KEY, Kind, MAX_PAGES};
use crate::{Connection, MigrationError};

/// Level of zstd: the fastest of those that are not negative.
const LEVEL: i32 = 1;

/// What becomes of pages of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroes {
    /// They are left out, as the receiver has nothing else there yet.
    LeaveOut,
    /// They are sent, as the receiver may have something else there.
    Send,
}

/// How pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// By Zstandard (RFC 8878), at level 1.
    Zstd,
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
    /// One for each connection.
    packers: Vec<Packer>,
    counters: Arc<Counters>,
}

impl Outgoing {
    /// Offers a machine, and waits until the receiver has accepted it. Its pages are compressed as `compression` says.
    ///
    /// # Errors
    /// If it refuses, or a connection fails.
    pub fn offer(
        connection: Connection,
        state: &StateFile,
        compression: Option<Compression>,
    ) -> Result<Outgoing, MigrationError> {
        connection.greet()?;
        if let Ok(count @ 1..) = u8::try_from(connection.others.len()) {
            let mut body = [count; 1 + KEY];
            let [_, key @ ..] = &mut body;
            getrandom::fill(key).map_err(|error| MigrationError::Random(error.into()))?;
            connection.send_message(Kind::Others, &body)?;
            for other in &connection.others {
                other.send_greeting()?;
                other.send_message(Kind::Join, &body[1..])?;
            }
        }
        connection.send_state(Kind::Offer, state)?;
        // If it refuses, it says so here.
        connection.expect(Kind::Accepted)?;
        for other in &connection.others {
            other.receive_greeting()?;
        }
        let packers = connection.all().map(|_| Packer::new(compression));
        Ok(Outgoing {
            packers: packers.collect::<Result<_, _>>()?,
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

    /// Sends `pages` of `memory`, over all connections.
    ///
    /// # Errors
    /// If a connection fails.
    pub fn send_pages(
        &mut self,
        memory: &Arc<GuestMemory>,
        pages: &PageSet,
        zeroes: Zeroes,
    ) -> Result<(), MigrationError> {
        let runs = Mutex::new(pages.runs(MAX_PAGES));
        let has_failed = AtomicBool::new(false);
        let counters = &*self.counters;
        let send = |(connection, packer): (&Connection, &mut Packer)| {
            let next = || runs.lock().unwrap_or_else(PoisonError::into_inner).next();
            while !has_failed.load(Ordering::Relaxed)
                && let Some(run) = next()
            {
                let sent = packer.send_run(connection, memory, run, zeroes, counters);
                sent.inspect_err(|_| has_failed.store(true, Ordering::Relaxed))?;
            }
            Ok(())
        };
        let mut lanes = self.connection.all().zip(&mut self.packers);
        let first = lanes.next();
        thread::scope(|scope| {
            let start = |lane| {
                let thread = thread::Builder::new().name("migration".into());
                let started = thread.spawn_scoped(scope, || send(lane));
                started.map_err(MigrationError::Thread)
            };
            let others: Vec<_> = lanes.map(start).collect();
            let mut sent = first.map_or(Ok(()), send);
            for other in others {
                // A panic of it goes on in this thread.
                let other = other.and_then(|it| {
                    it.join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                });
                sent = sent.and(other);
            }
            sent
        })
    }

    /// Waits until the receiver has taken all that was sent.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn end_round(&mut self) -> Result<(), MigrationError> {
        for connection in self.connection.all() {
            connection.send_message(Kind::RoundEnd, &[])?;
        }
        for connection in self.connection.all() {
            connection.expect(Kind::RoundTaken)?;
        }
        Ok(())
    }

    /// Sends the state of the machine, which stands still, and waits until the receiver is ready to run it.
    ///
    /// # Errors
    /// If it cannot run the machine, or the connection fails. The machine is the source's then.
    pub fn send_state(&mut self, state: &StateFile) -> Result<(), MigrationError> {
        for other in &self.connection.others {
            other.send_message(Kind::PagesEnd, &[])?;
        }
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

/// Sends pages over one connection.
struct Packer {
    compressor: Option<Compressor<'static>>,
    /// Pages that are to be compressed.
    content: Vec<u8>,
    /// What becomes of them.
    compressed: Vec<u8>,
}

impl Packer {
    fn new(compression: Option<Compression>) -> Result<Packer, MigrationError> {
        let compressor = compression.map(|Compression::Zstd| Compressor::new(LEVEL));
        Ok(Packer {
            compressor: compressor.transpose().map_err(MigrationError::Broken)?,
            content: Vec::new(),
            compressed: Vec::new(),
        })
    }

    /// Sends `len` bytes of pages from `start` on.
    fn send_run(
        &mut self,
        connection: &Connection,
        memory: &Arc<GuestMemory>,
        (start, len): (GuestAddress, usize),
        zeroes: Zeroes,
        counters: &Counters,
    ) -> Result<(), MigrationError> {
        let end = start.0 + len as u64;
        let is_zero = |page: u64| memory.is_zero_page(GuestAddress(page));
        let mut page = start.0;
        while page < end {
            let has_zeroes = is_zero(page);
            let mut others = (page..end).step_by(PAGE_SIZE);
            let next = others.find(|&it| is_zero(it) != has_zeroes).unwrap_or(end);
            let (address, len) = (GuestAddress(page), (next - page) as usize);
            match (has_zeroes, zeroes) {
                (false, _) => {
                    self.send_content(connection, memory, address, len)?;
                    counters.sent.fetch_add(len as u64, Ordering::Relaxed);
                }
                (true, Zeroes::Send) => send_zeroes(connection, address, len)?,
                (true, Zeroes::LeaveOut) => {}
            }
            counters.passed.fetch_add(len as u64, Ordering::Relaxed);
            page = next;
        }
        Ok(())
    }

    fn send_content(
        &mut self,
        connection: &Connection,
        memory: &Arc<GuestMemory>,
        address: GuestAddress,
        len: usize,
    ) -> Result<(), MigrationError> {
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers
            .push(address, len as u32)
            .map_err(|error| MigrationError::Broken(std::io::Error::other(error)))?;
        if let Some(compressed) = self.compress(&buffers, len)? {
            let mut head = [0; 8 + 2 * ADDRESS];
            let body = 2 * ADDRESS + compressed.len();
            head[..8].copy_from_slice(&Head::bytes(Kind::Compressed, body));
            head[8..16].copy_from_slice(&address.0.to_le_bytes());
            head[16..].copy_from_slice(&(len as u64).to_le_bytes());
            connection.send(&head)?;
            return connection.send(compressed);
        }
        let mut head = [0; 8 + ADDRESS];
        head[..8].copy_from_slice(&Head::bytes(Kind::Pages, ADDRESS + len));
        head[8..].copy_from_slice(&address.0.to_le_bytes());
        connection.send(&head)?;
        connection.send_buffers(&mut buffers)
    }

    /// Returns the `len` bytes of `buffers` compressed; `None` if they are not to be, or it saves little.
    fn compress(
        &mut self,
        buffers: &GuestBuffers,
        len: usize,
    ) -> Result<Option<&[u8]>, MigrationError> {
        let Some(compressor) = &mut self.compressor else {
            return Ok(None);
        };
        self.content.resize(len, 0);
        buffers.read_at(0, &mut self.content);
        self.compressed.clear();
        self.compressed
            .reserve(zstd::zstd_safe::compress_bound(len));
        compressor
            .compress_to_buffer(&self.content, &mut self.compressed)
            .map_err(MigrationError::Broken)?;
        Ok((self.compressed.len() < len - len / 8).then_some(&self.compressed))
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compresses = self.compressor.is_some();
        let mut packer = formatter.debug_struct("Packer");
        packer.field("compresses", &compresses).finish()
    }
}

fn send_zeroes(
    connection: &Connection,
    address: GuestAddress,
    len: usize,
) -> Result<(), MigrationError> {
    let mut body = [0; 2 * ADDRESS];
    body[..ADDRESS].copy_from_slice(&address.0.to_le_bytes());
    body[ADDRESS..].copy_from_slice(&(len as u64).to_le_bytes());
    connection.send_message(Kind::Zeroes, &body)
}
