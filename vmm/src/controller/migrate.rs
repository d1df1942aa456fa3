//! Moving a machine to another process or host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_memory::{GuestMemory, PAGE_SIZE, PageSet};
use bantam_migration::{Compression, Connection, HandOver, Outgoing, Zeroes};
use bantam_snapshot::{Facts, StateFile};
use serde::{Deserialize, Serialize};

use super::Controller;
use super::migration_progress::{MigrationProgress, UnderWay};
use super::snapshot::Parts;
use super::throttle::Throttle;
use super::write_log::WriteLog;
use crate::command::{Answer, MigrationOrder};
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

/// How often in a row a round has to leave much before the machine is slowed down.
const PATIENT_ROUNDS: u32 = 2;

/// How a machine is moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// How much of its time the machine may lose at most, in percent, if it writes to its memory faster than that can be
    /// copied. It is slowed down in steps. 0 lets it run as fast as it can; more than 99 is 99.
    pub max_throttle: u8,
    /// How many connections [`Controller::migrate_to`] makes, over which pages are sent at once; at most
    /// [`MigrationOptions::MAX_CONNECTIONS`]. 0 is 1.
    pub connections: u8,
    /// How pages are compressed, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<Compression>,
    /// What the owner of the machine tells its owner at the other end ([`Arrival::note`](crate::Arrival::note)).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
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

impl MigrationOptions {
    /// Most connections of a migration.
    pub const MAX_CONNECTIONS: u8 = bantam_migration::MAX_CONNECTIONS;
}

impl Default for MigrationOptions {
    fn default() -> MigrationOptions {
        MigrationOptions {
            downtime: Duration::from_millis(50),
            timeout: Duration::from_secs(120),
            at_timeout: AtTimeout::Cancel,
            max_throttle: 99,
            connections: 1,
            compress: None,
            note: None,
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
    /// How much of its time the machine did not run at the end of that, in percent.
    pub throttle: u8,
}

/// What is left to be sent when the machine stands still.
struct Rest<'a> {
    pages: PageSet,
    /// Those that are written from now on; `None` for a machine that stands still already.
    log: Option<WriteLog<'a>>,
    rounds: u32,
    throttle: u8,
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
        let under_way = Arc::new(UnderWay::new(connection.breaker()));
        let _visible = Visible::new(self, &under_way);
        let runs = self.state() == State::Running;
        let parts = self.0.of_machine(ACTION, Parts::of)?;
        let (offer, _) = self.while_at_rest(false, || {
            self.while_paused(ACTION, |it| self.describe(it, options.note.clone()))
        })?;
        let mut outgoing = Outgoing::offer(connection, &offer, options.compress)?;
        under_way.begin_copy(outgoing.counters());
        // Its log is dropped when the machine has been handed over, as that takes a while.
        let rest = self.copy(&mut outgoing, &parts, &under_way, runs, options);
        let rest = rest.inspect_err(|error| outgoing.give_up(&error.to_string()))?;
        let stopped = Instant::now();
        let sent_rest = self.while_at_rest(true, || {
            self.while_paused(ACTION, |it| {
                let sent_rest = self.send_rest(&mut outgoing, it, &under_way, &rest, runs);
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
        let sent = outgoing.counters().sent();
        match outgoing.hand_over(runs) {
            HandOver::Done => {
                let migrated = Migrated {
                    downtime: stopped.elapsed(),
                    time: under_way.time(),
                    sent,
                    rounds: rest.rounds,
                    throttle: rest.throttle,
                };
                self.0.control().finish(Ok(ExitReason::Moved));
                Ok(migrated)
            }
            HandOver::Unknown(error) => Err(Error::HandOver(error)),
        }
    }

    /// Asks whoever receives machines at the other end of `connection` whether it could run this one
    /// ([`Arrival::answer_trial`](crate::Arrival::answer_trial)). Nothing of the machine changes, but it stands still for a
    /// moment, in which it is described.
    ///
    /// # Errors
    /// If the other end could not run it, or the connection fails.
    pub fn try_migrate(
        &self,
        connection: Connection,
        options: &MigrationOptions,
    ) -> Result<(), Error> {
        let _one_at_a_time = lock(&self.0.snapshots);
        let under_way = Arc::new(UnderWay::new(connection.breaker()));
        let _visible = Visible::new(self, &under_way);
        let (offer, _) = self.while_at_rest(false, || {
            self.while_paused(ACTION, |it| self.describe(it, options.note.clone()))
        })?;
        Ok(Outgoing::try_offer(&connection, &offer)?)
    }

    /// Moves the machine to whoever receives it at an address, or only asks whether that is possible
    /// ([`Command::Migrate`](crate::Command::Migrate)).
    ///
    /// # Errors
    /// Those of [`Controller::migrate`]; also if nobody listens there, the address has the name of a host
    /// ([`MigrationAddress::looked_up`](crate::MigrationAddress::looked_up)), or the way leads over a network that others
    /// may read, and that is not allowed.
    pub fn migrate_to(&self, order: &MigrationOrder) -> Result<Answer, Error> {
        // A look-up loads libraries of the host, which a process that is confined cannot do.
        if order.destination.names_a_host() {
            return Err(Error::NamedDestination {
                destination: order.destination.clone(),
            });
        }
        if !order.insecure && !order.destination.is_local() {
            return Err(Error::InsecureMigration);
        }
        let connections = order.options.connections;
        if connections > MigrationOptions::MAX_CONNECTIONS {
            return Err(Error::TooManyConnections {
                limit: MigrationOptions::MAX_CONNECTIONS,
            });
        }
        let mut connection = order.destination.connect()?;
        if order.dry_run {
            let asked = self.try_migrate(connection, &order.options);
            return asked.map(|()| Answer::Done);
        }
        for _ in 1..connections {
            connection.add(order.destination.connect()?);
        }
        self.migrate(connection, &order.options)
            .map(Answer::Migrated)
    }

    /// Sends the memory, all but a rest.
    fn copy<'a>(
        &self,
        outgoing: &mut Outgoing,
        parts: &'a Parts,
        under_way: &UnderWay,
        runs: bool,
        options: &MigrationOptions,
    ) -> Result<Rest<'a>, Error> {
        let is_tracking = self.configuration()?.track_dirty_pages;
        let mut changes = lock(&parts.changes);
        match runs {
            true => {
                let throttle = Throttle::new(self.0.control(), options.max_throttle);
                let log = WriteLog::start(parts, &mut changes, is_tracking)?;
                copy_of_running(outgoing, log, under_way, &mut changes, throttle, options)
            }
            false => Ok(Rest {
                pages: PageSet::empty([]),
                log: None,
                rounds: 0,
                throttle: 0,
            }),
        }
    }

    /// Sends the last pages and the state of the paused machine, and gives up its disks.
    fn send_rest(
        &self,
        outgoing: &mut Outgoing,
        parts: &Parts,
        under_way: &UnderWay,
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
        under_way.begin_round(&pages);
        outgoing.send_pages(&parts.memory, &pages, zeroes)?;
        let state = self.describe(parts, None)?;
        self.require_memory(&parts.memory)?;
        parts.devices.release_disks()?;
        outgoing.send_state(&state)?;
        // While nobody can let the machine go on here.
        *lock(&self.0.handed_over) = Some(runs);
        Ok(())
    }

    /// Returns what the paused machine is, besides its memory.
    fn describe(&self, parts: &Parts, note: Option<String>) -> Result<StateFile, Error> {
        let machine = self.read_state(parts)?;
        let regions = parts.memory.regions();
        let regions = regions.map(|region| (region.start.0, region.len));
        let facts = Facts::now(None, regions).map_err(Error::RandomSeed)?;
        let sections = machine.into_sections(note, Vec::new()).write()?;
        Ok(StateFile::new(NAME.as_ref(), facts, None, sections))
    }

    /// Ends the migration that is under way, if there is one: the machine goes on where it is. One that is just being handed
    /// over is moved nevertheless, or nobody knows where it is ([`Error::HandOver`]).
    pub fn cancel_migration(&self) {
        if let Some(under_way) = &*lock(&self.0.migration) {
            under_way.breaker.break_off();
        }
    }

    /// Returns how far the migration is that is under way; `None` if there is none.
    pub fn migration_progress(&self) -> Option<MigrationProgress> {
        let under_way = lock(&self.0.migration).clone();
        under_way.map(|it| it.progress())
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
    log: WriteLog<'a>,
    under_way: &UnderWay,
    changes: &mut Changes,
    mut throttle: Throttle,
    options: &MigrationOptions,
) -> Result<Rest<'a>, Error> {
    let begun = Instant::now();
    let memory: &Arc<GuestMemory> = log.memory();
    let mut pages = memory.pages_with_content().map_err(unknown_pages)?;
    let mut zeroes = Zeroes::LeaveOut;
    let (mut rounds, mut slow_rounds, mut share) = (0, 0, 0);
    loop {
        let (round_begun, sent_before) = (Instant::now(), outgoing.counters().sent());
        under_way.begin_round(&pages);
        outgoing.send_pages(memory, &pages, zeroes)?;
        outgoing.end_round()?;
        rounds += 1;
        let time = round_begun.elapsed();
        let sent = outgoing.counters().sent() - sent_before;
        pages = log.take(changes)?;
        zeroes = Zeroes::Send;
        let left = (pages.len() * PAGE_SIZE) as u64;
        let time_left = expected(left, sent, time);
        under_way.expect_downtime(time_left + HAND_OVER_TIME);
        tracing::debug!("round {rounds}: {sent} bytes in {time:?}, {left} bytes are left");
        if time_left + HAND_OVER_TIME <= options.downtime.max(HAND_OVER_TIME) {
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
        slow_rounds = if left > sent / 2 { slow_rounds + 1 } else { 0 };
        if slow_rounds == PATIENT_ROUNDS {
            slow_rounds = 0;
            share = throttle.slow_down()?;
            under_way.throttle(share);
        }
    }
    Ok(Rest {
        pages,
        log: Some(log),
        rounds,
        throttle: share,
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

/// While it exists, others can ask how far the migration is, and cancel it.
struct Visible<'a>(&'a Controller);

impl<'a> Visible<'a> {
    fn new(controller: &'a Controller, under_way: &Arc<UnderWay>) -> Visible<'a> {
        *lock(&controller.0.migration) = Some(under_way.clone());
        Visible(controller)
    }
}

impl Drop for Visible<'_> {
    fn drop(&mut self) {
        *lock(&self.0.0.migration) = None;
    }
}
