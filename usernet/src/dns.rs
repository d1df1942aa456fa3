//! Answers of name servers (RFC 1035, section 4), as far as they say which addresses a name has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wire::{field, number16, number32};

const HEADER_SIZE: usize = 12;
/// The bit that says that a message is an answer, the kind of query, and how it went.
const IS_ANSWER: u16 = 0x8000;
const KIND_AND_RESULT: u16 = 0x780f;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const CLASS_INTERNET: u16 = 1;

/// Most bytes of a name (section 2.3.4).
const MAX_NAME_SIZE: usize = 255;
/// Most records of an answer that are read.
const MAX_RECORDS: usize = 128;
/// Most names that lead to each other.
const MAX_ALIASES: usize = 16;

/// Most bytes of a message that are kept until the rest has come: a guest may have thousands of connections to
/// name servers.
const MAX_KEPT_SIZE: usize = 4096;

/// The addresses of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The name that was asked for, in lower case and without a dot at its end.
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// For how many seconds the addresses are valid.
    pub(crate) time_to_live: u32,
}

enum Data {
    Alias(String),
    Address(IpAddr),
}

struct Record {
    owner: String,
    time_to_live: u32,
    data: Data,
}

/// Reads an answer to a query for addresses. Records count only if the name that was asked for leads to them: a
/// server could otherwise say something about names that are not its own.
pub(crate) fn read_answer(message: &[u8]) -> Option<Answer> {
    let flags = number16(message, 2)?;
    let question_count = number16(message, 4)?;
    if flags & (IS_ANSWER | KIND_AND_RESULT) != IS_ANSWER || question_count != 1 {
        return None;
    }
    let (name, end) = read_name(message, HEADER_SIZE)?;
    let kind = number16(message, end)?;
    if ![TYPE_A, TYPE_AAAA].contains(&kind) || number16(message, end + 2)? != CLASS_INTERNET {
        return None;
    }
    let count = usize::from(number16(message, 6)?).min(MAX_RECORDS);
    let mut offset = end + 4;
    let mut records = Vec::new();
    for _ in 0..count {
        // An answer may have been cut off.
        let Some((record, next)) = read_record(message, offset) else {
            break;
        };
        records.extend(record);
        offset = next;
    }
    let (mut last, mut time_to_live) = (&name, u32::MAX);
    for _ in 0..MAX_ALIASES {
        let alias = records.iter().find_map(|record| match &record.data {
            Data::Alias(target) if record.owner == *last => Some((target, record.time_to_live)),
            _ => None,
        });
        let Some((target, alias_time)) = alias else {
            break;
        };
        last = target;
        time_to_live = time_to_live.min(alias_time);
    }
    let mut addresses = Vec::new();
    for record in &records {
        if let Data::Address(address) = record.data
            && record.owner == *last
        {
            addresses.push(address);
            time_to_live = time_to_live.min(record.time_to_live);
        }
    }
    Some(Answer {
        name,
        addresses,
        time_to_live,
    })
}

/// Reads the record at `offset`, if it is one that matters, and returns where the next one is.
fn read_record(message: &[u8], offset: usize) -> Option<(Option<Record>, usize)> {
    let (owner, offset) = read_name(message, offset)?;
    let kind = number16(message, offset)?;
    let class = number16(message, offset + 2)?;
    // A time with its first bit set is zero (RFC 2181, section 8).
    let time_to_live = number32(message, offset + 4)?;
    let time_to_live = i32::try_from(time_to_live).map_or(0, i32::unsigned_abs);
    let size = usize::from(number16(message, offset + 8)?);
    let start = offset + 10;
    let bytes = message.get(start..start + size)?;
    let data = match (class, kind, size) {
        (CLASS_INTERNET, TYPE_A, 4) => {
            field::<4>(bytes, 0).map(|octets| Data::Address(Ipv4Addr::from(octets).into()))
        }
        (CLASS_INTERNET, TYPE_AAAA, 16) => {
            field::<16>(bytes, 0).map(|octets| Data::Address(Ipv6Addr::from(octets).into()))
        }
        (CLASS_INTERNET, TYPE_CNAME, _) => {
            read_name(message, start).map(|(target, _)| Data::Alias(target))
        }
        _ => None,
    };
    let record = data.map(|data| Record {
        owner,
        time_to_live,
        data,
    });
    Some((record, start + size))
}

/// Reads the name at `offset`, and returns where it ends. Names with bytes that are not those of host names are
/// not understood.
fn read_name(message: &[u8], offset: usize) -> Option<(String, usize)> {
    let mut name = String::new();
    let mut place = offset;
    let mut end = None;
    loop {
        let size = *message.get(place)?;
        match size >> 6 {
            0 if size == 0 => return Some((name, end.unwrap_or(place + 1))),
            0 => {
                let label = message.get(place + 1..place + 1 + usize::from(size))?;
                let is_usual = |byte: &u8| byte.is_ascii_graphic() && *byte != b'.';
                if !label.iter().all(is_usual) || name.len() + label.len() >= MAX_NAME_SIZE {
                    return None;
                }
                if !name.is_empty() {
                    name.push('.');
                }
                name.extend(
                    label
                        .iter()
                        .map(|byte| char::from(byte.to_ascii_lowercase())),
                );
                place += 1 + label.len();
            }
            3 => {
                let target = usize::from(number16(message, place)? & 0x3fff);
                end = end.or(Some(place + 2));
                // Names only refer to what is before them, so that none is without end.
                if target >= place {
                    return None;
                }
                place = target;
            }
            _ => return None,
        }
    }
}

/// Appends `name` as a list of labels, or nothing if it cannot be one.
pub(crate) fn write_name(bytes: &mut Vec<u8>, name: &str) {
    let is_label = |label: &str| (1..=63).contains(&label.len());
    if name.len() < MAX_NAME_SIZE - 1 && name.split('.').all(is_label) {
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
    }
}

/// Finds the messages in what a name server sends by TCP (RFC 1035, section 4.2.2).
#[derive(Debug, Default)]
pub(crate) struct MessageStream {
    /// The first of the two bytes of a size.
    size_start: Option<u8>,
    /// The start of the message that has begun.
    message: Vec<u8>,
    /// How many bytes of it are still to come.
    left: usize,
}

impl MessageStream {
    /// Takes further bytes, and calls `found` with each message that they complete. Of a large one, that is the
    /// start only.
    pub(crate) fn take(&mut self, mut bytes: &[u8], mut found: impl FnMut(&[u8])) {
        while let [first, rest @ ..] = bytes {
            if self.left == 0 {
                match self.size_start.take() {
                    None => self.size_start = Some(*first),
                    Some(start) => self.left = u16::from_be_bytes([start, *first]).into(),
                }
                bytes = rest;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.left));
            let room = MAX_KEPT_SIZE - self.message.len();
            self.message.extend(&now[..now.len().min(room)]);
            self.left -= now.len();
            bytes = later;
            if self.left == 0 {
                found(&std::mem::take(&mut self.message));
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Makes an answer to a query for `name`, whose records are owners, times and addresses or other names.
    pub(crate) fn answer(name: &str, records: &[(&str, u32, &str)]) -> Vec<u8> {
        let mut message = vec![0, 7, 0x81, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0];
        write_name(&mut message, name);
        message.extend([0, 1, 0, 1]);
        for (owner, time, data) in records {
            match *owner == name {
                true => message.extend([0xc0, HEADER_SIZE as u8]),
                false => write_name(&mut message, owner),
            }
            let mut bytes = Vec::new();
            let kind = match data.parse::<IpAddr>() {
                Ok(IpAddr::V4(address)) => {
                    bytes.extend(address.octets());
                    TYPE_A
                }
                Ok(IpAddr::V6(address)) => {
                    bytes.extend(address.octets());
                    TYPE_AAAA
                }
                Err(_) => {
                    write_name(&mut bytes, data);
                    TYPE_CNAME
                }
            };
            message.extend(kind.to_be_bytes());
            message.extend([0, 1]);
            message.extend(time.to_be_bytes());
            message.extend((bytes.len() as u16).to_be_bytes());
            message.extend(bytes);
        }
        message
    }

    #[test]
    fn addresses_are_those_that_the_name_leads_to() {
        let message = answer(
            "WWW.example.org",
            &[
                ("other.example.org", 9, "192.0.2.66"),
                ("cdn.example.net", 20, "192.0.2.1"),
                ("www.Example.org", 300, "cdn.example.net"),
                ("cdn.example.net", 10, "2001:db8::1"),
            ],
        );
        let read = read_answer(&message).unwrap();
        assert_eq!(read.name, "www.example.org");
        let addresses: Vec<_> = read.addresses.iter().map(IpAddr::to_string).collect();
        assert_eq!(addresses, ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(read.time_to_live, 10);
        // What is cut off has what is before.
        for size in 0..message.len() {
            let cut = read_answer(&message[..size]);
            assert!(cut.is_none_or(|cut| cut.addresses.len() < 2), "{size}");
        }
    }

    #[test]
    fn only_answers_are_read() {
        let good = answer("a.test", &[("a.test", 5, "192.0.2.1")]);
        assert!(read_answer(&good).is_some());
        for (offset, value) in [
            (2, 0x01),
            (2, 0x89),
            (3, 0x83),
            (5, 0),
            (5, 2),
            (20, 15),
            (22, 3),
        ] {
            let mut message = good.clone();
            message[offset] = value;
            assert_eq!(read_answer(&message), None, "{offset}");
        }
        // Names that refer to themselves, and to each other.
        let mut message = good.clone();
        message[12..14].copy_from_slice(&[0xc0, 12]);
        assert_eq!(read_answer(&message), None);
        let loops = [("a.test", 5, "b.test"), ("b.test", 5, "a.test")];
        let read = read_answer(&answer("a.test", &loops)).unwrap();
        assert_eq!(read.addresses, [] as [IpAddr; 0]);
    }

    #[test]
    fn messages_of_a_stream_are_found_however_it_is_cut() {
        let messages: [&[u8]; 3] = [b"one", b"three", &[7; 5000]];
        let mut bytes = Vec::new();
        for message in messages {
            bytes.extend((message.len() as u16).to_be_bytes());
            bytes.extend(message);
        }
        bytes.splice(5..5, [0, 0]);
        for size in 1..100 {
            let (mut stream, mut found) = (MessageStream::default(), Vec::new());
            for part in bytes.chunks(size) {
                stream.take(part, |message| found.push(message.to_vec()));
            }
            let sizes = found.iter().map(Vec::len).collect::<Vec<_>>();
            assert_eq!(sizes, [3, 5, MAX_KEPT_SIZE], "{size}");
            assert_eq!(found[..2], messages[..2]);
        }
    }

    #[test]
    fn any_bytes_are_read_or_not() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let _ = read_answer(bytes);
            // The fields of the header would rarely be right by chance.
            let header = [0, 7, 0x81, 0x80, 0, 1, 0, 200, 0, 0, 0, 0];
            let _ = read_answer(&[&header, bytes].concat());
            let mut message = answer("a.test", &[]);
            message[7] = 200;
            message.extend(bytes);
            if let Some(answer) = read_answer(&message) {
                assert!(answer.addresses.len() <= MAX_RECORDS);
            }
            MessageStream::default().take(bytes, |message| assert!(message.len() < bytes.len()));
        });
    }
}
