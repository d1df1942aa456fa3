//! The table of a device's connections.

use std::collections::HashMap;

use event_manager::EventSet;
use nix::sys::resource::{Resource, getrlimit};

use super::connection::Connection;
use super::packet::Ports;

/// Most connections at a time, including those whose program has yet to name its port.
pub(super) const MAX_CONNECTIONS: usize = 1024;

/// File descriptors that the process may have for each connection. A guest must not use up those that the
/// rest of the monitor needs.
const DESCRIPTORS_PER_CONNECTION: u64 = 2;

/// First and last of the host's ports that are given to its programs: a part of the range in which no service
/// of the host is likely to listen.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// A connection with the device's bookkeeping.
pub(super) struct Entry {
    pub(super) connection: Connection,
    /// The events that the event loop watches its stream for, if it does.
    pub(super) watched: Option<EventSet>,
    /// Whether it is queued for its turn to send to the guest.
    pub(super) is_queued: bool,
    /// The ports that identify it in packets.
    ports: Option<Ports>,
}

/// Connections in places with small numbers that are reused, and a map to them by their ports.
pub(super) struct Table {
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    next_host_port: u32,
    /// Most connections.
    capacity: usize,
}

/// Returns the capacity of a table that is made now.
fn capacity() -> usize {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    let count = usize::try_from(descriptors / DESCRIPTORS_PER_CONNECTION).unwrap_or(usize::MAX);
    count.min(MAX_CONNECTIONS)
}

impl Table {
    pub(super) fn new() -> Table {
        Table {
            entries: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            next_host_port: FIRST_HOST_PORT,
            capacity: capacity(),
        }
    }

    /// Most connections.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether there can be no more connections.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty() && self.entries.len() >= self.capacity
    }

    /// Adds a connection to a table that is not full, and returns its place.
    pub(super) fn insert(&mut self, connection: Connection) -> usize {
        let ports = connection.ports();
        let entry = Some(Entry {
            connection,
            watched: None,
            is_queued: false,
            ports,
        });
        let place = match self.free.pop() {
            Some(place) => {
                self.entries[place] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                self.entries.len() - 1
            }
        };
        if let Some(ports) = ports {
            self.by_ports.insert(ports, place);
        }
        place
    }

    /// Assigns `ports` to the connection at `place`, so that packets find it.
    pub(super) fn assign(&mut self, place: usize, ports: Ports) {
        if let Some(entry) = self.get(place) {
            entry.ports = Some(ports);
            self.by_ports.insert(ports, place);
        }
    }

    /// Removes the ports of the connection at `place`, so that packets no longer find it and the guest can
    /// use its port again.
    pub(super) fn forget(&mut self, place: usize) {
        if let Some(ports) = self.get(place).and_then(|entry| entry.ports.take()) {
            self.by_ports.remove(&ports);
        }
    }

    pub(super) fn remove(&mut self, place: usize) -> Option<Entry> {
        self.forget(place);
        let entry = self.entries.get_mut(place)?.take()?;
        self.free.push(place);
        Some(entry)
    }

    pub(super) fn get(&mut self, place: usize) -> Option<&mut Entry> {
        self.entries.get_mut(place)?.as_mut()
    }

    /// Returns the place of the connection that a packet belongs to.
    pub(super) fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// Iterates over all connections and their places.
    pub(super) fn iter(&mut self) -> impl Iterator<Item = (usize, &mut Entry)> {
        let entries = self.entries.iter_mut().enumerate();
        entries.filter_map(|(place, entry)| Some((place, entry.as_mut()?)))
    }

    /// Returns the port of the host that is given to the next program, if it is free.
    pub(super) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Continues after the ports that an earlier table has given out; `false` if `port` is not such a port.
    pub(super) fn set_next_host_port(&mut self, port: u32) -> bool {
        let is_valid = (FIRST_HOST_PORT..=LAST_HOST_PORT).contains(&port);
        if is_valid {
            self.next_host_port = port;
        }
        is_valid
    }

    /// Chooses a port of the host that no connection to this port of the guest has.
    pub(super) fn choose_host_port(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports {
                host: self.next_host_port,
                guest,
            };
            self.next_host_port = if ports.host == LAST_HOST_PORT {
                FIRST_HOST_PORT
            } else {
                ports.host + 1
            };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vsock::stream::HostStream;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    #[test]
    fn ports_of_the_host_are_used_in_turn_and_never_twice() {
        let mut table = Table::new();
        let (stream, _other) = UnixStream::pair().unwrap();
        let first = table.choose_host_port(52);
        assert_eq!(first.host, FIRST_HOST_PORT);
        let connection = Connection::from_host(HostStream::new(stream), Instant::now());
        let place = table.insert(connection);
        table.assign(place, first);
        table.next_host_port = LAST_HOST_PORT;
        assert_eq!(table.choose_host_port(52).host, LAST_HOST_PORT);
        assert_eq!(table.choose_host_port(52).host, FIRST_HOST_PORT + 1);

        assert_eq!(table.find(first), Some(place));
        table.forget(place);
        assert_eq!(table.find(first), None);
        assert!(table.remove(place).is_some());
        assert!(table.remove(place).is_none());
    }
}
