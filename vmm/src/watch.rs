//! Checks a machine from time to time: whether its power is to be cut, and whether its vCPUs have halted for
//! good.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::config::OnHalt;
use crate::exit_reason::ExitReason;
use crate::run_control::RunControl;
use crate::vcpu_statistics::{HaltCounters, VcpuStatistics};

/// A part of the machine's event loop that checks the machine each second.
///
/// The registers of a vCPU show whether it has halted with interrupts off, but they can be read only when it
/// is out of the guest. To leave an idle guest undisturbed, this first reads KVM's own counters, which costs
/// the guest nothing: they must show that all vCPUs wait, and have done nothing else for a second. Only then
/// are the vCPUs taken out of the guest, and not again until one of them has halted anew.
pub(crate) struct Watch {
    control: Arc<RunControl>,
    on_halt: OnHalt,
    vcpus: Vec<VcpuStatistics>,
    counters: Option<HaltCounters>,
    rest: Option<Rest>,
}

/// A period in which no vCPU has done anything.
struct Rest {
    /// How often each vCPU has halted so far.
    halts: Vec<u64>,
    known: Known,
}

/// What is known about a rest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Nothing,
    /// The vCPUs have been asked.
    Asked,
    /// Whether it is for good, and that has been acted on.
    All,
}

impl Watch {
    /// Creates a watch over the vCPUs whose statistics are `vcpus`, or over none if KVM does not have them.
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
        // The guest will not do anything more after its panic.
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
