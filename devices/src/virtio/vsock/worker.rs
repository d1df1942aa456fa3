//! The worker of the socket device: it takes packets from one queue and puts packets into the other.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use bantam_state::{SaveError, Section};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::DriverError;
use super::event_queue::EventQueue;
use super::metrics::VsockMetrics;
use super::muxer::Muxer;
use super::packet::{HEADER_SIZE, Header};
use super::receive::ReceiveQueue;
use super::source::Source;
use crate::ListeningSocket;
use crate::virtio::{Activation, Chain, DriverLink, MAX_TURN, VirtQueue};
use crate::worker::{QueueProgress, VirtioWorker};

pub(super) struct Worker {
    receive_queue: ReceiveQueue,
    transmit_queue: VirtQueue,
    event_queue: EventQueue,
    chain: Chain,
    /// Whether packets of the guest wait until the guest has taken some.
    is_stalled: bool,
    /// Whether packets for the guest wait for the next turn, for which the doorbell was rung. Otherwise each
    /// of many connections that become ready at once would begin its own turn.
    turn_is_over: bool,
    muxer: Muxer,
    metrics: Arc<VsockMetrics>,
    link: Arc<DriverLink>,
}

impl Worker {
    pub(super) fn new(
        guest_cid: u64,
        listener: Arc<ListeningSocket>,
        metrics: Arc<VsockMetrics>,
        activation: Activation,
    ) -> Result<Worker, String> {
        let Activation {
            memory,
            queues,
            link,
            state,
            features: _,
        } = activation;
        let Ok([receive_queue, transmit_queue, event_queue]) = <[VirtQueue; 3]>::try_from(queues)
        else {
            return Err("a socket device has three queues".to_string());
        };
        let mut event_queue = EventQueue::new(event_queue, &memory);
        let mut muxer = Muxer::new(guest_cid, listener, metrics.clone(), link.clone())
            .map_err(|error| format!("the host cannot create a timer: {error}"))?;
        if let Some(state) = state {
            let state = state.decode().map_err(|error| error.to_string())?;
            muxer.restore(&state, event_queue.begin_reset())?;
        }
        Ok(Worker {
            receive_queue: ReceiveQueue::new(receive_queue, &memory),
            transmit_queue,
            event_queue,
            chain: Chain::new(&memory),
            is_stalled: false,
            turn_is_over: false,
            muxer,
            metrics,
            link,
        })
    }

    fn handle(&mut self, source: Source, ready: EventSet) -> Result<(), DriverError> {
        match source {
            Source::ReceiveDoorbell => {
                self.turn_is_over = false;
                self.metrics.rx_queue_event_count.add(1);
                Ok(())
            }
            Source::TransmitDoorbell => {
                self.metrics.tx_queue_event_count.add(1);
                self.take_packets()
            }
            Source::EventDoorbell => {
                if self.event_queue.serve(&self.link)? {
                    self.muxer.end_reset();
                }
                Ok(())
            }
            Source::Listener => {
                self.muxer.begin_accepting();
                Ok(())
            }
            Source::Timer => {
                self.muxer.expire();
                Ok(())
            }
            Source::Connection(place) => {
                self.muxer.host_is_ready(place, ready);
                Ok(())
            }
        }
    }

    /// Takes packets of the guest, for one turn at most.
    fn take_packets(&mut self) -> Result<(), DriverError> {
        self.transmit_queue.disable_doorbell();
        let result = self.take_packets_of_turn();
        self.transmit_queue.notify_driver(&self.link);
        result.inspect_err(|_| self.metrics.tx_queue_event_fails.add(1))
    }

    fn take_packets_of_turn(&mut self) -> Result<(), DriverError> {
        let start = Instant::now();
        for _ in 0..self.transmit_queue.size() {
            self.is_stalled = self.muxer.is_stalled();
            if self.is_stalled {
                return Ok(());
            }
            if !self.transmit_queue.pop(&mut self.chain)? {
                break;
            }
            let header = take_header(&mut self.chain)?;
            self.muxer.handle_packet(&header, &mut self.chain.readable);
            self.transmit_queue.add_used(self.chain.head, 0);
            if start.elapsed() >= MAX_TURN {
                break;
            }
        }
        if self.transmit_queue.enable_doorbell()? {
            self.transmit_queue.ring_doorbell();
        }
        Ok(())
    }

    /// Does the work that the events have made possible.
    fn work(&mut self, operations: &mut EventOps<'_>) -> Result<(), DriverError> {
        if self.muxer.accept() {
            self.receive_queue.ring_doorbell();
        }
        self.muxer.settle(operations)?;
        if !self.turn_is_over {
            let sent = self.muxer.send(&mut self.receive_queue);
            self.receive_queue.report(&self.link);
            self.turn_is_over = sent.inspect_err(|_| self.metrics.rx_queue_event_fails.add(1))?;
            self.muxer.settle(operations)?;
        }
        if self.is_stalled && !self.muxer.is_stalled() {
            self.transmit_queue.ring_doorbell();
        }
        Ok(())
    }
}

/// Takes the header of a packet from the front of its buffers, and leaves its data there.
fn take_header(chain: &mut Chain) -> Result<Header, DriverError> {
    let size = chain.readable.len();
    let Some(bytes) = chain.readable.read_array::<HEADER_SIZE>() else {
        return Err(DriverError::ShortPacket {
            head: chain.head,
            size,
        });
    };
    let header = Header::from_bytes(&bytes);
    let len = header.len as usize;
    if len > chain.readable.len() {
        return Err(DriverError::MissingData {
            head: chain.head,
            len: header.len,
            size: chain.readable.len(),
        });
    }
    chain.readable.truncate(len);
    Ok(header)
}

impl VirtioWorker for Worker {
    /// Stops the deadlines. Nothing else is in progress: each chain is returned or put back in the turn that
    /// takes it, and the driver is notified.
    fn pause(&mut self) -> io::Result<()> {
        self.muxer.pause();
        Ok(())
    }

    fn progress(&self) -> Vec<QueueProgress> {
        vec![
            self.receive_queue.progress(),
            self.transmit_queue.progress(),
            self.event_queue.progress(),
        ]
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        Section::of(&self.muxer.save()).map(Some)
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        // Edge-triggered, so that no call is spent on reading the doorbell.
        let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let doorbells = [
            (self.receive_queue.as_raw_fd(), Source::ReceiveDoorbell),
            (self.transmit_queue.as_raw_fd(), Source::TransmitDoorbell),
            (self.event_queue.as_raw_fd(), Source::EventDoorbell),
        ];
        let watched = doorbells.into_iter().try_for_each(|(doorbell, source)| {
            operations.add(Events::with_data_raw(doorbell, source.token(), readiness))
        });
        let watched = watched
            .map_err(DriverError::from)
            .and_then(|()| self.muxer.watch(operations));
        if let Err(error) = watched {
            self.link.need_reset_by_host(&error);
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if self.link.needs_reset() {
            return;
        }
        let source = Source::of_token(events.data());
        let result = self
            .handle(source, events.event_set())
            .and_then(|()| self.work(operations));
        if let Err(error) = result {
            self.link.need_reset(&error);
            self.muxer.close_streams();
        }
    }
}
