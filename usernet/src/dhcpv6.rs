//! A DHCPv6 server with one address (RFC 8415).

use std::net::Ipv6Addr;

use crate::dns::write_name;
use crate::wire::{Mac, field, number16, number32};

pub(crate) const SERVER_PORT: u16 = 547;
pub(crate) const CLIENT_PORT: u16 = 546;

/// The group of all servers and relay agents of a link.
pub(crate) const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// The largest message that is read.
pub(crate) const MAX_MESSAGE_SIZE: usize = 1500;
/// Bytes before the options: the kind, and the number of the transaction.
const HEADER_SIZE: usize = 4;
/// The largest identifier of a client (section 11.1), with the two bytes of its type.
const MAX_IDENTIFIER_SIZE: usize = 130;
/// Most requests for addresses in one message that are answered.
const MAX_ASSOCIATIONS: usize = 8;

/// How long an address is given for, in seconds.
const LEASE_TIME: u32 = 86_400;
const RENEW_TIME: u32 = LEASE_TIME / 2;
const REBIND_TIME: u32 = LEASE_TIME / 8 * 7;

mod kind {
    pub(super) const SOLICIT: u8 = 1;
    pub(super) const ADVERTISE: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const CONFIRM: u8 = 4;
    pub(super) const RENEW: u8 = 5;
    pub(super) const REBIND: u8 = 6;
    pub(super) const REPLY: u8 = 7;
    pub(super) const RELEASE: u8 = 8;
    pub(super) const DECLINE: u8 = 9;
    pub(super) const INFORMATION_REQUEST: u8 = 11;
}

mod option {
    pub(super) const CLIENT: u16 = 1;
    pub(super) const SERVER: u16 = 2;
    pub(super) const ADDRESSES: u16 = 3;
    pub(super) const ADDRESS: u16 = 5;
    pub(super) const STATUS: u16 = 13;
    pub(super) const RAPID_COMMIT: u16 = 14;
    // RFC 3646.
    pub(super) const NAME_SERVERS: u16 = 23;
    pub(super) const DOMAINS: u16 = 24;
    pub(super) const PREFIXES: u16 = 25;
}

mod status {
    pub(super) const SUCCESS: u16 = 0;
    pub(super) const NO_ADDRESSES: u16 = 2;
    pub(super) const NOT_ON_LINK: u16 = 4;
    pub(super) const NO_PREFIX: u16 = 6;
}

/// What a client is told.
#[derive(Debug, Clone)]
pub(crate) struct Lease<'a> {
    /// The server's Ethernet address, by which it is identified.
    pub(crate) mac: Mac,
    pub(crate) address: Ipv6Addr,
    /// `None` if the guest reaches nothing.
    pub(crate) dns: Option<Ipv6Addr>,
    pub(crate) domain: Option<&'a str>,
}

/// A request for addresses, or for prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Association {
    kind: u16,
    number: u32,
}

#[derive(Debug, PartialEq, Eq)]
struct Message<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    server: Option<&'a [u8]>,
    associations: Vec<Association>,
    /// An address that the client names.
    named: Option<Ipv6Addr>,
    is_rapid: bool,
}

/// Calls `found` for each option in `bytes`; `None` if one is cut off.
fn for_each_option<'a>(mut bytes: &'a [u8], mut found: impl FnMut(u16, &'a [u8])) -> Option<()> {
    while !bytes.is_empty() {
        let kind = number16(bytes, 0)?;
        let end = 4 + usize::from(number16(bytes, 2)?);
        found(kind, bytes.get(4..end)?);
        bytes = &bytes[end..];
    }
    Some(())
}

impl<'a> Message<'a> {
    fn read(bytes: &'a [u8]) -> Option<Message<'a>> {
        let [kind, transaction @ ..] = field::<HEADER_SIZE>(bytes, 0)?;
        let mut message = Message {
            kind,
            transaction,
            client: None,
            server: None,
            associations: Vec::new(),
            named: None,
            is_rapid: false,
        };
        for_each_option(&bytes[HEADER_SIZE..], |kind, value| match kind {
            option::CLIENT if value.len() <= MAX_IDENTIFIER_SIZE => message.client = Some(value),
            option::SERVER => message.server = Some(value),
            option::ADDRESSES | option::PREFIXES => {
                if let Some(number) = number32(value, 0)
                    && message.associations.len() < MAX_ASSOCIATIONS
                {
                    message.associations.push(Association { kind, number });
                }
                let inner = value.get(12..).unwrap_or_default();
                // What is wrong inside does not matter to the rest.
                let _ = for_each_option(inner, |kind, value| {
                    if kind == option::ADDRESS {
                        message.named = field::<16>(value, 0).map(Ipv6Addr::from);
                    }
                });
            }
            option::RAPID_COMMIT => message.is_rapid = true,
            _ => {}
        })?;
        Some(message)
    }

    /// Returns the kind of answer, or `None` if there is none to give (section 16).
    fn answer(&self, own: &[u8]) -> Option<u8> {
        let needs_server = match self.kind {
            kind::SOLICIT | kind::CONFIRM | kind::REBIND => Some(false),
            kind::REQUEST | kind::RENEW | kind::RELEASE | kind::DECLINE => Some(true),
            kind::INFORMATION_REQUEST => None,
            _ => return None,
        };
        let is_right = match (needs_server, self.server) {
            (Some(true), server) => server == Some(own),
            (Some(false), server) => server.is_none(),
            (None, server) => server.is_none_or(|server| server == own),
        };
        let is_complete = self.client.is_some() || self.kind == kind::INFORMATION_REQUEST;
        (is_right && is_complete).then_some(match self.kind {
            kind::SOLICIT if !self.is_rapid => kind::ADVERTISE,
            _ => kind::REPLY,
        })
    }
}

fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    // No value here has more than some hundred bytes.
    bytes.extend((value.len() as u16).to_be_bytes());
    bytes.extend(value);
}

/// Returns the server's identifier, made of its Ethernet address (section 11.4).
fn identifier(mac: Mac) -> Vec<u8> {
    [&[0, 3, 0, 1], &mac[..]].concat()
}

/// Answers a client's message, if an answer is due.
pub(crate) fn answer(bytes: &[u8], lease: &Lease<'_>) -> Option<Vec<u8>> {
    let message = Message::read(bytes)?;
    let own = identifier(lease.mac);
    let kind = message.answer(&own)?;
    let mut reply = vec![kind];
    reply.extend(message.transaction);
    if let Some(client) = message.client {
        put(&mut reply, option::CLIENT, client);
    }
    put(&mut reply, option::SERVER, &own);
    match message.kind {
        kind::INFORMATION_REQUEST => {}
        kind::CONFIRM => {
            let has_prefix =
                |address: Ipv6Addr| address.to_bits() >> 64 == lease.address.to_bits() >> 64;
            let status = match message.named {
                Some(address) if !has_prefix(address) => status::NOT_ON_LINK,
                _ => status::SUCCESS,
            };
            put(&mut reply, option::STATUS, &status.to_be_bytes());
        }
        kind::RELEASE | kind::DECLINE => {
            put(&mut reply, option::STATUS, &status::SUCCESS.to_be_bytes());
        }
        _ => {
            if message.is_rapid && message.kind == kind::SOLICIT {
                put(&mut reply, option::RAPID_COMMIT, &[]);
            }
            let first = message.associations.iter();
            let first = first.copied().find(|one| one.kind == option::ADDRESSES);
            for &association in &message.associations {
                put_association(&mut reply, association, Some(association) == first, lease);
            }
        }
    }
    if let Some(dns) = lease.dns {
        put(&mut reply, option::NAME_SERVERS, &dns.octets());
    }
    let mut domain = Vec::new();
    write_name(&mut domain, lease.domain.unwrap_or_default());
    if !domain.is_empty() {
        put(&mut reply, option::DOMAINS, &domain);
    }
    Some(reply)
}

/// Appends the answer to a request for addresses: `has_address` says whether it gets the only one.
fn put_association(
    reply: &mut Vec<u8>,
    association: Association,
    has_address: bool,
    lease: &Lease<'_>,
) {
    let mut value = association.number.to_be_bytes().to_vec();
    let times = if has_address {
        [RENEW_TIME, REBIND_TIME]
    } else {
        [0, 0]
    };
    value.extend(times.map(u32::to_be_bytes).as_flattened());
    if has_address {
        let mut address = lease.address.octets().to_vec();
        // For how long it is preferred, and valid.
        address.extend([LEASE_TIME; 2].map(u32::to_be_bytes).as_flattened());
        put(&mut value, option::ADDRESS, &address);
    } else {
        let status = match association.kind {
            option::PREFIXES => status::NO_PREFIX,
            _ => status::NO_ADDRESSES,
        };
        put(&mut value, option::STATUS, &status.to_be_bytes());
    }
    put(reply, association.kind, &value);
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: [u8; 10] = [0, 3, 0, 1, 2, 0, 0, 0, 0, 1];
    const MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];

    fn lease() -> Lease<'static> {
        Lease {
            mac: MAC,
            address: "fd00::15".parse().unwrap(),
            dns: Some("fd00::3".parse().unwrap()),
            domain: Some("example.org"),
        }
    }

    fn message(kind: u8, server: Option<&[u8]>, options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![kind, 1, 2, 3];
        put(&mut bytes, option::CLIENT, &CLIENT);
        if let Some(server) = server {
            put(&mut bytes, option::SERVER, server);
        }
        for (kind, value) in options {
            put(&mut bytes, *kind, value);
        }
        bytes
    }

    type Options = Vec<(u16, Vec<u8>)>;

    /// The kind of the answer, and its options.
    fn answered(bytes: &[u8]) -> Option<(u8, Options)> {
        let answer = answer(bytes, &lease())?;
        assert_eq!(answer[1..4], [1, 2, 3]);
        let mut options = Vec::new();
        for_each_option(&answer[4..], |kind, value| {
            options.push((kind, value.to_vec()));
        })
        .unwrap();
        Some((answer[0], options))
    }

    fn value(options: &[(u16, Vec<u8>)], wanted: u16) -> Option<&[u8]> {
        let found = options.iter().find(|(kind, _)| *kind == wanted);
        found.map(|(_, value)| value.as_slice())
    }

    #[test]
    fn the_one_address_is_given_to_whoever_asks() {
        let own = identifier(MAC);
        let wish: (u16, &[u8]) = (option::ADDRESSES, &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        let other: (u16, &[u8]) = (option::ADDRESSES, &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
        let prefix: (u16, &[u8]) = (option::PREFIXES, &[0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0]);
        for (kind, server, expected) in [
            (kind::SOLICIT, None, Some(kind::ADVERTISE)),
            (kind::REQUEST, Some(&own[..]), Some(kind::REPLY)),
            (kind::RENEW, Some(&own[..]), Some(kind::REPLY)),
            (kind::REBIND, None, Some(kind::REPLY)),
            // To another server, or to none.
            (kind::REQUEST, Some(&b"other"[..]), None),
            (kind::REQUEST, None, None),
            (kind::SOLICIT, Some(&own[..]), None),
            (kind::ADVERTISE, None, None),
            // A message of a relay agent.
            (12, None, None),
        ] {
            let found = answered(&message(kind, server, &[wish, other, prefix]));
            assert_eq!(found.as_ref().map(|(kind, _)| *kind), expected, "{kind}");
            let Some((_, options)) = found else {
                continue;
            };
            assert_eq!(value(&options, option::CLIENT), Some(&CLIENT[..]));
            assert_eq!(value(&options, option::NAME_SERVERS).unwrap()[15], 3);
            let given: Vec<_> = options
                .iter()
                .filter(|(kind, _)| [option::ADDRESSES, option::PREFIXES].contains(kind))
                .map(|(_, value)| (value[3], value[13], value[value.len() - 9]))
                .collect();
            // The first gets the address; the others are told that there is none.
            assert_eq!(given[0], (7, option::ADDRESS as u8, 0x15));
            assert_eq!([given[1].1, given[2].1], [option::STATUS as u8; 2]);
        }
    }

    #[test]
    fn information_is_given_without_an_address() {
        let bytes = [kind::INFORMATION_REQUEST, 1, 2, 3];
        let (kind, options) = answered(&bytes).unwrap();
        assert_eq!(kind, kind::REPLY);
        let kinds: Vec<_> = options.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(
            kinds,
            [option::SERVER, option::NAME_SERVERS, option::DOMAINS]
        );
        assert_eq!(options[2].1, b"\x07example\x03org\0");
        let rapid = message(kind::SOLICIT, None, &[(option::RAPID_COMMIT, &[])]);
        assert_eq!(answered(&rapid).unwrap().0, kind::REPLY);
    }

    #[test]
    fn addresses_of_another_link_are_not_confirmed() {
        for (address, expected) in [("fd00::99", 0), ("fd01::99", 4)] {
            let address: Ipv6Addr = address.parse().unwrap();
            let mut wish = vec![0; 12];
            put(
                &mut wish,
                option::ADDRESS,
                &[&address.octets()[..], &[0; 8]].concat(),
            );
            let bytes = message(kind::CONFIRM, None, &[(option::ADDRESSES, &wish)]);
            let (_, options) = answered(&bytes).unwrap();
            assert_eq!(value(&options, option::STATUS), Some(&[0, expected][..]));
        }
    }

    #[test]
    fn any_bytes_are_answered_or_not() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let _ = answer(bytes, &lease());
            for kind in 1..12 {
                let mut message = message(kind, None, &[]);
                message.extend(bytes);
                let answer = answer(&message, &lease());
                assert!(answer.is_none_or(|answer| answer.len() < 1000));
            }
        });
    }
}
