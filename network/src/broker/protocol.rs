//! What a machine asks of a broker, and what it is answered: a packet of JSON each.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::{HostName, Mac, NetworkError};

/// Most bytes of a packet.
pub(super) const MAX_PACKET_SIZE: usize = 1024;
/// Most queues of a tap.
pub(super) const MAX_QUEUES: u8 = 8;
/// Names by which programs find services of their network, and which no user's machine can have.
const NAMES_OF_SERVICES: [&str; 3] = ["isatap", "localhost", "wpad"];

/// What a machine needs of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Request {
    /// Its MAC address.
    pub(super) mac: Mac,
    /// What it is called on the network.
    pub(super) hostname: Option<HostName>,
    /// Whether it can send under its own addresses only; by default what the network says.
    pub(super) filter: Option<bool>,
    /// How many queues its tap has.
    pub(super) queues: u8,
}

impl Request {
    /// Reads a request of a user, and checks that it is one that a user may make.
    ///
    /// # Errors
    /// If it is not.
    pub(super) fn read(packet: &[u8]) -> Result<Request, NetworkError> {
        let refuse = |reason: String| Err(NetworkError::Request { reason });
        let request: Request = match serde_json::from_slice(packet) {
            Ok(request) => request,
            Err(error) => return refuse(error.to_string()),
        };
        let Mac(mac) = request.mac;
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return refuse(format!("{} is not the address of a machine", request.mac));
        }
        if !(1..=MAX_QUEUES).contains(&request.queues) {
            return refuse(format!("a tap has 1 to {MAX_QUEUES} queues"));
        }
        if request.filter == Some(false) {
            return refuse("only root may lift the filter (filter=off)".to_owned());
        }
        if let Some(name) = &request.hostname
            && NAMES_OF_SERVICES
                .iter()
                .any(|it| it.eq_ignore_ascii_case(name.as_str()))
        {
            return refuse(format!("only root may call a machine '{name}'"));
        }
        Ok(request)
    }
}

/// What a broker answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// The machine has a place. The descriptors of the tap's queues come with the packet, and after them that of the
    /// lock on the place's record.
    Place {
        /// The interface of the host that leads to the machine.
        interface: String,
        /// The address that is reserved for the machine.
        address: Option<Ipv4Addr>,
    },
    /// It has none, for this reason.
    Refused(String),
    /// It has none any more.
    GivenUp,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Request, String> {
        Request::read(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn requests_are_read_back() {
        let request = Request {
            mac: Mac([2, 0, 0, 0, 0, 7]),
            hostname: Some("web".parse().unwrap()),
            filter: Some(true),
            queues: 2,
        };
        let packet = serde_json::to_vec(&request).unwrap();
        assert!(packet.len() < MAX_PACKET_SIZE);
        assert_eq!(Request::read(&packet).unwrap(), request);
    }

    #[test]
    fn users_may_not_ask_for_everything() {
        let with = |mac: &str, rest: &str| read(&format!(r#"{{"mac":"{mac}","queues":1{rest}}}"#));
        with("02:00:00:00:00:07", "").unwrap();
        for (mac, rest, reason) in [
            ("03:00:00:00:00:07", "", "not the address of a machine"),
            ("00:00:00:00:00:00", "", "not the address of a machine"),
            ("02:00:00:00:00", "", "invalid MAC address"),
            (
                "02:00:00:00:00:07",
                r#","filter":false"#,
                "only root may lift",
            ),
            (
                "02:00:00:00:00:07",
                r#","hostname":"WPAD""#,
                "only root may call",
            ),
            (
                "02:00:00:00:00:07",
                r#","hostname":"a/b""#,
                "invalid host name",
            ),
            (
                "02:00:00:00:00:07",
                r#","interface":"eth0""#,
                "unknown field",
            ),
        ] {
            let error = with(mac, rest).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        for queues in ["0", "9", "-1", "256", "\"1\""] {
            let text = format!(r#"{{"mac":"02:00:00:00:00:07","queues":{queues}}}"#);
            read(&text).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn any_packet_is_read_or_refused_in_one_line(packet in proptest::collection::vec(any::<u8>(), 0..MAX_PACKET_SIZE)) {
            if let Err(error) = Request::read(&packet) {
                prop_assert_eq!(error.to_string().lines().count(), 1);
            }
        }

        #[test]
        fn any_fields_are_read_or_refused(
            mac in "[0-9a-f:+]{0,20}",
            hostname in proptest::option::of("[a-zA-Z0-9.-]{0,70}"),
            filter: Option<bool>,
            queues: i64,
        ) {
            let packet = serde_json::json!({ "mac": mac, "hostname": hostname, "filter": filter, "queues": queues });
            if let Ok(request) = Request::read(packet.to_string().as_bytes()) {
                prop_assert!((1..=MAX_QUEUES).contains(&request.queues));
                prop_assert_eq!(request.mac.0[0] & 1, 0);
                prop_assert_ne!(request.filter, Some(false));
                let names = request.hostname.iter().all(|name| name.as_str().len() <= 63);
                prop_assert!(names);
            }
        }
    }
}
