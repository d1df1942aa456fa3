//! Moving a machine to another process or host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_memory::{GuestMemory, PAGE_SIZE, PageSet};
use bantam_migration::{Breaker, Connection, HandOver, Outgoing, Zeroes};
use bantam_snapshot::{Facts, StateFile};
use serde::{Deserialize, Serialize};

use super::Controller;
use super::snapshot::Parts;
use super::write_log::WriteLog;
use crate::command::MigrationOrder;
use crate::error::Error;
use crate::exit_reason::ExitReason;
use crate::lock::lock;
use crate::snapshot::Changes;
use crate::state::State;

const ACTION: &str = "move the machine";
/// What errors call the state.
const NAME: &str = "migration";
/// What the last part of a migration takes beside the copying of pages.
const HAND_OVER_TIME: Duration = Duration::from_millis(5);

/// How a machine is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MigrationOptions {
    /// For how long the guest should stand still at most. It is an aim: how long the pages take that are left when the
    /// guest is stopped is known from those before.
    pub downtime: Duration,
    /// How long the machine may run while its memory is copied. If it writes faster than that can be done, what becomes of
    /// it then is said by `at_timeout`.
    pub timeout: Duration,
    /// What is done after that time.
    pub at_timeout: AtTimeout,
}

/// What is done with a machine that writes to its memory faster than that can be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtTimeout {
    /// The migration fails, and the machine goes on where it is.
    #[default]
    Cancel,
    /// The guest stands still while all pages are copied that are left.
    Stop,
}

impl Default for MigrationOptions {
    fn default() -> MigrationOptions {
        MigrationOptions {
            downtime: Duration::from_millis(50),
            timeout: Duration::from_secs(120),
            at_timeout: AtTimeout::Cancel,
        }
    }
}

/// What a migration has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Migrated {
    /// For how long the guest did not run.
    pub downtime: Duration,
    /// How long all of it took.
    pub time: Duration,
    /// How many bytes of memory were sent. A page that the guest has written meanwhile counts each time.
    pub sent: u64,
    /// How often pages were sent while the machine ran.
    pub rounds: u32,
}

/// What is left to be sent when the machine stands still.
struct Rest<'a> {
    pages: PageSet,
    /// Those that are written from now on; `None` for a machine that stands still already.
    log: Option<WriteLog<'a>>,
    rounds: u32,
}

impl Controller {
    /// Moves the machine to whoever receives it at the other end of `connection`
    /// ([`Arrival`](crate::Arrival)), and ends it here with [`ExitReason::Moved`]. It runs meanwhile, but for a moment at
    /// the beginning and at the end. A machine that is paused arrives paused. A call waits for an earlier one, and for
    /// snapshots and forks, to be done.
    ///
    /// # Errors
    /// If the other end does not take the machine, the connection fails, or the machine writes faster than its memory can be
    /// copied: it goes on here then. [`Error::HandOver`] if nobody knows whether the machine runs at the other end: it stands
    /// still here, and [`Controller::take_back`] lets it go on.
    pub fn migrate(
        &self,
        connection: Connection,
        options: &MigrationOptions,
    ) -> Result<Migrated, Error> {
        let _one_at_a_time = lock(&self.0.snapshots);
        let _cancel = Cancel::enable(self, connection.breaker());
        let begun = Instant::now();
        let runs = self.state() == State::Running;
        let parts = self.0.of_machine(ACTION, Parts::of)?;
        let (offer, _) =
            self.while_at_rest(false, || self.while_paused(ACTION, |it| self.describe(it)))?;
        let mut outgoing = Outgoing::offer(connection, &offer)?;
        // Its log is dropped when the machine has been handed over, as that takes a while.
        let rest = self.copy(&mut outgoing, &parts, runs, options);
        let rest = rest.inspect_err(|error| outgoing.give_up(&error.to_string()))?;
        let stopped = Instant::now();
        let sent_rest = self.while_at_rest(true, || {
            self.while_paused(ACTION, |it| {
                let sent_rest = self.send_rest(&mut outgoing, it, &rest, runs);
                if sent_rest.is_err()
                    && let Err(error) = it.devices.take_back_disks()
                {
                    // The first error says more.
                    tracing::error!("{error}");
                }
                sent_rest
            })
        });
        sent_rest.inspect_err(|error| outgoing.give_up(&error.to_string()))?;
        let sent = outgoing.sent();
        match outgoing.hand_over(runs) {
            HandOver::Done => {
                let migrated = Migrated {
                    downtime: stopped.elapsed(),
                    time: begun.elapsed(),
                    sent,
                    rounds: rest.rounds,
                };
                self.0.control().finish(Ok(ExitReason::Moved));
                Ok(migrated)
            }
            HandOver::Unknown(error) => Err(Error::HandOver(error)),
        }
    }

    /// Moves the machine to whoever receives it at an address ([`Command::Migrate`](crate::Command::Migrate)).
    ///
    /// # Errors
    /// Those of [`Controller::migrate`]; also if nobody listens there, the address has the name of a host
    /// ([`MigrationAddress::looked_up`](crate::MigrationAddress::looked_up)), or the way leads over a network that others
    /// may read, and that is not allowed.
    pub fn migrate_to(&self, order: &MigrationOrder) -> Result<Migrated, Error> {
        // A look-up loads libraries of the host, which a process that is confined cannot do.
        if order.destination.names_a_host() {
            return Err(Error::NamedDestination {
                destination: order.destination.clone(),
            });
        }
        if !order.insecure && !order.destination.is_local() {
            return Err(Error::InsecureMigration);
        }
        self.migrate(order.destination.connect()?, &order.options)
    }

    /// Sends the memory, all but a rest.
    fn copy<'a>(
        &self,
        outgoing: &mut Outgoing,
        parts: &'a Parts,
        runs: bool,
        options: &MigrationOptions,
    ) -> Result<Rest<'a>, Error> {
        let is_tracking = self.configuration()?.track_dirty_pages;
        let mut changes = lock(&parts.changes);
        match runs {
            true => copy_of_running(outgoing, parts, &mut changes, is_tracking, options),
            false => Ok(Rest {
                pages: PageSet::empty([]),
                log: None,
                rounds: 0,
            }),
        }
    }

    /// Sends the last pages and the state of the paused machine, and gives up its disks.
    fn send_rest(
        &self,
        outgoing: &mut Outgoing,
        parts: &Parts,
        rest: &Rest<'_>,
        runs: bool,
    ) -> Result<(), Error> {
        let (pages, zeroes) = match &rest.log {
            Some(log) => {
                let mut pages = log.take(&mut lock(&parts.changes))?;
                pages.add(&rest.pages);
                (pages, Zeroes::Send)
            }
            // Not before: someone may have let it run for a while.
            None => {
                let pages = parts.memory.pages_with_content();
                (pages.map_err(unknown_pages)?, Zeroes::LeaveOut)
            }
        };
        outgoing.send_pages(&parts.memory, &pages, zeroes)?;
        let state = self.describe(parts)?;
        self.require_memory(&parts.memory)?;
        parts.devices.release_disks()?;
        outgoing.send_state(&state)?;
        // While nobody can let the machine go on here.
        *lock(&self.0.handed_over) = Some(runs);
        Ok(())
    }

    /// Returns what the paused machine is, besides its memory.
    fn describe(&self, parts: &Parts) -> Result<StateFile, Error> {
        let machine = self.read_state(parts)?;
        let regions = parts.memory.regions();
        let regions = regions.map(|region| (region.start.0, region.len));
        let facts = Facts::now(None, regions).map_err(Error::RandomSeed)?;
        let sections = machine.into_sections(None, Vec::new()).write()?;
        Ok(StateFile::new(NAME.as_ref(), facts, None, sections))
    }

    /// Ends the migration that is under way, if there is one: the machine goes on where it is. One that is just being handed
    /// over is moved nevertheless, or nobody knows where it is ([`Error::HandOver`]).
    pub fn cancel_migration(&self) {
        if let Some(breaker) = &*lock(&self.0.migration) {
            breaker.break_off();
        }
    }

    /// Lets a machine go on of which nobody knows whether it runs at the other end ([`Error::HandOver`]). The caller has
    /// made sure that it does not, and never did.
    ///
    /// # Errors
    /// If the machine was not handed over, or an image cannot be opened: it is in use if the machine runs at the other end.
    pub fn take_back(&self) -> Result<(), Error> {
        let _one_at_a_time = lock(&self.0.snapshots);
        let Some(runs) = *lock(&self.0.handed_over) else {
            return Err(Error::NotHandedOver);
        };
        self.0.devices("take the machine back")?.take_back_disks()?;
        *lock(&self.0.handed_over) = None;
        match runs {
            true => self.resume(),
            false => Ok(()),
        }
    }

    /// Checks that the machine is not one that may run elsewhere.
    pub(super) fn require_own(&self, action: &'static str) -> Result<(), Error> {
        match lock(&self.0.handed_over).is_some() {
            true => Err(Error::HandedOver { action }),
            false => Ok(()),
        }
    }
}

/// Sends the memory of a machine that runs, until the rest can be sent within the time for which the guest may stand still.
fn copy_of_running<'a>(
    outgoing: &mut Outgoing,
    parts: &'a Parts,
    changes: &mut Changes,
    is_tracking: bool,
    options: &MigrationOptions,
) -> Result<Rest<'a>, Error> {
    let begun = Instant::now();
    let log = WriteLog::start(parts, changes, is_tracking)?;
    let memory: &Arc<GuestMemory> = &parts.memory;
    let mut pages = memory.pages_with_content().map_err(unknown_pages)?;
    let mut zeroes = Zeroes::LeaveOut;
    let mut rounds = 0;
    loop {
        let (round_begun, sent_before) = (Instant::now(), outgoing.sent());
        outgoing.send_pages(memory, &pages, zeroes)?;
        outgoing.end_round()?;
        rounds += 1;
        let time = round_begun.elapsed();
        let sent = outgoing.sent() - sent_before;
        pages = log.take(changes)?;
        zeroes = Zeroes::Send;
        let left = (pages.len() * PAGE_SIZE) as u64;
        let time_left = expected(left, sent, time);
        tracing::debug!("round {rounds}: {sent} bytes in {time:?}, {left} bytes are left");
        if time_left <= options.downtime.saturating_sub(HAND_OVER_TIME) {
            break;
        }
        if begun.elapsed() >= options.timeout {
            match options.at_timeout {
                AtTimeout::Stop => break,
                AtTimeout::Cancel => {
                    return Err(Error::Converge {
                        mib: left.div_ceil(1 << 20),
                        downtime: options.downtime,
                    });
                }
            }
        }
    }
    Ok(Rest {
        pages,
        log: Some(log),
        rounds,
    })
}

/// Returns how long `left` bytes are expected to take if `sent` took `time`.
fn expected(left: u64, sent: u64, time: Duration) -> Duration {
    // A short round says little: a page takes as long as the answer.
    let sent = sent.max(1 << 20) as f64;
    time.mul_f64(left as f64 / sent)
}

fn unknown_pages(source: std::io::Error) -> Error {
    Error::resource("a list of the pages of guest memory")(source)
}

/// While it exists, the migration can be cancelled.
struct Cancel<'a>(&'a Controller);

impl<'a> Cancel<'a> {
    fn enable(controller: &'a Controller, breaker: Breaker) -> Cancel<'a> {
        *lock(&controller.0.migration) = Some(breaker);
        Cancel(controller)
    }
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        *lock(&self.0.0.migration) = None;
    }
}
