//! The worker: it moves packets between the queues and the backend, and obeys the driver's commands.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use bantam_state::{SaveError, Section};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};

use super::backend::{NetBackend, NetQueue};
use super::config::{
    MacAddress, has_link, is_station_address, mac, set_announce, set_link, set_mac,
};
use super::control_queue::{Command, ControlQueue};
use super::dropped::DroppedPackets;
use super::expected_size::ExpectedSize;
use super::filter::ReceiveFilter;
use super::flow::Flow;
use super::local_port::LocalPort;
use super::receive::Receiver;
use super::reconnection::Reconnection;
use super::ring_store::{PairRings, RingStore};
use super::shared::{Direction, Shared};
use super::state::WorkerState;
use super::transmit::Transmitter;
use super::{
    DriverError, GUEST_OFFLOADS, GUEST_SEGMENTATION, Halt, MAX_FRAME_HEADER_SIZE, MAX_PACKET_SIZE,
    offloads,
};
use crate::tap::PACKET_HEADER_SIZE;
use crate::virtio::{Activation, ConfigSpace, DriverLink};
use crate::worker::{QueueProgress, VirtioWorker};

/// A source of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    ControlDoorbell,
    /// The doorbell of the receive queue of a pair.
    ReceiveDoorbell(usize),
    /// The doorbell of the transmit queue of a pair.
    TransmitDoorbell(usize),
    /// The queue of the backend that belongs to a pair.
    Backend(usize),
    /// The timer of the limits of reception.
    ReceiveLimit,
    /// The timer of the limits of transmission.
    TransmitLimit,
    /// The timer of the local endpoint.
    LocalTimer,
    /// The timer of attempts to reach the backend's other side again.
    Reconnection,
}

impl Source {
    /// Returns the source's event token.
    fn token(self) -> u32 {
        let (kind, pair) = match self {
            Source::ControlDoorbell => (0, 0),
            Source::ReceiveDoorbell(pair) => (1, pair),
            Source::TransmitDoorbell(pair) => (2, pair),
            Source::Backend(pair) => (3, pair),
            Source::ReceiveLimit => (4, 0),
            Source::TransmitLimit => (5, 0),
            Source::LocalTimer => (6, 0),
            Source::Reconnection => (7, 0),
        };
        (pair as u32) << 3 | kind
    }

    fn of_token(token: u32) -> Source {
        let pair = (token >> 3) as usize;
        match token & 7 {
            0 => Source::ControlDoorbell,
            1 => Source::ReceiveDoorbell(pair),
            2 => Source::TransmitDoorbell(pair),
            3 => Source::Backend(pair),
            4 => Source::ReceiveLimit,
            5 => Source::TransmitLimit,
            6 => Source::LocalTimer,
            _ => Source::Reconnection,
        }
    }
}

/// A receive queue and a transmit queue, and their state with respect to their queue of the backend.
struct QueuePair {
    receiver: Receiver,
    transmitter: Transmitter,
    receive_halt: Halt,
    transmit_halt: Halt,
    /// The events that the event loop watches the backend's queue for, if it does.
    watched: Option<EventSet>,
}

impl QueuePair {
    fn ring_doorbells(&self) {
        self.receiver.ring_doorbell();
        self.transmitter.ring_doorbell();
    }
}

pub(super) struct Worker {
    backend: Arc<dyn NetBackend>,
    /// Where the rings of the pairs are for another worker.
    rings: Arc<RingStore>,
    /// Attempts to reach the backend's other side again, if it can come back.
    reconnection: Option<Reconnection>,
    pairs: Vec<QueuePair>,
    /// How many of the pairs the driver uses, counted from the first.
    pairs_in_use: usize,
    /// The pair that is served first when limits allow more: each in turn, or the first would get everything.
    first_pair: usize,
    received: Flow,
    transmitted: Flow,
    shared: Arc<Shared>,
    control: Option<ControlQueue>,
    /// How far each queue has come, for the queues that the worker does not use.
    unused: Vec<QueueProgress>,
    local_port: Option<LocalPort>,
    features: u64,
    /// The guest offloads in use, as feature bits.
    offloads: u64,
    filter: ReceiveFilter,
    config: Arc<ConfigSpace>,
    /// The address that the card gets back for the next driver.
    own_mac: MacAddress,
    dropped: DroppedPackets,
    link: Arc<DriverLink>,
}

impl Worker {
    /// With the backend and the rings of `rings`, for packets of at most `mtu` bytes, as far as neither
    /// side leaves segmentation to the other, on a card whose own address is `own_mac`.
    ///
    /// The order of the queues is in section 5.1.2: the two of each pair one after the other, then the
    /// control queue. The driver knows of more than one pair only with the feature `MQ`.
    pub(super) fn new(
        rings: Arc<RingStore>,
        mtu: u16,
        own_mac: MacAddress,
        config: Arc<ConfigSpace>,
        shared: Arc<Shared>,
        local_port: Option<LocalPort>,
        activation: Activation,
    ) -> Result<Worker, String> {
        let Activation {
            memory,
            features,
            queues,
            link,
            state,
        } = activation;
        let usual_size = PACKET_HEADER_SIZE + MAX_FRAME_HEADER_SIZE + usize::from(mtu);
        let largest_size = if features & GUEST_SEGMENTATION != 0 {
            MAX_PACKET_SIZE
        } else {
            usual_size
        };
        let backend = rings.backend().clone();
        let reconnection = match backend.can_reconnect() {
            true => Some(Reconnection::new().map_err(|error| error.to_string())?),
            false => None,
        };
        let merges_buffers = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let pair_count = if features & 1 << VIRTIO_NET_F_MQ != 0 {
            backend.queue_count()
        } else {
            1
        };
        let mut queues = queues.into_iter();
        let mut pairs = Vec::with_capacity(pair_count);
        for _ in 0..pair_count {
            let (Some(receive_queue), Some(transmit_queue)) = (queues.next(), queues.next()) else {
                return Err(format!("{pair_count} pairs of queues have too few queues"));
            };
            let PairRings { receive, transmit } = rings.take(pairs.len());
            pairs.push(QueuePair {
                receiver: Receiver::new(
                    receive_queue,
                    &memory,
                    merges_buffers,
                    ExpectedSize::new(usual_size, largest_size),
                    receive,
                )?,
                transmitter: Transmitter::new(transmit_queue, &memory, transmit),
                receive_halt: Halt::Driver,
                transmit_halt: Halt::Driver,
                watched: None,
            });
        }
        let control = (features & 1 << VIRTIO_NET_F_CTRL_VQ != 0)
            .then(|| queues.next())
            .flatten()
            .map(|queue| ControlQueue::new(queue, &memory, features));
        let unused = queues.map(|queue| queue.progress()).collect();
        let mut worker = Worker {
            dropped: DroppedPackets::new(link.clone(), backend.clone(), shared.clone()),
            first_pair: 0,
            received: Flow::new(shared.clone(), Direction::Receive),
            transmitted: Flow::new(shared.clone(), Direction::Transmit),
            shared,
            backend,
            rings,
            reconnection,
            pairs,
            pairs_in_use: 1,
            control,
            unused,
            local_port,
            features,
            offloads: features & GUEST_OFFLOADS,
            filter: ReceiveFilter::new(),
            own_mac,
            config,
            link,
        };
        if let Some(state) = state {
            let state = state.decode().map_err(|error| error.to_string())?;
            worker.restore(state)?;
        }
        worker.show_link();
        Ok(worker)
    }

    /// Takes over the state of another worker whose driver had accepted the same features.
    fn restore(&mut self, state: WorkerState) -> Result<(), String> {
        let WorkerState {
            filter,
            offloads: offloads_in_use,
            pairs_in_use,
            receivers,
        } = state;
        let pairs_in_use = usize::from(pairs_in_use);
        if offloads_in_use & !(self.features & GUEST_OFFLOADS) != 0 {
            return Err(format!(
                "the driver uses offloads {offloads_in_use:#x} that it did not accept"
            ));
        }
        if !(1..=self.pairs.len()).contains(&pairs_in_use) || receivers.len() != self.pairs.len() {
            return Err(format!(
                "{pairs_in_use} of {} pairs of queues are in use, and the driver has {}",
                receivers.len(),
                self.pairs.len()
            ));
        }
        if !filter.is_valid() {
            return Err("the receive filter has too many addresses".to_owned());
        }
        for (pair, state) in self.pairs.iter_mut().zip(receivers) {
            self.shared.metrics.rx_fails.add(state.undelivered);
            pair.receiver.restore(state)?;
        }
        let mut done = self.backend.use_queues(pairs_in_use);
        if offloads_in_use != self.offloads {
            done = done.and_then(|()| self.backend.set_offloads(offloads(offloads_in_use)));
        }
        done.map_err(|error| format!("cannot set up {}: {error}", self.backend.label()))?;
        self.offloads = offloads_in_use;
        self.pairs_in_use = pairs_in_use;
        self.filter = filter;
        self.apply_filter();
        self.ask_for_announcement();
        Ok(())
    }

    /// Asks the driver to announce the card, in case it is at another place of its network now: until then,
    /// switches send its frames to where it was.
    fn ask_for_announcement(&self) {
        if self.control.is_some() && self.features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0 {
            set_announce(&self.config, true);
            self.link.notify_configuration_change();
        }
    }

    /// Whether the backend's other side is gone. Packets of the guest then go nowhere, as from a card whose cable is
    /// pulled.
    fn backend_is_gone(&self) -> bool {
        self.rings.backend_is_gone()
    }

    /// Shows the driver whether there is a link, if that has changed.
    fn show_link(&self) {
        let is_up = !self.backend_is_gone();
        if has_link(&self.config) != is_up {
            set_link(&self.config, is_up);
            if self.features & 1 << VIRTIO_NET_F_STATUS != 0 {
                self.link.notify_configuration_change();
            }
        }
    }

    fn handle(&mut self, source: Source, ready: EventSet) -> Result<(), DriverError> {
        let metrics = &self.shared.metrics;
        match source {
            Source::ControlDoorbell => self.obey_commands(),
            Source::ReceiveDoorbell(pair) => {
                metrics.rx_queue_event_count.add(1);
                self.receive(pair)
            }
            Source::TransmitDoorbell(pair) => {
                metrics.tx_queue_event_count.add(1);
                self.transmit(pair)
            }
            Source::ReceiveLimit => {
                metrics.rx_event_rate_limiter_count.add(1);
                self.received.throttle().clear()?;
                for pair in self.pairs_in_turn() {
                    if self.pairs[pair].receive_halt == Halt::Limit {
                        self.receive(pair)?;
                    }
                }
                Ok(())
            }
            Source::TransmitLimit => {
                metrics.tx_rate_limiter_event_count.add(1);
                self.transmitted.throttle().clear()?;
                for pair in self.pairs_in_turn() {
                    if self.pairs[pair].transmit_halt == Halt::Limit {
                        self.transmit(pair)?;
                    }
                }
                Ok(())
            }
            Source::Backend(pair) => {
                metrics
                    .rx_tap_event_count
                    .add(ready.contains(EventSet::IN).into());
                if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) {
                    self.lose_backend();
                }
                if ready.contains(EventSet::IN) {
                    self.receive(pair)?;
                }
                let waits = |pair: &QueuePair| pair.transmit_halt == Halt::Backend;
                if self.pairs.get(pair).is_some_and(waits) {
                    self.transmit(pair)?;
                }
                Ok(())
            }
            Source::LocalTimer => self.serve_local(),
            Source::Reconnection => {
                self.reconnect();
                Ok(())
            }
        }
    }

    /// Iterates over the pairs in use, beginning with a different one each time.
    fn pairs_in_turn(&mut self) -> impl Iterator<Item = usize> + use<> {
        let count = self.pairs_in_use;
        self.first_pair = (self.first_pair + 1) % count;
        let first = self.first_pair;
        (0..count).map(move |index| (first + index) % count)
    }

    /// Receives on one pair, for one turn at most.
    fn receive(&mut self, index: usize) -> Result<(), DriverError> {
        self.receive_from_backend(index)?;
        match &self.local_port {
            Some(local_port) if index == 0 && local_port.has_frames() => self.serve_local(),
            _ => Ok(()),
        }
    }

    fn receive_from_backend(&mut self, index: usize) -> Result<(), DriverError> {
        let (Some(pair), Some(queue)) = (
            self.pairs[..self.pairs_in_use].get_mut(index),
            self.backend.queue(index),
        ) else {
            return Ok(());
        };
        if self.rings.backend_is_gone() {
            return Ok(());
        }
        pair.receive_halt =
            pair.receiver
                .receive(queue, &mut self.received, &self.link, &mut self.dropped)?;
        if pair.receive_halt == Halt::Backend && queue.has_packets() {
            // The turn has ended before the packets did, and the backend does not tell of them again.
            pair.receiver.ring_doorbell();
        }
        match pair.receive_halt {
            Halt::Driver => self.shared.metrics.no_rx_avail_buffer.add(1),
            Halt::BackendGone => self.lose_backend(),
            Halt::Backend | Halt::Limit => {}
        }
        Ok(())
    }

    /// Transmits on one pair, for one turn at most.
    fn transmit(&mut self, index: usize) -> Result<(), DriverError> {
        let Some(pair) = self.pairs[..self.pairs_in_use].get_mut(index) else {
            return Ok(());
        };
        let queue = self
            .backend
            .queue(index)
            .filter(|_| !self.rings.backend_is_gone());
        let metrics = &self.shared.metrics;
        if pair.transmitter.waiting()? == 0 {
            metrics.no_tx_avail_buffer.add(1);
        }
        let halt = pair.transmitter.transmit(
            queue,
            &mut self.transmitted,
            &mut self.local_port,
            &self.link,
            &mut self.dropped,
        );
        if let Some(queue) = queue {
            queue.flush();
        }
        pair.transmit_halt = halt?;
        let left = pair.transmitter.waiting()?;
        metrics.tx_remaining_reqs_count.add(left.into());
        if pair.transmit_halt == Halt::BackendGone {
            self.lose_backend();
        }
        if let Some(local_port) = &self.local_port
            && local_port.has_taken()
        {
            self.serve_local()?;
        }
        // Packets of the driver can have answers at once.
        let queue = self.backend.queue(index);
        if queue.is_some_and(NetQueue::has_packets)
            && self.pairs[index].receive_halt == Halt::Backend
        {
            return self.receive(index);
        }
        Ok(())
    }

    /// Has the local endpoint do its work. Its frames go to the first pair, which is always in use.
    fn serve_local(&mut self) -> Result<(), DriverError> {
        let (Some(local_port), Some(pair)) = (&mut self.local_port, self.pairs.first_mut()) else {
            return Ok(());
        };
        let delivered = local_port.serve(
            &mut pair.receiver,
            &mut self.received,
            &self.link,
            &mut self.dropped,
        )?;
        // Packets of the backend wait for buffers too, and the doorbell may have been switched off meanwhile.
        if delivered && pair.receive_halt == Halt::Driver {
            pair.receiver.ring_doorbell();
        }
        Ok(())
    }

    /// Takes note that the backend is gone. From now on the driver's packets are dropped, including those that
    /// have waited for the backend.
    fn lose_backend(&mut self) {
        if self.rings.set_backend_is_gone(true) {
            return;
        }
        let label = self.backend.label();
        match &mut self.reconnection {
            Some(reconnection) => {
                self.link.warn_of_host(format_args!(
                    "{label} has ended the connection; the guest has no network on this card until it is there again"
                ));
                reconnection.lose();
            }
            None => self.link.warn_of_host(format_args!(
                "{label} has been removed; the guest has no network on this card until the machine is \
                 started anew"
            )),
        }
        self.show_link();
        for pair in &self.pairs {
            pair.transmitter.ring_doorbell();
        }
    }

    /// Tries to reach the backend's other side again.
    fn reconnect(&mut self) {
        let Some(reconnection) = &mut self.reconnection else {
            return;
        };
        if !self.rings.backend_is_gone() {
            return;
        }
        if self.backend.reconnect().is_err() {
            return reconnection.fail();
        }
        reconnection.succeed();
        self.rings.set_backend_is_gone(false);
        tracing::info!(
            "{}: {} is connected again",
            self.link.name(),
            self.backend.label()
        );
        self.show_link();
        // The other side may be another program, which has yet to learn where the guest is.
        self.ask_for_announcement();
        for pair in &self.pairs[..self.pairs_in_use] {
            pair.ring_doorbells();
        }
    }

    fn obey_commands(&mut self) -> Result<(), DriverError> {
        let Some(mut control) = self.control.take() else {
            return Ok(());
        };
        let link = self.link.clone();
        let result = control.serve(&link, |command| self.obey(command));
        self.control = Some(control);
        result
    }

    /// Carries out a command of the driver; `false` if that is not possible.
    fn obey(&mut self, command: Command) -> Result<bool, DriverError> {
        match command {
            Command::Mode(mode, on) => {
                self.filter.set_mode(mode, on);
                self.apply_filter();
                Ok(true)
            }
            Command::AddressTable { unicast, multicast } => {
                self.filter.set_table(unicast, multicast);
                self.apply_filter();
                Ok(true)
            }
            Command::Address(address) => {
                let valid = is_station_address(address);
                if valid {
                    set_mac(&self.config, address);
                    self.shared.metrics.mac_address_updates.add(1);
                    self.apply_filter();
                }
                Ok(valid)
            }
            Command::AnnounceSeen => {
                set_announce(&self.config, false);
                Ok(true)
            }
            Command::QueuePairs(count) => self.use_pairs(count.into()),
            Command::Offloads(wanted) => {
                let negotiated = self.features & GUEST_OFFLOADS;
                let done = wanted & !negotiated == 0
                    && (self.backend_is_gone()
                        || self.backend.set_offloads(offloads(wanted)).is_ok());
                if done {
                    self.offloads = wanted;
                }
                Ok(done)
            }
        }
    }

    /// Has the host filter frames, which spares the monitor and the guest the most work. The driver must cope
    /// with frames that it does not want, so it need not know if that fails.
    fn apply_filter(&self) {
        if self.backend_is_gone() {
            return;
        }
        let filter = self.filter.for_tap(mac(&self.config));
        if let Err(error) = self.backend.set_filter(&filter) {
            self.link.warn(format_args!(
                "cannot set which frames {} passes to the guest, which thus has too many: {error}",
                self.backend.label()
            ));
        }
    }

    fn use_pairs(&mut self, count: usize) -> Result<bool, DriverError> {
        if !(1..=self.pairs.len()).contains(&count) {
            return Ok(false);
        }
        // Packets that the driver has left in queues that it will not use are sent now. Those that may not be
        // sent now are dropped: nothing would serve them later.
        for index in count..self.pairs_in_use {
            self.transmit(index)?;
            self.pairs[index].transmitter.transmit(
                None,
                &mut self.transmitted,
                &mut self.local_port,
                &self.link,
                &mut self.dropped,
            )?;
        }
        if !self.backend_is_gone()
            && let Err(error) = self.backend.use_queues(count)
        {
            self.link.warn(format_args!(
                "cannot use {count} queues of {}: {error}",
                self.backend.label()
            ));
            return Ok(false);
        }
        // Chains that the driver made available in them before are waiting.
        for pair in self.pairs[..count].iter().skip(self.pairs_in_use) {
            pair.ring_doorbells();
        }
        self.pairs_in_use = count;
        Ok(true)
    }

    /// Has the event loop watch the backend for the events that the worker waits for. An error of it is
    /// reported even if none are asked for, so it is not watched once it is gone, nor while the
    /// device needs a reset. A queue that is not in use, which is always in error, is not watched either.
    fn watch_backend(&mut self, operations: &mut EventOps<'_>) {
        let at_rest = self.backend_is_gone() || self.link.needs_reset();
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let Some(queue) = self.backend.queue(index) else {
                break;
            };
            let wanted = if at_rest || index >= self.pairs_in_use {
                None
            } else {
                let mut readiness = EventSet::empty();
                readiness.set(EventSet::IN, pair.receive_halt == Halt::Backend);
                readiness.set(EventSet::OUT, pair.transmit_halt == Halt::Backend);
                Some(readiness)
            };
            if wanted == pair.watched {
                continue;
            }
            let token = Source::Backend(index).token();
            let events = Events::with_data_raw(
                queue.as_raw_fd(),
                token,
                wanted.unwrap_or(EventSet::empty()),
            );
            let done = match (pair.watched, wanted) {
                (None, _) => operations.add(events),
                (_, Some(_)) => operations.modify(events),
                (_, None) => operations.remove(events),
            };
            pair.watched = wanted;
            if let Err(error) = done {
                self.link.need_reset_by_host(&error);
            }
        }
    }

    fn doorbells(&self) -> impl Iterator<Item = (RawFd, Source)> {
        let of_pairs = self.pairs.iter().enumerate().flat_map(|(index, pair)| {
            [
                (pair.receiver.doorbell(), Source::ReceiveDoorbell(index)),
                (pair.transmitter.doorbell(), Source::TransmitDoorbell(index)),
            ]
        });
        let of_control = self.control.iter();
        of_pairs.chain(of_control.map(|control| (control.doorbell(), Source::ControlDoorbell)))
    }
}

impl VirtioWorker for Worker {
    /// Puts the receive buffers back. There is nothing else to end: each turn ends with all of its operations
    /// done and the driver notified. Packets queued in the backend wait there, and connections to the local
    /// endpoint stay open.
    fn pause(&mut self) -> io::Result<()> {
        for pair in &mut self.pairs {
            pair.receiver.put_back_buffers();
            // The next event loop has to be told what to watch.
            pair.watched = None;
        }
        Ok(())
    }

    fn progress(&self) -> Vec<QueueProgress> {
        let of_pairs = self
            .pairs
            .iter()
            .flat_map(|pair| [pair.receiver.progress(), pair.transmitter.progress()]);
        of_pairs
            .chain(self.control.as_ref().map(ControlQueue::progress))
            .chain(self.unused.iter().copied())
            .collect()
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        let state = WorkerState {
            filter: self.filter.clone(),
            offloads: self.offloads,
            // A backend does not have more queues than fit.
            pairs_in_use: self.pairs_in_use as u16,
            receivers: self
                .pairs
                .iter()
                .map(|pair| pair.receiver.state())
                .collect(),
        };
        Section::of(&state).map(Some)
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            if let Some(queue) = self.backend.queue(index) {
                pair.receiver.renew_ring(queue);
                pair.transmitter.renew_ring(queue);
            }
        }
        for (doorbell, source) in self.doorbells() {
            // Edge-triggered, so that no call is spent on reading the doorbell.
            let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let events = Events::with_data_raw(doorbell, source.token(), readiness);
            if let Err(error) = operations.add(events) {
                self.link.need_reset_by_host(&error);
            }
        }
        for (flow, source) in [
            (&self.received, Source::ReceiveLimit),
            (&self.transmitted, Source::TransmitLimit),
        ] {
            let events = Events::with_data(flow.throttle(), source.token(), EventSet::IN);
            if let Err(error) = operations.add(events) {
                self.link.need_reset_by_host(&error);
            }
        }
        if let Some(local_port) = &self.local_port {
            let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let token = Source::LocalTimer.token();
            let events = Events::with_data_raw(local_port.timer(), token, readiness);
            if let Err(error) = operations.add(events) {
                self.link.need_reset_by_host(&error);
            }
        }
        if let Some(reconnection) = &mut self.reconnection {
            // The worker before this one may have waited.
            if self.rings.backend_is_gone() {
                reconnection.lose();
            }
            let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let token = Source::Reconnection.token();
            let events = Events::with_data_raw(reconnection.timer(), token, readiness);
            if let Err(error) = operations.add(events) {
                self.link.need_reset_by_host(&error);
            }
        }
        self.watch_backend(operations);
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        let source = Source::of_token(events.data());
        if !self.link.needs_reset() {
            let handled = self.handle(source, events.event_set());
            self.received.report();
            self.transmitted.report();
            if let Err(error) = handled {
                self.shared.metrics.event_fails.add(1);
                self.link.need_reset(&error);
            }
        } else if matches!(source, Source::ReceiveLimit | Source::TransmitLimit)
            && let Err(error) = operations.remove(events)
        {
            // Nothing clears its expiry, which would be reported without end.
            self.link
                .warn_of_host(format_args!("cannot stop watching a timer: {error}"));
        }
        self.watch_backend(operations);
    }
}

/// Drops packets that are queued for this driver: the next one may not accept the same packets.
impl Drop for Worker {
    fn drop(&mut self) {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let rings = PairRings {
                receive: pair.receiver.take_ring(),
                transmit: pair.transmitter.take_ring(),
            };
            self.rings.give_back(index, rings);
        }
        set_mac(&self.config, self.own_mac);
        set_announce(&self.config, false);
        if self.backend_is_gone() {
            return;
        }
        if let Err(error) = self.backend.forget_driver() {
            self.link.warn_of_host(format_args!(
                "cannot bring {} to rest: {error}",
                self.backend.label()
            ));
        }
    }
}
