//! Interfaces, addresses and routes of the host, by rtnetlink.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoMacVtap, InfoPortData, InfoPortKind, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, MacVtapMode,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;

use crate::subnet::Prefix;

/// How long the kernel may take to answer, in seconds. It answers while it is asked, unless another program holds its
/// lock.
const ANSWER_LIMIT: i64 = 10;
/// The name of a route's table that has the host's own addresses (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u8 = 255;

/// An interface of the host.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) is_bridge: bool,
    /// The bridge that it is a port of.
    pub(crate) controller: Option<u32>,
}

/// A connection to the kernel in the network namespace in which it was made.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects to the kernel.
    ///
    /// # Errors
    /// If there is no such socket.
    pub(crate) fn new() -> io::Result<Netlink> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(ANSWER_LIMIT, 0))?;
        Ok(Netlink {
            socket,
            sequence: 0,
        })
    }

    /// Returns the interface called `name`, if there is one.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub(crate) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
        ];
        match self.request(RouteNetlinkMessage::GetLink(message), 0) {
            Ok(answers) => Ok(answers.into_iter().find_map(link_of)),
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns all interfaces.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub(crate) fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
        let answers = self.request(RouteNetlinkMessage::GetLink(message), NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(link_of).collect())
    }

    /// Makes a bridge with a MAC address that stays.
    ///
    /// # Errors
    /// If there is an interface of that name, or this user may not do it.
    pub(crate) fn add_bridge(&mut self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.change(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Makes an interface that is a station with the address `mac` beside the interface `parent`, and whose frames
    /// a program reads and writes, and brings it up.
    ///
    /// # Errors
    /// If there is an interface of that name, the parent cannot have such stations, or this user may not do it.
    pub(crate) fn add_macvtap(&mut self, name: &str, parent: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Link(parent),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::MacVtap),
                LinkInfo::Data(InfoData::MacVtap(vec![InfoMacVtap::Mode(
                    MacVtapMode::Bridge,
                )])),
            ]),
        ];
        self.change(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Removes an interface, unless it is gone.
    ///
    /// # Errors
    /// If this user may not do it.
    pub(crate) fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let message = link_message(index);
        match self.change(RouteNetlinkMessage::DelLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
            changed => changed,
        }
    }

    /// Brings an interface up.
    ///
    /// # Errors
    /// If it is gone, or this user may not do it.
    pub(crate) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = link_message(index);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Makes an interface a port of a bridge, brings it up, and says whether other such ports are kept from it.
    ///
    /// # Errors
    /// If one of them is gone, or this user may not do it.
    pub(crate) fn add_port(
        &mut self,
        index: u32,
        bridge: u32,
        is_isolated: bool,
    ) -> io::Result<()> {
        let mut message = link_message(index);
        message.attributes = vec![LinkAttribute::Controller(bridge)];
        self.change(RouteNetlinkMessage::SetLink(message), 0)?;
        if is_isolated {
            let mut message = link_message(index);
            message.attributes = vec![LinkAttribute::LinkInfo(vec![
                LinkInfo::PortKind(InfoPortKind::Bridge),
                LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::Isolated(
                    true,
                )])),
            ])];
            self.change(RouteNetlinkMessage::NewLink(message), 0)?;
        }
        self.set_up(index)
    }

    /// Gives an interface an address, which is usable at once.
    ///
    /// # Errors
    /// If it has the address, or this user may not do it.
    pub(crate) fn add_address(&mut self, index: u32, address: IpAddr, bits: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = bits;
        message.header.scope = AddressScope::Universe;
        message.header.family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        match address {
            IpAddr::V4(address) => {
                let broadcast = address.to_bits() | u32::MAX.checked_shr(bits.into()).unwrap_or(0);
                message
                    .attributes
                    .push(AddressAttribute::Broadcast(broadcast.into()));
            }
            // The prefix is random, so that nobody else has the address.
            IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
        }
        self.change(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Returns the routes of all tables except that of the host's own addresses, and except default routes.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub(crate) fn routes(&mut self) -> io::Result<Vec<Prefix>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
            routes.extend(answers.into_iter().filter_map(destination_of));
        }
        Ok(routes)
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(drop)
    }

    /// Sends a request and returns the answers to it.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let has_end = flags & (NLM_F_ACK | NLM_F_DUMP) != 0;
        let mut answers = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            let mut rest = &received[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                let answer =
                    answer.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let size = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(size.max(1)..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Error(error) => match error.code {
                        Some(_) => return Err(error.to_io()),
                        None => return Ok(answers),
                    },
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    _ => {}
                }
            }
            if !has_end && !answers.is_empty() {
                return Ok(answers);
            }
        }
    }
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        is_bridge: false,
        controller: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::LinkInfo(information) => {
                link.is_bridge = information.contains(&LinkInfo::Kind(InfoKind::Bridge));
            }
            _ => {}
        }
    }
    Some(link)
}

/// Returns the addresses that a route of the host leads to.
fn destination_of(message: RouteNetlinkMessage) -> Option<Prefix> {
    let RouteNetlinkMessage::NewRoute(message) = message else {
        return None;
    };
    let RouteHeader {
        table,
        destination_prefix_length: bits,
        kind,
        ..
    } = message.header;
    if table == LOCAL_TABLE || bits == 0 || kind == RouteType::Multicast {
        return None;
    }
    let address = message
        .attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(found)) => Some(IpAddr::V4(found)),
            RouteAttribute::Destination(RouteAddress::Inet6(found)) => Some(IpAddr::V6(found)),
            _ => None,
        })?;
    Some(Prefix { address, bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lists_its_interfaces_and_routes() {
        let mut netlink = Netlink::new().unwrap();
        let loopback = netlink.link("lo").unwrap().unwrap();
        assert_eq!(loopback.name, "lo");
        assert!(!loopback.is_bridge);
        assert_eq!(loopback.controller, None);
        assert!(netlink.link("no-such-link").unwrap().is_none());
        let links = netlink.links().unwrap();
        assert!(links.iter().any(|link| link.index == loopback.index));
        for destination in netlink.routes().unwrap() {
            assert!(destination.bits > 0);
        }
    }
}
