//! Looks after a machine from time to time: whether its power is to be cut, and whether its vCPUs have
//! halted for good.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::config::OnHalt;
use crate::exit_reason::ExitReason;
use crate::run_control::RunControl;
use crate::vcpu_statistics::{HaltCounters, VcpuStatistics};

/// A part of the machine's event loop that is called each second.
///
/// Whether a vCPU has halted with interrupts off is in its registers, and those are only within reach
/// when it is out of the guest. An idle guest is not to be disturbed by that, so first comes what costs
/// it nothing: KVM's own counters say that all vCPUs wait, and have not done anything else for a second.
/// Only then are they taken out of the guest, and not again until one of them has halted anew.
pub(crate) struct Watch {
    control: Arc<RunControl>,
    on_halt: OnHalt,
    vcpus: Vec<VcpuStatistics>,
    counters: Option<HaltCounters>,
    rest: Option<Rest>,
}

/// A time in which no vCPU has done anything.
struct Rest {
    /// How often each has halted so far.
    halts: Vec<u64>,
    known: Known,
}

/// What is known of a rest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Nothing,
    /// The vCPUs have been asked.
    Asked,
    /// Whether it is for good, which has been seen to.
    All,
}

impl Watch {
    /// A watch over vCPUs that count in `vcpus`; over none if KVM does not count.
    pub(crate) fn new(
        control: Arc<RunControl>,
        on_halt: OnHalt,
        vcpus: Vec<VcpuStatistics>,
    ) -> Watch {
        Watch {
            control,
            on_halt,
            vcpus,
            counters: None,
            rest: None,
        }
    }

    fn look_for_halt(&mut self) {
        let Some(halts) = self.halts_if_all_wait() else {
            self.rest = None;
            return;
        };
        let rest = match &mut self.rest {
            Some(rest) if rest.halts == halts => rest,
            rest => {
                *rest = Some(Rest {
                    halts,
                    known: Known::Nothing,
                });
                return;
            }
        };
        rest.known = match rest.known {
            Known::Nothing => {
                self.control.ask_whether_halted(self.vcpus.len());
                Known::Asked
            }
            Known::Asked => match self.control.halt_answer() {
                None => Known::Asked,
                Some(false) => {
                    tracing::debug!("the vCPUs are idle");
                    Known::All
                }
                Some(true) => {
                    halted_for_good(&self.control, self.on_halt);
                    Known::All
                }
            },
            Known::All => Known::All,
        };
    }

    fn halts_if_all_wait(&mut self) -> Option<Vec<u64>> {
        let counters = match self.counters {
            Some(counters) => counters,
            None => self.find_counters()?,
        };
        let halts = self.vcpus.iter();
        halts.map(|vcpu| vcpu.halts_if_waiting(counters)).collect()
    }

    fn find_counters(&mut self) -> Option<HaltCounters> {
        match self.vcpus.first()?.halt_counters() {
            Ok(counters) => {
                self.counters = Some(counters);
                Some(counters)
            }
            Err(error) => {
                tracing::debug!("cannot see whether vCPUs halt: {error}");
                self.vcpus.clear();
                None
            }
        }
    }
}

fn halted_for_good(control: &RunControl, on_halt: OnHalt) {
    match on_halt {
        // Nothing more will come of it.
        _ if control.has_panicked() => control.finish(Ok(ExitReason::Panic)),
        OnHalt::Wait => tracing::warn!(
            "the guest has halted for good: no interrupt can wake any of its vCPUs; the machine waits \
             for somebody to end it"
        ),
        OnHalt::Exit => control.finish(Ok(ExitReason::Halted)),
    }
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        let alarm = self.control.alarm();
        if let Err(error) = operations.add(Events::new_raw(alarm, EventSet::IN)) {
            tracing::error!("cannot look after the machine: {error}");
        }
        self.control.set_alarm();
    }

    fn process(&mut self, _events: Events, _operations: &mut EventOps<'_>) {
        self.control.set_alarm();
        self.look_for_halt();
    }
}
