//! A DHCP server with one address (RFC 2131, RFC 2132).

use std::net::Ipv4Addr;

use crate::wire::{Mac, field, number16, number32};

pub(crate) const SERVER_PORT: u16 = 67;
pub(crate) const CLIENT_PORT: u16 = 68;

/// The largest message that is read.
pub(crate) const MAX_MESSAGE_SIZE: usize = 1500;

/// The number at the start of options.
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Where the cookie is, after the fields of BOOTP.
const COOKIE_OFFSET: usize = 236;
/// The smallest message that all clients take (RFC 1542, section 2.1).
const MIN_REPLY_SIZE: usize = 300;

/// How long an address is given for, in seconds.
const LEASE_TIME: u32 = 86_400;

const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;

mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const NAME_SERVER: u8 = 6;
    pub(super) const HOSTNAME: u8 = 12;
    pub(super) const DOMAIN: u8 = 15;
    pub(super) const MTU: u8 = 26;
    pub(super) const BROADCAST: u8 = 28;
    pub(super) const REQUESTED_ADDRESS: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const END: u8 = 255;
}

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// What a client is told.
#[derive(Debug, Clone)]
pub(crate) struct Lease<'a> {
    pub(crate) address: Ipv4Addr,
    pub(crate) mask: Ipv4Addr,
    pub(crate) broadcast: Ipv4Addr,
    /// The gateway, which is the server too.
    pub(crate) gateway: Ipv4Addr,
    /// `None` if the guest reaches nothing.
    pub(crate) dns: Option<Ipv4Addr>,
    pub(crate) mtu: u16,
    pub(crate) domain: Option<&'a str>,
    pub(crate) hostname: Option<&'a str>,
}

/// A client's message.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    transaction: u32,
    flags: u16,
    /// The address that the client has, or 0.0.0.0.
    client: Ipv4Addr,
    /// The relay agent's fields, which are returned.
    relay: [u8; 4],
    /// All 16 bytes of the field for the hardware address.
    hardware: [u8; 16],
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Message {
    fn read(bytes: &[u8]) -> Option<Message> {
        let ethernet = [BOOT_REQUEST, 1, 6];
        if !bytes.starts_with(&ethernet) || field(bytes, COOKIE_OFFSET)? != COOKIE {
            return None;
        }
        let mut message = Message {
            transaction: number32(bytes, 4)?,
            flags: number16(bytes, 10)?,
            client: field::<4>(bytes, 12)?.into(),
            relay: field(bytes, 24)?,
            hardware: field(bytes, 28)?,
            kind: 0,
            requested: None,
            server: None,
        };
        let mut options = bytes.get(COOKIE_OFFSET + COOKIE.len()..)?;
        while let [kind, rest @ ..] = options {
            if *kind == option::PAD {
                options = rest;
                continue;
            }
            let (Some(&size), false) = (rest.first(), *kind == option::END) else {
                break;
            };
            let value = rest.get(1..1 + usize::from(size))?;
            let address = || field::<4>(value, 0).map(Ipv4Addr::from);
            match *kind {
                option::MESSAGE_TYPE => message.kind = *value.first()?,
                option::REQUESTED_ADDRESS => message.requested = address(),
                option::SERVER => message.server = address(),
                _ => {}
            }
            options = &rest[1 + usize::from(size)..];
        }
        Some(message)
    }

    /// Returns the kind of answer, or `None` if there is none to give.
    fn answer(&self, lease: &Lease<'_>) -> Option<u8> {
        match self.kind {
            DISCOVER => Some(OFFER),
            INFORM => Some(ACK),
            REQUEST => {
                if self.server.is_some_and(|server| server != lease.gateway) {
                    // The client has chosen another server.
                    return None;
                }
                let wanted = self.requested.unwrap_or(self.client);
                Some(if wanted == lease.address { ACK } else { NAK })
            }
            _ => None,
        }
    }
}

/// An answer, and how it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) message: Vec<u8>,
    /// The address that it is sent to.
    pub(crate) destination: Ipv4Addr,
    /// The client's Ethernet address; `None` if the answer goes to all.
    pub(crate) mac: Option<Mac>,
}

/// Answers a client's message, if an answer is due.
pub(crate) fn answer(bytes: &[u8], lease: &Lease<'_>) -> Option<Answer> {
    let message = Message::read(bytes)?;
    let kind = message.answer(lease)?;
    let given = match kind {
        OFFER => lease.address,
        ACK if message.kind == REQUEST => lease.address,
        _ => Ipv4Addr::UNSPECIFIED,
    };
    let mut reply = vec![BOOT_REPLY, 1, 6, 0];
    reply.extend(message.transaction.to_be_bytes());
    reply.extend([0, 0]);
    reply.extend(message.flags.to_be_bytes());
    let client = if kind == NAK {
        Ipv4Addr::UNSPECIFIED
    } else {
        message.client
    };
    reply.extend(client.octets());
    reply.extend(given.octets());
    // The server from which the client would load its system: none.
    reply.extend([0; 4]);
    reply.extend(message.relay);
    reply.extend(message.hardware);
    reply.resize(COOKIE_OFFSET, 0);
    reply.extend(COOKIE);
    let mut put = |kind: u8, value: &[u8]| {
        // No value here has more than 253 bytes.
        reply.extend([kind, value.len() as u8]);
        reply.extend(value);
    };
    put(option::MESSAGE_TYPE, &[kind]);
    put(option::SERVER, &lease.gateway.octets());
    if kind != NAK {
        if message.kind != INFORM {
            put(option::LEASE_TIME, &LEASE_TIME.to_be_bytes());
        }
        put(option::SUBNET_MASK, &lease.mask.octets());
        put(option::BROADCAST, &lease.broadcast.octets());
        put(option::MTU, &lease.mtu.to_be_bytes());
        if let Some(dns) = lease.dns {
            put(option::ROUTER, &lease.gateway.octets());
            put(option::NAME_SERVER, &dns.octets());
        }
        if let Some(domain) = lease.domain {
            put(option::DOMAIN, domain.as_bytes());
        }
        if let Some(hostname) = lease.hostname {
            put(option::HOSTNAME, hostname.as_bytes());
        }
    }
    reply.push(option::END);
    reply.resize(reply.len().max(MIN_REPLY_SIZE), option::PAD);
    let has_address = kind != NAK && !message.client.is_unspecified();
    // Many clients read whole frames and so get a frame to all whatever their address; one that has its
    // address already takes only what is sent to it.
    Some(Answer {
        message: reply,
        destination: if has_address {
            message.client
        } else {
            Ipv4Addr::BROADCAST
        },
        mac: has_address.then(|| field(&message.hardware, 0)).flatten(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
    const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

    fn lease() -> Lease<'static> {
        Lease {
            address: GUEST,
            mask: Ipv4Addr::new(255, 255, 255, 0),
            broadcast: Ipv4Addr::new(10, 0, 2, 255),
            gateway: SERVER,
            dns: Some(Ipv4Addr::new(10, 0, 2, 3)),
            mtu: 65520,
            domain: Some("example.org"),
            hostname: Some("guest"),
        }
    }

    fn message(kind: u8, client: Ipv4Addr, options: &[(u8, Ipv4Addr)]) -> Vec<u8> {
        let mut bytes = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, 0, 0];
        bytes.extend(client.octets());
        bytes.resize(28, 0);
        bytes.extend([2, 0, 0, 0, 0, 1]);
        bytes.resize(COOKIE_OFFSET, 0);
        bytes.extend(COOKIE);
        bytes.extend([option::PAD, option::MESSAGE_TYPE, 1, kind]);
        for (kind, address) in options {
            bytes.extend([*kind, 4]);
            bytes.extend(address.octets());
        }
        bytes.push(option::END);
        bytes
    }

    /// The kind of the answer, the address that it gives, and where it goes.
    fn answered(bytes: &[u8]) -> Option<(u8, Ipv4Addr, Ipv4Addr)> {
        let answer = answer(bytes, &lease())?;
        let given = field::<4>(&answer.message, 16).unwrap().into();
        assert!(answer.message.len() >= MIN_REPLY_SIZE);
        Some((answer.message[COOKIE_OFFSET + 6], given, answer.destination))
    }

    #[test]
    fn the_one_address_is_given() {
        const NONE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
        const ALL: Ipv4Addr = Ipv4Addr::BROADCAST;
        let requested = option::REQUESTED_ADDRESS;
        let other = Ipv4Addr::new(192, 168, 1, 7);
        for (kind, client, options, expected) in [
            (DISCOVER, NONE, vec![], Some((OFFER, GUEST, ALL))),
            (
                DISCOVER,
                NONE,
                vec![(requested, other)],
                Some((OFFER, GUEST, ALL)),
            ),
            (
                REQUEST,
                NONE,
                vec![(requested, GUEST), (option::SERVER, SERVER)],
                Some((ACK, GUEST, ALL)),
            ),
            // After a restart of the guest, and to renew.
            (
                REQUEST,
                NONE,
                vec![(requested, GUEST)],
                Some((ACK, GUEST, ALL)),
            ),
            (REQUEST, GUEST, vec![], Some((ACK, GUEST, GUEST))),
            (
                REQUEST,
                NONE,
                vec![(requested, other)],
                Some((NAK, NONE, ALL)),
            ),
            (REQUEST, other, vec![], Some((NAK, NONE, ALL))),
            (
                REQUEST,
                NONE,
                vec![(requested, GUEST), (option::SERVER, other)],
                None,
            ),
            (INFORM, other, vec![], Some((ACK, NONE, other))),
            // A release.
            (7, GUEST, vec![], None),
        ] {
            let bytes = message(kind, client, &options);
            assert_eq!(answered(&bytes), expected, "{kind} {client} {options:?}");
        }
    }

    #[test]
    fn what_is_cut_off_is_not_answered() {
        let bytes = message(DISCOVER, Ipv4Addr::UNSPECIFIED, &[(option::SERVER, SERVER)]);
        for size in 0..COOKIE_OFFSET + 8 {
            assert_eq!(answered(&bytes[..size]), None, "{size}");
        }
    }

    proptest! {
        #[test]
        fn any_message_is_answered_or_not(
            kind in any::<u8>(),
            options in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut bytes = message(kind, Ipv4Addr::UNSPECIFIED, &[]);
            bytes.pop();
            bytes.extend(options);
            let _ = answer(&bytes, &lease());
        }
    }
}
