//! The worker: it serves the driver's doorbells and the host's descriptors.

use std::cell::Cell;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, ThreadId};
use std::time::Instant;

use bantam_state::{SaveError, Section};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::control_queue::ControlQueue;
use super::port::{LAST_OUTPUT_LIMIT, Port};
use super::source::Source;
use super::state::WorkerState;
use super::{DriverError, Shared};
use crate::virtio::{Activation, DriverLink, MAX_TURN, VirtQueue};
use crate::worker::{QueueProgress, VirtioWorker};

/// Index of the control queue on which the driver receives; the other one follows.
const CONTROL_QUEUE: usize = 2;

pub(super) struct Worker {
    shared: Arc<Shared>,
    link: Arc<DriverLink>,
    ports: Vec<Port>,
    /// `None` for a driver that supports only one port.
    control: Option<ControlQueue>,
    /// Number of the device's queues, including those that the driver does not know of.
    queue_count: usize,
    /// The thread of the event loop, while it is on one.
    thread: Option<ThreadId>,
    /// Whether this worker was saved since it was paused, so that another one may send what is left in the
    /// queues.
    is_saved: Cell<bool>,
}

/// The role of the queue with a given index. Those on which the driver receives are even.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Port(usize),
    Control,
}

fn role_of_queue(queue: usize) -> Role {
    match queue / 2 {
        0 => Role::Port(0),
        1 => Role::Control,
        pair => Role::Port(pair - 1),
    }
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        names: &Arc<[String]>,
        activation: Activation,
    ) -> Result<Worker, String> {
        let Activation {
            memory,
            features,
            queues,
            link,
            state,
        } = activation;
        let queue_count = queues.len();
        let is_multiport = features & super::feature::MULTIPORT != 0;
        let mut queues = queues.into_iter();
        let mut pairs = std::iter::from_fn(|| Some([queues.next()?, queues.next()?]));
        let port = |index, pair| Port::new(index, shared.clone(), link.clone(), pair, &memory);
        let Some(first) = pairs.next() else {
            return Err("a console device has two queues at least".to_string());
        };
        let mut ports = vec![port(0, first)];
        let mut control = None;
        if is_multiport {
            let Some([receive, transmit]) = pairs.next() else {
                return Err("a console device of several ports has control queues".to_string());
            };
            control = Some(ControlQueue::new(receive, transmit, names.clone(), &memory));
            ports.extend(pairs.zip(1..).map(|(pair, index)| port(index, pair)));
        }
        let mut worker = Worker {
            ports,
            control,
            queue_count,
            thread: None,
            is_saved: Cell::new(false),
            link,
            shared,
        };
        if let Some(state) = state {
            worker.restore(state.decode().map_err(|error| error.to_string())?)?;
        }
        Ok(worker)
    }

    /// Takes over the state of an earlier worker, if that worker had the same kind of driver.
    fn restore(&mut self, state: WorkerState) -> Result<(), String> {
        if state.ports.len() != self.ports.len() {
            return Err(format!(
                "the driver knows of {} ports, and there are {}",
                state.ports.len(),
                self.ports.len()
            ));
        }
        match (&mut self.control, state.control) {
            (Some(control), Some(state)) => control.restore(state)?,
            (None, None) => {}
            _ => return Err("its control queues are those of another driver".to_string()),
        }
        for (port, state) in self.ports.iter_mut().zip(state.ports) {
            port.restore(state);
        }
        Ok(())
    }

    /// Returns the queues with their indices, without those that this driver does not use.
    fn doorbells(&self) -> Vec<(usize, &VirtQueue)> {
        let control = self.control.as_ref().map(ControlQueue::queues);
        let first = self.ports.first().map(Port::queues);
        let others = self.ports.iter().skip(1).map(Port::queues);
        let mut doorbells: Vec<_> = first.into_iter().flatten().enumerate().collect();
        let rest = control.into_iter().chain(others).flatten();
        doorbells.extend((CONTROL_QUEUE..).zip(rest));
        doorbells
    }

    fn begin(&mut self, operations: &mut EventOps<'_>) -> event_manager::Result<()> {
        for (queue, doorbell) in self.doorbells() {
            // Edge-triggered, so that no call is spent on reading the doorbell.
            let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let (fd, token) = (doorbell.as_raw_fd(), Source::Doorbell(queue).token());
            operations.add(Events::with_data_raw(fd, token, readiness))?;
        }
        for port in 0..self.ports.len() {
            if let Some(mut host) = self.shared.host(port) {
                host.begin(port, operations)?;
            }
        }
        Ok(())
    }

    fn handle(
        &mut self,
        source: Source,
        ready: EventSet,
        operations: &mut EventOps<'_>,
    ) -> Result<(), DriverError> {
        let role = match source {
            Source::Doorbell(queue) => role_of_queue(queue),
            Source::Listener(port) | Source::Input(port) | Source::Output(port) => {
                if let Some(mut host) = self.shared.host(port) {
                    host.note_readiness(source, ready);
                }
                Role::Port(port)
            }
        };
        match role {
            Role::Port(port) => self.work(port, operations)?,
            Role::Control => self.take_messages(operations)?,
        }
        self.tell()
    }

    fn work(&mut self, port: usize, operations: &mut EventOps<'_>) -> Result<(), DriverError> {
        let control = self.control.as_ref();
        let may_accept = !control.is_some_and(|control| control.is_told_open(port));
        match self.ports.get_mut(port) {
            Some(port) => port.work(may_accept, operations),
            None => Ok(()),
        }
    }

    fn take_messages(&mut self, operations: &mut EventOps<'_>) -> Result<(), DriverError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let start = Instant::now();
        for change in control.take_messages(&self.link)? {
            let Some(port) = self.ports.get_mut(change.port) else {
                continue;
            };
            port.set_guest_open(change.open);
            // The rest gets its own turn.
            match start.elapsed() < MAX_TURN {
                true => self.work(change.port, operations)?,
                false => port.call_again(),
            }
        }
        Ok(())
    }

    /// Tells the driver what has changed.
    fn tell(&mut self) -> Result<(), DriverError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let ports = &self.ports;
        let is_connected = |port: usize| ports.get(port).is_some_and(Port::is_connected);
        // Another client may be waiting for this.
        for port in control.tell(is_connected, &self.link)? {
            if let Some(port) = self.ports.get(port) {
                port.call_again();
            }
        }
        Ok(())
    }
}

impl VirtioWorker for Worker {
    /// Puts output that a slow reader has not taken back into the queues: to keep it here would let the guest
    /// use any amount of memory. Input is put into the guest's buffers in the turn that reads it.
    fn pause(&mut self) -> io::Result<()> {
        for port in &mut self.ports {
            port.pause();
        }
        self.thread = None;
        Ok(())
    }

    fn progress(&self) -> Vec<QueueProgress> {
        let mut progress = vec![QueueProgress::default(); self.queue_count];
        for (index, queue) in self.doorbells() {
            if let Some(progress) = progress.get_mut(index) {
                *progress = queue.progress();
            }
        }
        progress
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        let section = Section::of(&WorkerState {
            ports: self.ports.iter().map(Port::save).collect(),
            control: self.control.as_ref().map(ControlQueue::save),
        })?;
        self.is_saved.set(true);
        Ok(Some(section))
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        self.thread = Some(thread::current().id());
        self.is_saved.set(false);
        if let Err(error) = self.begin(operations) {
            self.link.need_reset(&error);
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if self.link.needs_reset() {
            return;
        }
        let source = Source::of_token(events.data());
        if let Err(error) = self.handle(source, events.event_set(), operations) {
            self.shared.metrics.event_fails.add(1);
            self.link.need_reset(&error);
        }
    }
}

impl Drop for Worker {
    /// Sends the remaining output, and waits for its readers only on the event loop's thread, which drops the
    /// worker at the machine's end. After a reset a vCPU drops it, and during a pause the machine's owner
    /// does; neither must wait for a reader of the host. Output that another worker may send is left to that
    /// one.
    fn drop(&mut self) {
        self.shared.is_active.store(false, Ordering::Release);
        let is_at_end = self.thread == Some(thread::current().id());
        let deadline = is_at_end.then(|| Instant::now() + LAST_OUTPUT_LIMIT);
        for port in &mut self.ports {
            if !self.link.needs_reset() && !self.is_saved.get() {
                port.send_last_output(deadline);
            }
            port.end();
        }
    }
}
