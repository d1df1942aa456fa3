//! The control queues of a device of channels (section 5.3.6.2): they announce ports, and each side reports
//! when it opens or closes one.

use std::sync::Arc;

use bantam_memory::GuestMemory;
use serde::{Deserialize, Serialize};

use super::DriverError;
use super::message::{DeviceMessage, DriverMessage, HEADER_SIZE};
use crate::virtio::{Chain, DriverLink, VirtQueue};

/// What the driver has been told about a port, and has said about it.
///
/// Messages are made from the difference to the present state, so that they do not pile up if a driver offers
/// no buffers.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
struct Told {
    is_added: bool,
    /// The driver has said that it can take further messages about the port.
    is_ready: bool,
    is_named: bool,
    /// Whether the driver has been told that the host has its end open.
    is_open: bool,
}

/// Returns what the driver has been told about `port`, if it is a channel.
fn told_of(told: &mut [Told], port: usize) -> Option<&mut Told> {
    told.get_mut(port.checked_sub(1)?)
}

/// The saved state of the control queues.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ControlState {
    /// For each channel.
    told: Vec<Told>,
    is_device_ready: bool,
}

/// The guest has opened or closed its end of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GuestOpen {
    pub(super) port: usize,
    pub(super) open: bool,
}

pub(super) struct ControlQueue {
    receive: VirtQueue,
    transmit: VirtQueue,
    chain: Chain,
    names: Arc<[String]>,
    /// For each channel; the first is port 1.
    told: Vec<Told>,
    is_device_ready: bool,
}

impl ControlQueue {
    pub(super) fn new(
        receive: VirtQueue,
        transmit: VirtQueue,
        names: Arc<[String]>,
        memory: &Arc<GuestMemory>,
    ) -> ControlQueue {
        ControlQueue {
            receive,
            transmit,
            chain: Chain::new(memory),
            told: vec![Told::default(); names.len()],
            names,
            is_device_ready: false,
        }
    }

    /// Returns the state that another worker needs so as not to tell the driver anything twice.
    pub(super) fn save(&self) -> ControlState {
        ControlState {
            told: self.told.clone(),
            is_device_ready: self.is_device_ready,
        }
    }

    /// Takes over the state of an earlier worker.
    ///
    /// # Errors
    /// If that worker had a different number of channels.
    pub(super) fn restore(&mut self, state: ControlState) -> Result<(), String> {
        if state.told.len() != self.told.len() {
            return Err(format!(
                "the driver knows of {} channels, and there are {}",
                state.told.len(),
                self.told.len()
            ));
        }
        self.told = state.told;
        self.is_device_ready = state.is_device_ready;
        Ok(())
    }

    /// Returns the queues on which the driver receives and transmits, in this order.
    pub(super) fn queues(&self) -> [&VirtQueue; 2] {
        [&self.receive, &self.transmit]
    }

    /// Whether the driver has been told that the host has its end of `port` open.
    pub(super) fn is_told_open(&self, port: usize) -> bool {
        let told = port.checked_sub(1).and_then(|index| self.told.get(index));
        told.is_some_and(|told| told.is_open)
    }

    /// Takes the messages of the driver, for one turn at most. Returns in order how the guest opened and
    /// closed its ends of ports.
    pub(super) fn take_messages(
        &mut self,
        link: &DriverLink,
    ) -> Result<Vec<GuestOpen>, DriverError> {
        let mut changes = Vec::new();
        let ControlQueue {
            transmit,
            chain,
            told,
            is_device_ready,
            ..
        } = self;
        transmit.serve(chain, link, |chain| {
            let size = chain.readable.len();
            let bytes = chain.readable.read_array::<HEADER_SIZE>();
            let head = chain.head;
            let bytes = bytes.ok_or(DriverError::ShortMessage { head, size })?;
            let message = DriverMessage::from_bytes(bytes);
            match message {
                DriverMessage::DeviceReady(true) => {
                    *is_device_ready = true;
                    told.fill(Told::default());
                }
                DriverMessage::DeviceReady(false) => {
                    link.warn(format_args!("the driver could not set it up"));
                }
                DriverMessage::PortReady { port, ready } => match told_of(told, port) {
                    // A driver that says so again has forgotten what it was told, as Linux does when it was
                    // suspended to disk.
                    Some(told) if ready => {
                        *told = Told {
                            is_added: true,
                            is_ready: true,
                            ..Told::default()
                        };
                    }
                    Some(_) => link.warn(format_args!("the driver could not add port {port}")),
                    None => link.warn(format_args!("there is no port {port} to be ready")),
                },
                DriverMessage::PortOpen { port, open } => match told_of(told, port) {
                    Some(_) => changes.push(GuestOpen { port, open }),
                    None => link.warn(format_args!("there is no port {port} to be opened")),
                },
                DriverMessage::Unknown { event } => {
                    link.warn(format_args!("control message {event} is ignored"));
                }
            }
            Ok::<_, DriverError>(0)
        })?;
        Ok(changes)
    }

    /// Tells the driver what it does not know yet, as far as it has offered buffers. `is_connected` says
    /// whether the host has its end of a port open. Returns the ports that the driver now knows to be closed
    /// by the host.
    pub(super) fn tell(
        &mut self,
        is_connected: impl Fn(usize) -> bool,
        link: &DriverLink,
    ) -> Result<Vec<usize>, DriverError> {
        let mut closed = Vec::new();
        self.receive.disable_doorbell();
        let result = self.tell_all(is_connected, &mut closed);
        self.receive.notify_driver(link);
        result.map(|()| closed)
    }

    fn tell_all(
        &mut self,
        is_connected: impl Fn(usize) -> bool,
        closed: &mut Vec<usize>,
    ) -> Result<(), DriverError> {
        for index in 0..self.told.len() {
            let port = index + 1;
            while let Some((message, told)) = self.next_message(index, is_connected(port)) {
                if !self.receive.pop(&mut self.chain)? {
                    if self.receive.enable_doorbell()? {
                        continue;
                    }
                    return Ok(());
                }
                let Chain { head, writable, .. } = &mut self.chain;
                let (head, size, needed) = (*head, writable.len(), message.len());
                if size < needed {
                    return Err(DriverError::ControlBuffer { head, size, needed });
                }
                writable.write(&message);
                self.receive.add_used(head, needed as u32);
                if let Some(entry) = self.told.get_mut(index) {
                    if entry.is_open && !told.is_open {
                        closed.push(port);
                    }
                    *entry = told;
                }
            }
        }
        Ok(())
    }

    /// Returns the next message about a channel, if there is one, and what the driver will have been told
    /// then.
    fn next_message(&self, index: usize, is_connected: bool) -> Option<(Vec<u8>, Told)> {
        let (told, name) = (*self.told.get(index)?, self.names.get(index)?);
        let (message, told) = if !told.is_added {
            let is_added = self.is_device_ready;
            (
                is_added.then_some(DeviceMessage::Add)?,
                Told { is_added, ..told },
            )
        } else if !told.is_ready {
            return None;
        } else if !told.is_named {
            let is_named = true;
            (DeviceMessage::Name(name), Told { is_named, ..told })
        } else if told.is_open != is_connected {
            let is_open = is_connected;
            (DeviceMessage::Open(is_open), Told { is_open, ..told })
        } else {
            return None;
        };
        Some((message.to_bytes(index + 1), told))
    }
}
