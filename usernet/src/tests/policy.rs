//! What rules let the guest reach.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;

use smoltcp::wire::IpAddress;

use super::guest::{Guest, MAC, MTU, udp_socket};
use super::namespace::{in_namespace, ip};
use super::{DNS, GATEWAY};
use crate::dns::tests::answer;
use crate::{Protocol, Rule, UserNetwork, UserNetworkOptions};

const FIRST: IpAddress = IpAddress::v4(192, 0, 2, 7);
const SECOND: IpAddress = IpAddress::v4(192, 0, 2, 8);

fn rules(texts: &[&str]) -> Vec<Rule> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// Listens on two ports of two addresses, which `lo` gets.
fn serve() -> Vec<TcpListener> {
    let mut listeners = Vec::new();
    for address in ["192.0.2.7", "192.0.2.8"] {
        ip(&["address", "add", &format!("{address}/32"), "dev", "lo"]);
        for port in [80, 81] {
            listeners.push(TcpListener::bind((address, port)).unwrap());
        }
    }
    listeners
}

#[test]
fn rules_decide_what_is_reached_and_refusals_are_reported() {
    in_namespace(|| {
        let _listeners = serve();
        let options = UserNetworkOptions {
            allow: rules(&["192.0.2.0/24:80", "10.0.2.2:82"]),
            deny: rules(&["192.0.2.8"]),
            host_loopback: true,
            ..UserNetworkOptions::default()
        };
        let _local = [82, 83].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
        let mut guest = Guest::new(&options);
        let refused = Arc::new(Mutex::new(Vec::new()));
        let seen = refused.clone();
        let network = &mut guest.cable.network;
        network.observe_refusals(move |refusal| seen.lock().unwrap().push(*refusal));
        let mut own_port = 40000;
        for (address, port, expected) in [
            (FIRST, 80, true),
            (FIRST, 81, false),
            (SECOND, 80, false),
            (GATEWAY, 82, true),
            (GATEWAY, 83, false),
        ] {
            own_port += 1;
            let handle = guest.connect(address, port, own_port);
            assert_eq!(guest.is_connected(handle), expected, "{address}:{port}");
        }
        let handle = guest.add(udp_socket(5000));
        guest.udp(handle).send_slice(b"?", (FIRST, 53)).unwrap();
        guest.poll();
        let refused: Vec<_> = refused
            .lock()
            .unwrap()
            .iter()
            .map(|refusal| (refusal.protocol, refusal.destination.to_string()))
            .collect();
        let expected = [
            (Protocol::Tcp, "192.0.2.7:81"),
            (Protocol::Tcp, "192.0.2.8:80"),
            (Protocol::Tcp, "10.0.2.2:83"),
            (Protocol::Udp, "192.0.2.7:53"),
        ];
        assert_eq!(
            refused,
            expected.map(|(protocol, text)| (Some(protocol), text.to_owned()))
        );
    });
}

#[test]
fn a_name_opens_the_addresses_that_its_answers_have() {
    in_namespace(|| {
        let _listeners = serve();
        let by_udp = UdpSocket::bind("127.0.0.1:53").unwrap();
        let by_tcp = TcpListener::bind("127.0.0.1:53").unwrap();
        thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((_, peer)) = by_udp.recv_from(&mut query) {
                let records = [("a.example.org", 60, "192.0.2.7")];
                by_udp
                    .send_to(&answer("a.example.org", &records), peer)
                    .unwrap();
            }
        });
        thread::spawn(move || {
            let (mut stream, _) = by_tcp.accept().unwrap();
            let message = answer("b.example.org", &[("b.example.org", 60, "192.0.2.8")]);
            let size = (message.len() as u16).to_be_bytes();
            // In pieces, which may come one by one.
            for part in [&size[..1], &size[1..], &message[..20], &message[20..]] {
                stream.write_all(part).unwrap();
            }
            thread::sleep(std::time::Duration::from_secs(5));
        });
        for leave_checksums in [false, true] {
            let options = UserNetworkOptions {
                allow: rules(&["*.example.org:80"]),
                dns: vec![Ipv4Addr::LOCALHOST.into()],
                ..UserNetworkOptions::default()
            };
            let network = UserNetwork::open(&options, MAC, MTU).unwrap();
            let mut guest = Guest::bare(network);
            guest.configure();
            guest.cable.network.leave_checksums(leave_checksums);
            let reaches = |guest: &mut Guest, address, port, own_port| {
                let handle = guest.connect(address, port, own_port);
                guest.is_connected(handle)
            };
            assert!(!reaches(&mut guest, FIRST, 80, 40000));
            let handle = guest.add(udp_socket(5000));
            guest.udp(handle).send_slice(b"?", (DNS, 53)).unwrap();
            guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
            assert!(reaches(&mut guest, FIRST, 80, 40001));
            assert!(!reaches(&mut guest, FIRST, 81, 40002));
            assert!(!reaches(&mut guest, SECOND, 80, 40003));
            if leave_checksums {
                let handle = guest.connect(DNS, 53, 40004);
                let size = answer("b.example.org", &[("b.example.org", 60, "192.0.2.8")]).len();
                guest.wait(|guest| (guest.tcp(handle).recv_queue() == size + 2).then_some(()));
                assert!(reaches(&mut guest, SECOND, 80, 40005));
            }
        }
    });
}

#[test]
fn too_many_rules_are_refused() {
    let rule: Rule = "192.0.2.1".parse().unwrap();
    let options = UserNetworkOptions {
        deny: vec![rule; 2000],
        ..UserNetworkOptions::default()
    };
    let Err(error) = UserNetwork::open(&options, MAC, MTU) else {
        panic!("these are too many");
    };
    assert!(error.to_string().contains("2000 rules"), "{error}");
}
