//! A port: the queues of the guest's end, and the transfer between them and the host's end.

use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use bantam_memory::{GuestBuffers, GuestMemory};
use event_manager::EventOps;
use serde::{Deserialize, Serialize};

use super::host::HostEnd;
use super::{DriverError, Shared};
use crate::serial::{make_room_in_pipe, wait_for_reader};
use crate::virtio::{Chain, DriverLink, MAX_TURN, VirtQueue};

/// Most bytes of one call. More would occupy the event loop for too long if the host takes any amount, as a
/// file does.
const MAX_BYTES_PER_CALL: usize = 256 << 10;
/// How long the worker waits for the readers of all ports when it ends.
pub(super) const LAST_OUTPUT_LIMIT: Duration = Duration::from_secs(1);

/// How far the transmission of the guest's output has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    /// The host has no room.
    Blocked,
    /// The turn is over.
    Interrupted,
}

/// The saved state of a port.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct PortState {
    /// Bytes that the host has already taken of the next chain in the transmit queue.
    sent: u64,
    is_guest_open: bool,
}

pub(super) struct Port {
    index: usize,
    shared: Arc<Shared>,
    link: Arc<DriverLink>,
    receive_queue: VirtQueue,
    receive_chain: Chain,
    transmit_queue: VirtQueue,
    transmit_chain: Chain,
    /// The front part of `transmit_chain` for the next call.
    piece: GuestBuffers,
    /// Head of `transmit_chain` while the host has not taken all of it.
    sending: Option<u16>,
    /// How many bytes the host has taken of that chain, or of the next one if that chain was put back.
    sent: usize,
    /// Whether a program in the guest has the port open. A console is always open.
    is_guest_open: bool,
    /// Whether the client is to be disconnected because the guest has closed the port, once it has all
    /// earlier output.
    is_closing: bool,
}

impl Port {
    pub(super) fn new(
        index: usize,
        shared: Arc<Shared>,
        link: Arc<DriverLink>,
        [receive_queue, transmit_queue]: [VirtQueue; 2],
        memory: &Arc<GuestMemory>,
    ) -> Port {
        Port {
            index,
            shared,
            link,
            receive_queue,
            receive_chain: Chain::new(memory),
            transmit_queue,
            transmit_chain: Chain::new(memory),
            piece: GuestBuffers::new(memory.clone()),
            sending: None,
            sent: 0,
            is_guest_open: index == 0,
            is_closing: false,
        }
    }

    /// Puts a chain that the host has taken only in part back into its queue. The rest is sent when the chain
    /// is taken again.
    pub(super) fn pause(&mut self) {
        if self.sending.take().is_some() {
            self.piece.clear();
            self.transmit_chain.readable.clear();
            self.transmit_queue.undo_pop();
        }
    }

    /// Returns the state that another worker needs. A pending disconnection of a client is not part of it, as
    /// clients end with the process.
    pub(super) fn save(&self) -> PortState {
        PortState {
            sent: self.sent as u64,
            is_guest_open: self.is_guest_open,
        }
    }

    /// Takes over the state of an earlier worker.
    pub(super) fn restore(&mut self, state: PortState) {
        // More bytes than the chain has count as all of them.
        self.sent = usize::try_from(state.sent).unwrap_or(usize::MAX);
        self.is_guest_open = self.index == 0 || state.is_guest_open;
    }

    /// Returns the queues on which the driver receives and transmits, in this order.
    pub(super) fn queues(&self) -> [&VirtQueue; 2] {
        [&self.receive_queue, &self.transmit_queue]
    }

    /// Whether the host has its end open.
    pub(super) fn is_connected(&self) -> bool {
        let host = self.shared.host(self.index);
        host.is_some_and(|host| host.is_connected())
    }

    /// Takes note that the guest has opened or closed its end.
    pub(super) fn set_guest_open(&mut self, open: bool) {
        self.is_closing = self.is_guest_open && !open;
        self.is_guest_open = open;
    }

    /// Does the work that has become possible. `may_accept` is false while the driver has yet to be told that
    /// the last client is gone.
    pub(super) fn work(
        &mut self,
        may_accept: bool,
        operations: &mut EventOps<'_>,
    ) -> Result<(), DriverError> {
        let shared = self.shared.clone();
        let Some(mut host) = shared.host(self.index) else {
            return Ok(());
        };
        if may_accept {
            host.accept(self.index, operations, &shared.metrics, &self.link);
        }
        let was_connected = host.is_connected();
        let progress = self.transmit(&mut host, Some(operations))?;
        if self.is_closing && progress == Progress::Done {
            self.is_closing = false;
            host.disconnect(operations);
        }
        if self.is_guest_open {
            self.receive(&mut host, operations)?;
        }
        host.disconnect_if_gone(operations);
        if was_connected && !host.is_connected() {
            // Another client may be waiting for this.
            self.call_again();
        }
        Ok(())
    }

    /// Has the event loop call [`Port::work`] in its next turn.
    pub(super) fn call_again(&self) {
        self.transmit_queue.ring_doorbell();
    }

    fn transmit(
        &mut self,
        host: &mut HostEnd,
        operations: Option<&mut EventOps<'_>>,
    ) -> Result<Progress, DriverError> {
        self.transmit_queue.disable_doorbell();
        let result = self.transmit_turn(host, operations);
        self.transmit_queue.notify_driver(&self.link);
        result
    }

    /// Sends what the guest transmits, for one turn at most.
    fn transmit_turn(
        &mut self,
        host: &mut HostEnd,
        mut operations: Option<&mut EventOps<'_>>,
    ) -> Result<Progress, DriverError> {
        if host
            .flush_emergency()
            .is_err_and(|error| is_blocked(&error))
        {
            return Ok(Progress::Blocked);
        }
        let start = Instant::now();
        for _ in 0..self.transmit_queue.size() {
            let head = match self.sending {
                Some(head) => head,
                None if self.transmit_queue.pop(&mut self.transmit_chain)? => {
                    self.transmit_chain.readable.advance(self.sent);
                    self.transmit_chain.head
                }
                None if self.transmit_queue.enable_doorbell()? => continue,
                None => return Ok(Progress::Done),
            };
            self.sending = Some(head);
            while !self.transmit_chain.readable.is_empty() || !self.piece.is_empty() {
                if !host.has_output() {
                    self.drop_chain();
                    break;
                }
                if self.piece.is_empty() {
                    let readable = &mut self.transmit_chain.readable;
                    readable.move_front(MAX_BYTES_PER_CALL, &mut self.piece);
                }
                match host.write(&mut self.piece) {
                    Ok(count) => {
                        self.sent += count;
                        self.shared.metrics.tx_bytes_count.add(count as u64);
                    }
                    Err(error) if is_blocked(&error) => return Ok(Progress::Blocked),
                    Err(error) => match operations.as_deref_mut() {
                        Some(operations) => self.lose_output(host, &error, operations),
                        None => self.drop_chain(),
                    },
                }
                if start.elapsed() >= MAX_TURN {
                    self.call_again();
                    return Ok(Progress::Interrupted);
                }
            }
            self.transmit_queue.add_used(head, 0);
            self.sending = None;
            self.sent = 0;
        }
        self.call_again();
        Ok(Progress::Interrupted)
    }

    fn lose_output(
        &mut self,
        host: &mut HostEnd,
        error: &io::Error,
        operations: &mut EventOps<'_>,
    ) {
        // A client may leave whenever it likes.
        if !matches!(
            error.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        ) {
            self.link.warn_of_host(format_args!(
                "the output of port {} is lost from here on: {error}",
                self.index
            ));
        }
        host.end_output(operations);
    }

    /// Drops the current chain, as nobody takes it.
    fn drop_chain(&mut self) {
        let left = self.piece.len() + self.transmit_chain.readable.len();
        self.shared.metrics.tx_dropped_bytes.add(left as u64);
        self.piece.clear();
        self.transmit_chain.readable.clear();
    }

    fn receive(
        &mut self,
        host: &mut HostEnd,
        operations: &mut EventOps<'_>,
    ) -> Result<(), DriverError> {
        self.receive_queue.disable_doorbell();
        let result = self.receive_turn(host, operations);
        self.receive_queue.notify_driver(&self.link);
        result
    }

    /// Moves input to the guest, for one turn at most, until there is no more or the driver has no buffer.
    fn receive_turn(
        &mut self,
        host: &mut HostEnd,
        operations: &mut EventOps<'_>,
    ) -> Result<(), DriverError> {
        let start = Instant::now();
        for _ in 0..self.receive_queue.size() {
            if !host.can_read() {
                return Ok(());
            }
            let chain = &mut self.receive_chain;
            if !self.receive_queue.pop(chain)? {
                if self.receive_queue.enable_doorbell()? {
                    continue;
                }
                return Ok(());
            }
            let (readable, writable) = (chain.readable.len(), chain.writable.len());
            if readable > 0 || writable == 0 {
                return Err(DriverError::ReceiveBuffer {
                    port: self.index,
                    head: chain.head,
                    readable,
                    writable,
                });
            }
            chain.writable.truncate(MAX_BYTES_PER_CALL);
            match host.read(&mut chain.writable) {
                Ok(count @ 1..) => {
                    self.shared.metrics.rx_bytes_count.add(count as u64);
                    self.receive_queue.add_used(chain.head, count as u32);
                }
                Err(error) if is_blocked(&error) => self.receive_queue.undo_pop(),
                ended => {
                    self.receive_queue.undo_pop();
                    if let Err(error) = ended {
                        self.link.warn_of_host(format_args!(
                            "the input of port {} has ended: {error}",
                            self.index
                        ));
                    }
                    host.end_input(operations);
                }
            }
            if start.elapsed() >= MAX_TURN {
                break;
            }
        }
        self.receive_queue.ring_doorbell();
        Ok(())
    }

    /// Sends the remaining output before the worker ends: as far as there is room, and, if there is a
    /// `deadline`, until then for as long as someone still reads.
    pub(super) fn send_last_output(&mut self, deadline: Option<Instant>) {
        let shared = self.shared.clone();
        let Some(mut host) = shared.host(self.index) else {
            return;
        };
        let end = deadline.unwrap_or_else(|| Instant::now() + MAX_TURN);
        loop {
            let may_wait = deadline.is_some() && Instant::now() < end;
            match self.transmit(&mut host, None) {
                Ok(Progress::Blocked) if self.wait_for_room(&host, may_wait) => host.try_again(),
                Ok(Progress::Interrupted) if Instant::now() < end => {}
                Ok(Progress::Blocked | Progress::Interrupted) => {
                    let index = self.index;
                    let message =
                        format_args!("the last output of port {index} is lost: nobody read it");
                    // A guest can cause this message as often as it likes by resetting the device.
                    match deadline {
                        Some(_) => self.link.warn_of_host(message),
                        None => self.link.warn(message),
                    }
                    break;
                }
                // A breach of the rules no longer matters at the end.
                Ok(Progress::Done) | Err(_) => break,
            }
            if Instant::now() >= end {
                break;
            }
        }
    }

    /// Ends the port's work with its worker, when no event loop watches any more. The guest then has nothing
    /// open.
    pub(super) fn end(&mut self) {
        if self.index > 0
            && (self.is_guest_open || self.is_closing)
            && let Some(mut host) = self.shared.host(self.index)
        {
            host.disconnect_unwatched();
        }
    }

    fn wait_for_room(&self, host: &MutexGuard<'_, HostEnd>, may_wait: bool) -> bool {
        host.output_stream().is_some_and(|stream| {
            make_room_in_pipe(stream) || (may_wait && wait_for_reader(stream))
        })
    }
}

fn is_blocked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
