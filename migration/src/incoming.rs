//! The end that gets the machine.

use std::sync::Arc;

use bantam_memory::{GuestBuffers, GuestMemory, PAGE_SIZE};
use bantam_snapshot::StateFile;
use vm_memory::GuestAddress;

use crate::message::{ADDRESS, Head, Kind, MAX_PAGES, unexpected};
use crate::{Breaker, Connection, MigrationError};

/// The receiver's end of a migration.
#[derive(Debug)]
pub struct Incoming {
    connection: Connection,
    offer: StateFile,
}

impl Incoming {
    /// Receives the offer of a machine.
    ///
    /// # Errors
    /// If the other end does not offer one, or the connection fails.
    pub fn new(connection: Connection) -> Result<Incoming, MigrationError> {
        connection.greet()?;
        let head = connection.receive_head()?;
        if head.kind != Kind::Offer {
            return Err(unexpected(head));
        }
        let offer = connection.receive_state(head);
        if let Err(error) = &offer {
            // Whether or not it arrives, the error is returned.
            let _ = connection.send_failure(&error.to_string());
        }
        Ok(Incoming {
            offer: offer?,
            connection,
        })
    }

    /// Returns what the machine was when it was offered.
    pub fn offer(&self) -> &StateFile {
        &self.offer
    }

    /// Returns what breaks the connection off.
    pub fn breaker(&self) -> Breaker {
        self.connection.breaker()
    }

    /// Tells the source that this end cannot take or run the machine, for this reason.
    pub fn refuse(&self, reason: &str) {
        // The source notices the end of the connection otherwise.
        let _ = self.connection.send_failure(reason);
    }

    /// Accepts the machine, and receives its memory and its last state. `memory` is all zero, and nobody else uses it.
    ///
    /// # Errors
    /// If the source gives up or does not keep to the protocol, or the connection fails.
    pub fn receive(&mut self, memory: &Arc<GuestMemory>) -> Result<StateFile, MigrationError> {
        let connection = &self.connection;
        connection.send_message(Kind::Accepted, &[])?;
        loop {
            let head = connection.receive_head()?;
            match head.kind {
                Kind::Pages => {
                    let mut address = [0; ADDRESS];
                    connection.receive(&mut address)?;
                    let len = head.len.saturating_sub(ADDRESS) as u64;
                    let mut buffers = buffers(memory, u64::from_le_bytes(address), len)?;
                    connection.receive_buffers(&mut buffers)?;
                }
                Kind::Zeroes => {
                    let mut body = [[0; ADDRESS]; 2];
                    connection.receive(body.as_flattened_mut())?;
                    let [address, len] = body.map(u64::from_le_bytes);
                    let mut buffers = buffers(memory, address, len)?;
                    while buffers.write(&[0; PAGE_SIZE]) > 0 {}
                }
                Kind::RoundEnd => connection.send_message(Kind::RoundTaken, &[])?,
                Kind::State => return self.state(head),
                _ => return Err(unexpected(head)),
            }
        }
    }

    /// Receives the last state.
    fn state(&self, head: Head) -> Result<StateFile, MigrationError> {
        let state = self.connection.receive_state(head)?;
        match state.facts().regions == self.offer.facts().regions {
            true => Ok(state),
            false => Err(MigrationError::Protocol(
                "the memory is not that of the machine that was offered".to_owned(),
            )),
        }
    }

    /// Tells the source that the machine can run here, and waits until it is this end's. Returns whether it is to run, or to
    /// stay paused.
    ///
    /// # Errors
    /// If the source keeps it, or the connection fails. This end must not run it then.
    pub fn take_over(&self) -> Result<bool, MigrationError> {
        self.connection.send_message(Kind::Ready, &[])?;
        let head = self.connection.receive_head()?;
        if head.kind != Kind::TakeOver {
            return Err(unexpected(head));
        }
        let mut runs = [0];
        self.connection.receive(&mut runs)?;
        Ok(runs != [0])
    }

    /// Tells the source that this end has the machine.
    pub fn confirm(self) {
        // It has, whether or not the source gets to know it.
        let _ = self.connection.send_message(Kind::TakenOver, &[]);
    }
}

/// Returns pages of `memory`.
fn buffers(
    memory: &Arc<GuestMemory>,
    address: u64,
    len: u64,
) -> Result<GuestBuffers, MigrationError> {
    let is_whole = |number: u64| number.is_multiple_of(PAGE_SIZE as u64);
    let mut buffers = GuestBuffers::new(memory.clone());
    let is_valid = is_whole(address)
        && is_whole(len)
        && len <= MAX_PAGES as u64
        && buffers.push(GuestAddress(address), len as u32).is_ok();
    match is_valid {
        true => Ok(buffers),
        false => Err(MigrationError::Protocol(format!(
            "the machine has no pages of {len:#x} bytes at {address:#x}"
        ))),
    }
}
