//! Queries about a tap over rtnetlink.
//!
//! A socket belongs to the network namespace that it was created in, which is also the one in which
//! `/dev/net/tun` attaches. sysfs shows the namespace that it was mounted in, which may be a different one.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// Number of the request, which its answer repeats.
const SEQUENCE: u32 = 1;

/// Size of `struct nlmsghdr` in bytes.
const MESSAGE_HEADER_SIZE: usize = 16;
/// Size of `struct ifinfomsg` in bytes.
const INTERFACE_HEADER_SIZE: usize = 16;
/// Size of `struct nlattr` in bytes.
const ATTRIBUTE_HEADER_SIZE: usize = 4;
/// Attributes begin at multiples of this many bytes (`NLA_ALIGNTO`).
const ALIGNMENT: usize = 4;

// Of `linux/if_link.h`; libc lacks them.
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;

/// Returns how many queues of the tap called `name` are attached by any process, whether or not they are in
/// use. `None` if there is no such interface, it is not a tap, or it was made with a single queue, which the
/// kernel gives to one user only and does not count.
///
/// # Errors
/// If the kernel cannot be asked.
pub(super) fn attached_queues(name: &str) -> io::Result<Option<u32>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let fd = socket.as_raw_fd();
    send(fd, &encode_request(name), MsgFlags::empty())?;
    // The kernel answers before `send` returns, so there is nothing to wait for.
    let probe = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
    let size = recv(fd, &mut [], probe)?;
    let mut answer = vec![0; size];
    let received = recv(fd, &mut answer, MsgFlags::MSG_DONTWAIT)?;
    answer.truncate(received);
    decode_answer(&answer)
}

/// Encodes a request for everything about an interface except its counters.
fn encode_request(name: &str) -> Vec<u8> {
    let mut body = vec![0; INTERFACE_HEADER_SIZE];
    push_attribute(
        &mut body,
        libc::IFLA_IFNAME,
        &[name.as_bytes(), b"\0"].concat(),
    );
    let skip_counters = libc::RTEXT_FILTER_SKIP_STATS as u32;
    push_attribute(&mut body, libc::IFLA_EXT_MASK, &skip_counters.to_ne_bytes());
    encode_message(libc::RTM_GETLINK, &body)
}

fn encode_message(kind: u16, body: &[u8]) -> Vec<u8> {
    let size = (MESSAGE_HEADER_SIZE + body.len()) as u32;
    let sender: u32 = 0;
    [
        &size.to_ne_bytes()[..],
        &kind.to_ne_bytes(),
        &(libc::NLM_F_REQUEST as u16).to_ne_bytes(),
        &SEQUENCE.to_ne_bytes(),
        &sender.to_ne_bytes(),
        body,
    ]
    .concat()
}

fn push_attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let size = (ATTRIBUTE_HEADER_SIZE + value.len()) as u16;
    message.extend(size.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(ALIGNMENT), 0);
}

fn decode_answer(answer: &[u8]) -> io::Result<Option<u32>> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "netlink sent a broken answer");
    let mut rest = answer;
    let size = take_u32(&mut rest).ok_or_else(invalid)?;
    let kind = take_u16(&mut rest).ok_or_else(invalid)?;
    let _flags = take_u16(&mut rest).ok_or_else(invalid)?;
    let sequence = take_u32(&mut rest).ok_or_else(invalid)?;
    let body = answer.get(MESSAGE_HEADER_SIZE..size as usize);
    let mut body = body.ok_or_else(invalid)?;
    if sequence != SEQUENCE {
        return Err(invalid());
    }
    if kind == libc::NLMSG_ERROR as u16 {
        let errno = take_u32(&mut body).ok_or_else(invalid)? as i32;
        return match errno.wrapping_neg() {
            libc::ENODEV => Ok(None),
            errno => Err(io::Error::from_raw_os_error(errno)),
        };
    }
    let attributes = body.get(INTERFACE_HEADER_SIZE..);
    let attributes = attributes.filter(|_| kind == libc::RTM_NEWLINK);
    Ok(queues_of_link(attributes.ok_or_else(invalid)?))
}

fn queues_of_link(attributes: &[u8]) -> Option<u32> {
    let information = find(attributes, libc::IFLA_LINKINFO)?;
    // The attributes of other kinds of interfaces have the same numbers.
    if find(information, libc::IFLA_INFO_KIND)? != b"tun\0" {
        return None;
    }
    let tap = find(information, libc::IFLA_INFO_DATA)?;
    let count = |kind| find(tap, kind).and_then(|mut value| take_u32(&mut value));
    let in_use = count(IFLA_TUN_NUM_QUEUES)?;
    Some(in_use.saturating_add(count(IFLA_TUN_NUM_DISABLED_QUEUES)?))
}

/// Returns the value of the first attribute of the kind `wanted`.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let mut header = attributes;
        let size = usize::from(take_u16(&mut header)?);
        // The upper two bits are flags.
        let kind = take_u16(&mut header)? & libc::NLA_TYPE_MASK as u16;
        let value = attributes.get(ATTRIBUTE_HEADER_SIZE..size)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(size.next_multiple_of(ALIGNMENT)..)?;
    }
}

fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    let (value, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u16::from_ne_bytes(*value))
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (value, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_ne_bytes(*value))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, kind, value);
        bytes
    }

    /// Builds an answer about an interface of `kind`, with other attributes before and after the relevant
    /// ones.
    fn answer(kind: &str, data: &[u8], others: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut body = vec![0; INTERFACE_HEADER_SIZE];
        let others: Vec<u8> = others
            .iter()
            .filter(|(kind, _)| kind & libc::NLA_TYPE_MASK as u16 != libc::IFLA_LINKINFO)
            .flat_map(|(kind, value)| attribute(*kind, value))
            .collect();
        body.extend(&others);
        let information = [
            attribute(libc::IFLA_INFO_KIND, &[kind.as_bytes(), b"\0"].concat()),
            attribute(libc::IFLA_INFO_DATA | libc::NLA_F_NESTED as u16, data),
        ];
        body.extend(attribute(libc::IFLA_LINKINFO, &information.concat()));
        body.extend(&others);
        encode_message(libc::RTM_NEWLINK, &body)
    }

    fn queues(in_use: u32, disabled: u32) -> Vec<u8> {
        [
            attribute(7, &[1]),
            attribute(IFLA_TUN_NUM_QUEUES, &in_use.to_ne_bytes()),
            attribute(IFLA_TUN_NUM_DISABLED_QUEUES, &disabled.to_ne_bytes()),
        ]
        .concat()
    }

    #[test]
    fn only_taps_with_many_queues_have_a_count() {
        let count = |kind, data: &[u8]| decode_answer(&answer(kind, data, &[])).unwrap();
        assert_eq!(count("tun", &queues(1, 3)), Some(4));
        assert_eq!(count("tun", &queues(u32::MAX, 3)), Some(u32::MAX));
        assert_eq!(count("tun", &attribute(7, &[0])), None);
        assert_eq!(count("vlan", &queues(1, 3)), None);
        let loopback = encode_message(libc::RTM_NEWLINK, &[0; INTERFACE_HEADER_SIZE]);
        assert_eq!(decode_answer(&loopback).unwrap(), None);
    }

    #[test]
    fn errors_of_the_kernel_are_told_apart() {
        let error = |errno: i32| {
            let body = [&(-errno).to_ne_bytes()[..], &[0; 16]].concat();
            decode_answer(&encode_message(libc::NLMSG_ERROR as u16, &body))
        };
        assert_eq!(error(libc::ENODEV).unwrap(), None);
        let refused = error(libc::EPERM).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn the_kernel_is_asked() {
        assert_eq!(attached_queues("lo").unwrap(), None);
        assert_eq!(attached_queues("no-such-link").unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_answer_is_decoded_or_refused(bytes in vec(any::<u8>(), 0..200)) {
            let _ = decode_answer(&bytes);
            let _ = decode_answer(&encode_message(libc::RTM_NEWLINK, &bytes));
            let _ = decode_answer(&encode_message(libc::NLMSG_ERROR as u16, &bytes));
            let _ = decode_answer(&answer("tun", &bytes, &[]));
        }

        #[test]
        fn counts_are_found_among_other_attributes(
            others in vec((any::<u16>(), vec(any::<u8>(), 0..40)), 0..8),
            in_use in 0..256u32,
            disabled in 0..256u32,
        ) {
            let whole = answer("tun", &queues(in_use, disabled), &others);
            prop_assert_eq!(decode_answer(&whole).unwrap(), Some(in_use + disabled));
        }

        #[test]
        fn an_answer_cut_short_is_refused(len in 0..200usize) {
            let whole = answer("tun", &queues(1, 0), &[(3, b"eth0\0".to_vec())]);
            if len < whole.len() {
                prop_assert!(decode_answer(&whole[..len]).is_err());
            }
        }
    }
}
