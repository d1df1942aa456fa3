//! The end that gets the machine.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use bantam_memory::{GuestBuffers, GuestMemory, PAGE_SIZE};
use bantam_snapshot::StateFile;
use vm_memory::GuestAddress;
use zstd::bulk::Decompressor;

use crate::connection::MAX_CONNECTIONS;
use crate::message::{ADDRESS, Head, KEY, Kind, MAX_PAGES, unexpected};
use crate::{Breaker, Connection, MigrationError};

/// The receiver's end of a migration.
#[derive(Debug)]
pub struct Incoming {
    connection: Connection,
    offer: StateFile,
    is_trial: bool,
    /// How many other connections are still to come, and the key that they have.
    awaited: Option<(usize, [u8; KEY])>,
}

impl Incoming {
    /// Receives the offer of a machine.
    ///
    /// # Errors
    /// If the other end does not offer one, or the connection fails.
    pub fn new(connection: Connection) -> Result<Incoming, MigrationError> {
        connection.greet()?;
        let mut head = connection.receive_head()?;
        let mut awaited = None;
        if head.kind == Kind::Others {
            let mut body = [0; 1 + KEY];
            connection.receive(&mut body)?;
            let [count, key @ ..] = body;
            if count >= MAX_CONNECTIONS {
                let reason = format!("more than {MAX_CONNECTIONS} connections");
                return Err(MigrationError::Protocol(reason));
            }
            awaited = Some((usize::from(count), key));
            head = connection.receive_head()?;
        }
        if !matches!(head.kind, Kind::Offer | Kind::Trial) {
            return Err(unexpected(head));
        }
        let offer = connection.receive_state(head);
        if let Err(error) = &offer {
            // Whether or not it arrives, the error is returned.
            let _ = connection.send_failure(&error.to_string());
        }
        Ok(Incoming {
            offer: offer?,
            is_trial: head.kind == Kind::Trial,
            awaited,
            connection,
        })
    }

    /// Returns what the machine was when it was offered.
    pub fn offer(&self) -> &StateFile {
        &self.offer
    }

    /// Returns the sockets, the first one first, and the offer, for another process, which goes on with [`Incoming::handed_on`].
    ///
    /// # Errors
    /// If the host is out of descriptors.
    pub fn hand_on(self) -> io::Result<(Vec<OwnedFd>, StateFile)> {
        Ok((self.connection.into_descriptors()?, self.offer))
    }

    /// Goes on with a migration whose offer another process has received.
    pub fn handed_on(connection: Connection, offer: StateFile) -> Incoming {
        Incoming {
            connection,
            offer,
            is_trial: false,
            awaited: None,
        }
    }

    /// Returns whether other connections of the source are still to come, for [`Incoming::join`]. The machine can be received
    /// when all have.
    pub fn awaits_connections(&self) -> bool {
        let awaited = self.awaited.map_or(0, |(count, _)| count);
        self.connection.others.len() < awaited
    }

    /// Adds another connection of the source.
    ///
    /// # Errors
    /// If it is not one. The source may still have to make it.
    pub fn join(&mut self, other: Connection) -> Result<(), MigrationError> {
        other.greet()?;
        let head = other.receive_head()?;
        if head.kind != Kind::Join {
            return Err(unexpected(head));
        }
        let mut key = [0; KEY];
        other.receive(&mut key)?;
        if self.awaited.is_none_or(|(_, expected)| key != expected) {
            let reason = "a connection is not of the source that is received";
            return Err(MigrationError::Protocol(reason.to_owned()));
        }
        self.connection.add(other);
        Ok(())
    }

    /// Returns whether the source only asks if this end would accept the machine.
    pub fn is_trial(&self) -> bool {
        self.is_trial
    }

    /// Tells a source that only asks that this end would accept the machine.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn would_accept(&self) -> Result<(), MigrationError> {
        self.connection.send_message(Kind::Accepted, &[])
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
        let main = &self.connection;
        main.send_message(Kind::Accepted, &[])?;
        thread::scope(|scope| {
            let start = |other| {
                let thread = thread::Builder::new().name("migration".into());
                let started = thread.spawn_scoped(scope, move || {
                    let received = receive_pages(other, memory, Kind::PagesEnd);
                    // The reason can still be sent.
                    received.inspect_err(|_| main.stop_receiving()).map(drop)
                });
                started.map_err(MigrationError::Thread)
            };
            let others: Vec<_> = main.others.iter().map(start).collect();
            let state = receive_pages(main, memory, Kind::State).and_then(|head| self.state(head));
            if state.is_err() {
                main.others.iter().for_each(Connection::stop_receiving);
            }
            let mut received = Ok(());
            for other in others {
                // A panic of it goes on in this thread.
                let other = other.and_then(|it| {
                    it.join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                });
                received = received.and(other);
            }
            match (state, received) {
                // Those that were only stopped have nothing to say.
                (Err(MigrationError::Closed), Err(error)) => Err(error),
                (Ok(_), Err(error)) | (Err(error), _) => Err(error),
                (Ok(state), Ok(())) => Ok(state),
            }
        })
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

/// Receives pages, until a message of kind `last` comes, of which this is the head.
fn receive_pages(
    connection: &Connection,
    memory: &Arc<GuestMemory>,
    last: Kind,
) -> Result<Head, MigrationError> {
    let mut unpacker = None;
    loop {
        let head = connection.receive_head()?;
        match head.kind {
            Kind::Pages => {
                let mut address = [0; ADDRESS];
                connection.receive(&mut address)?;
                let (address, len) = (
                    u64::from_le_bytes(address),
                    head.len.saturating_sub(ADDRESS),
                );
                let mut buffers = buffers(memory, address, len as u64)?;
                // It is faster. A host that does not offer it allocates each page when it is written.
                let _ = memory.allocate(GuestAddress(address), len);
                connection.receive_buffers(&mut buffers)?;
            }
            Kind::Zeroes => {
                let mut body = [[0; ADDRESS]; 2];
                connection.receive(body.as_flattened_mut())?;
                let [address, len] = body.map(u64::from_le_bytes);
                let mut buffers = buffers(memory, address, len)?;
                while buffers.write(&[0; PAGE_SIZE]) > 0 {}
            }
            Kind::Compressed => {
                let mut body = [[0; ADDRESS]; 2];
                connection.receive(body.as_flattened_mut())?;
                let [address, len] = body.map(u64::from_le_bytes);
                let mut buffers = buffers(memory, address, len)?;
                let data = connection.receive_body(head.len.saturating_sub(2 * ADDRESS))?;
                let unpacker = match &mut unpacker {
                    Some(unpacker) => unpacker,
                    none => none.insert(Unpacker::new()?),
                };
                let written = buffers.write(unpacker.unpack(&data, len as usize)?);
                debug_assert_eq!(written as u64, len);
            }
            Kind::RoundEnd => connection.send_message(Kind::RoundTaken, &[])?,
            kind if kind == last => return Ok(head),
            _ => return Err(unexpected(head)),
        }
    }
}

/// Decompresses pages.
struct Unpacker {
    decompressor: Decompressor<'static>,
    content: Vec<u8>,
}

impl Unpacker {
    fn new() -> Result<Unpacker, MigrationError> {
        Ok(Unpacker {
            decompressor: Decompressor::new().map_err(MigrationError::Broken)?,
            content: Vec::with_capacity(MAX_PAGES),
        })
    }

    /// Returns what `data` is decompressed, which has to be `len` bytes, at most [`MAX_PAGES`].
    fn unpack(&mut self, data: &[u8], len: usize) -> Result<&[u8], MigrationError> {
        self.content.clear();
        // It fails if that is more than there is room for.
        let unpacked = self
            .decompressor
            .decompress_to_buffer(data, &mut self.content);
        match unpacked {
            Ok(count) if count == len => Ok(&self.content),
            _ => Err(MigrationError::Protocol(format!(
                "compressed pages are not {len} bytes of zstd"
            ))),
        }
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use bantam_memory::PageSet;
    use bantam_snapshot::Facts;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::{Compression, HandOver, Outgoing, Zeroes};

    const RANGES: [(GuestAddress, usize); 2] = [
        (GuestAddress(0), 40 * PAGE_SIZE),
        (GuestAddress(1 << 32), 8 * PAGE_SIZE),
    ];

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&RANGES).unwrap())
    }

    fn state() -> StateFile {
        let regions = RANGES.map(|(start, len)| (start.0, len as u64));
        let facts = Facts::now(None, regions).unwrap();
        StateFile::new("test".as_ref(), facts, None, Vec::new())
    }

    fn ends() -> [Connection; 2] {
        let (one, other) = UnixStream::pair().unwrap();
        [one, other].map(|it| Connection::new(it).unwrap())
    }

    fn address(page: u64) -> GuestAddress {
        GuestAddress(match page {
            ..40 => page * PAGE_SIZE as u64,
            _ => (1 << 32) + (page - 40) * PAGE_SIZE as u64,
        })
    }

    fn pages(numbers: impl IntoIterator<Item = u64>) -> PageSet {
        let mut pages = PageSet::empty(RANGES.map(|(start, len)| (start, len as u64)));
        for number in numbers {
            pages.insert(address(number));
        }
        pages
    }

    fn content(memory: &GuestMemory) -> Vec<u8> {
        let byte = |page| memory.read_obj(GuestAddress(address(page).0 + 7)).unwrap();
        (0..48).map(byte).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]

        #[test]
        fn all_pages_arrive(
            rounds in prop::collection::vec(prop::collection::btree_map(0..48_u64, any::<u8>(), 0..40), 1..5),
            runs: bool,
            others in 0..3_usize,
            compression in prop::option::of(Just(Compression::Zstd)),
        ) {
            let [mut source, receiver] = ends();
            let mut joining = Vec::new();
            for _ in 0..others {
                let [ours, theirs] = ends();
                source.add(ours);
                joining.push(theirs);
            }
            let receiver = thread::spawn(move || {
                let mut incoming = Incoming::new(receiver).unwrap();
                for other in joining {
                    assert!(incoming.awaits_connections());
                    incoming.join(other).unwrap();
                }
                assert!(!incoming.awaits_connections());
                let memory = memory();
                incoming.receive(&memory).unwrap();
                let runs = incoming.take_over().unwrap();
                incoming.confirm();
                (content(&memory), runs)
            });
            let memory = memory();
            let mut outgoing = Outgoing::offer(source, &state(), compression).unwrap();
            let mut zeroes = Zeroes::LeaveOut;
            for round in &rounds {
                for (&page, &byte) in round {
                    memory.write_slice(&[byte; PAGE_SIZE], address(page)).unwrap();
                }
                outgoing.send_pages(&memory, &pages(round.keys().copied()), zeroes).unwrap();
                outgoing.end_round().unwrap();
                zeroes = Zeroes::Send;
            }
            outgoing.send_state(&state()).unwrap();
            prop_assert!(matches!(outgoing.hand_over(runs), HandOver::Done));
            prop_assert_eq!(receiver.join().unwrap(), (content(&memory), runs));
        }

        #[test]
        fn a_source_that_sends_anything_is_refused_or_heard(
            offers: bool,
            messages in prop::collection::vec(
                (0..18_u32, prop::collection::vec(any::<u8>(), 0..40), any::<Option<u32>>()),
                0..8,
            ),
        ) {
            let (mut source, receiver) = UnixStream::pair().unwrap();
            let mut bytes = b"BANTAMMG\x03\0\0\0".to_vec();
            if offers {
                let mut offer = Vec::new();
                state().write_to(&mut offer).unwrap();
                bytes.extend_from_slice(&Head::bytes(Kind::Offer, offer.len()));
                bytes.extend_from_slice(&offer);
            }
            for (kind, body, len) in &messages {
                bytes.extend_from_slice(&kind.to_le_bytes());
                bytes.extend_from_slice(&len.unwrap_or(body.len() as u32).to_le_bytes());
                bytes.extend_from_slice(body);
            }
            source.write_all(&bytes).unwrap();
            source.shutdown(Shutdown::Write).unwrap();
            let received = Incoming::new(Connection::new(receiver).unwrap())
                .and_then(|mut incoming| incoming.receive(&memory()));
            prop_assert!(received.is_err());
        }
    }

    #[test]
    fn another_process_goes_on_with_an_offer() {
        let [source, receiver] = ends();
        let receiving = thread::spawn(move || {
            let (mut sockets, offer) = Incoming::new(receiver).unwrap().hand_on().unwrap();
            let connection = Connection::new(sockets.pop().unwrap()).unwrap();
            assert!(sockets.is_empty());
            let mut incoming = Incoming::handed_on(connection, offer);
            incoming.receive(&memory()).unwrap();
            incoming.take_over().unwrap();
            incoming.confirm();
        });
        let mut outgoing = Outgoing::offer(source, &state(), None).unwrap();
        outgoing.send_state(&state()).unwrap();
        assert!(matches!(outgoing.hand_over(true), HandOver::Done));
        receiving.join().unwrap();
    }

    #[test]
    fn a_connection_of_someone_else_does_not_join() {
        let [mut source, receiver] = ends();
        let [ours, theirs] = ends();
        source.add(ours);
        let offering = thread::spawn(move || Outgoing::offer(source, &state(), None));
        let mut incoming = Incoming::new(receiver).unwrap();
        for body in [[0; KEY].as_slice(), &[]] {
            let [stranger, other] = ends();
            stranger.send_greeting().unwrap();
            let kind = [Kind::Join, Kind::RoundEnd][usize::from(body.is_empty())];
            stranger.send_message(kind, body).unwrap();
            incoming.join(other).unwrap_err();
            assert!(incoming.awaits_connections());
        }
        incoming.join(theirs).unwrap();
        assert!(!incoming.awaits_connections());
        incoming.refuse("there is no room");
        offering.join().unwrap().unwrap_err();
    }

    #[test]
    fn if_one_of_several_connections_breaks_both_ends_fail() {
        let [mut source, receiver] = ends();
        let [ours, theirs] = ends();
        source.add(ours);
        let receiving = thread::spawn(move || {
            let mut incoming = Incoming::new(receiver).unwrap();
            let breaker = theirs.breaker();
            incoming.join(theirs).unwrap();
            let breaking = thread::spawn(move || {
                thread::sleep(std::time::Duration::from_millis(20));
                breaker.break_off();
            });
            let received = incoming.receive(&memory());
            breaking.join().unwrap();
            received.map(drop)
        });
        let mut outgoing = Outgoing::offer(source, &state(), None).unwrap();
        let memory = memory();
        let sent = loop {
            let sent = outgoing.send_pages(&memory, &pages(0..48), Zeroes::Send);
            if sent.and_then(|()| outgoing.end_round()).is_err() {
                break true;
            }
        };
        assert!(sent);
        receiving.join().unwrap().unwrap_err();
    }

    proptest! {
        #[test]
        fn compressed_pages_are_bounded_whatever_they_are(
            len in 0..2 * MAX_PAGES,
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut data = zstd::bulk::compress(&vec![7; len], 1).unwrap();
            for (place, byte) in damage {
                let place = place.index(data.len());
                data[place] = byte;
            }
            let mut unpacker = Unpacker::new().unwrap();
            for expected in [len, PAGE_SIZE] {
                if let Ok(unpacked) = unpacker.unpack(&data, expected) {
                    prop_assert_eq!(unpacked.len(), expected);
                    prop_assert!(expected <= MAX_PAGES);
                }
            }
        }
    }

    #[test]
    fn a_trial_is_answered_and_sends_nothing_else() {
        for refusal in [None, Some("there is no room")] {
            let [source, receiver] = ends();
            let answering = thread::spawn(move || {
                let incoming = Incoming::new(receiver).unwrap();
                assert!(incoming.is_trial());
                match refusal {
                    None => incoming.would_accept().unwrap(),
                    Some(reason) => incoming.refuse(reason),
                }
            });
            let answer = Outgoing::try_offer(&source, &state());
            answering.join().unwrap();
            match refusal {
                None => answer.unwrap(),
                Some(reason) => assert!(answer.unwrap_err().to_string().contains(reason)),
            }
        }
    }

    #[test]
    fn another_program_and_another_version_are_named() {
        for (greeting, expected) in [
            (
                b"BANTAMMG\x02\0\0\0".as_slice(),
                "version 2 of the protocol",
            ),
            (b"\x16\x03\x01\x02\0\x01\0\x01", "speaks TLS; use tls://"),
            (b"\x15\x03\x03\0\x02\x02\x32", "speaks TLS; use tls://"),
            (b"GET / HTTP/1.1\r\n", "is not a migration of Bantam"),
            (b"", "has closed"),
        ] {
            let (mut source, receiver) = UnixStream::pair().unwrap();
            source.write_all(greeting).unwrap();
            source.shutdown(Shutdown::Write).unwrap();
            let error = Incoming::new(Connection::new(receiver).unwrap()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn pages_outside_of_memory_are_refused() {
        let memory = memory();
        let page = PAGE_SIZE as u64;
        for (address, len, expected) in [
            (0, 40 * page, true),
            (1 << 32, 8 * page, true),
            (0, 41 * page, false),
            (39 * page, 2 * page, false),
            (1, page, false),
            (0, 1, false),
            (u64::MAX - page + 1, page, false),
            (0, u64::MAX - page + 1, false),
        ] {
            let buffers = buffers(&memory, address, len);
            assert_eq!(buffers.is_ok(), expected, "{address:#x} {len:#x}");
        }
    }
}
