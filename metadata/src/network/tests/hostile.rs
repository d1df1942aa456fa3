//! A hostile guest: it sends garbage, and segments close to what its connections expect.

use proptest::prelude::*;

use super::*;

/// What a hostile guest sends.
#[derive(Debug, Clone)]
enum Sent {
    Garbage(Vec<u8>),
    Mutated { position: usize, value: u8 },
    Segment(Segment),
    Request,
    Pass(u16),
}

/// A segment close to what an existing connection expects.
#[derive(Debug, Clone)]
struct Segment {
    port: u16,
    control: u8,
    sequence: i32,
    acknowledgement: Option<i32>,
    window: u16,
    scale: Option<u8>,
    segment_size: Option<u16>,
    sack: bool,
    payload: Vec<u8>,
}

fn near_zero() -> impl Strategy<Value = i32> {
    prop_oneof![
        4 => -3..4_i32,
        2 => -9000..9000_i32,
        1 => any::<i32>(),
        1 => Just(i32::MIN),
    ]
}

fn any_segment() -> impl Strategy<Value = Segment> {
    (
        3000..3003_u16,
        0..5_u8,
        near_zero(),
        prop::option::weighted(0.9, near_zero()),
        prop_oneof![Just(0), 0..100_u16, any::<u16>()],
        prop::option::of(any::<u8>()),
        prop::option::of(prop_oneof![0..3_u16, any::<u16>()]),
        any::<bool>(),
        prop_oneof![
            Just(Vec::new()),
            Just(b"GET /a HTTP/1.1\r\n\r\n".to_vec()),
            prop::collection::vec(any::<u8>(), 0..5000),
        ],
    )
        .prop_map(
            |(port, control, sequence, acknowledgement, window, scale, size, sack, payload)| {
                Segment {
                    port,
                    control,
                    sequence,
                    acknowledgement,
                    window,
                    scale,
                    segment_size: size,
                    sack,
                    payload,
                }
            },
        )
}

fn any_sent() -> impl Strategy<Value = Sent> {
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Sent::Garbage),
        1 => (0..60_usize, any::<u8>())
            .prop_map(|(position, value)| Sent::Mutated { position, value }),
        8 => any_segment().prop_map(Sent::Segment),
        1 => Just(Sent::Request),
        1 => (0..20_000_u16).prop_map(Sent::Pass),
    ]
}

/// What the guest knows of a connection from the last frame of the service.
#[derive(Default, Clone, Copy)]
struct Expected {
    sequence: i32,
    acknowledgement: i32,
}

fn disturb(sent: &[Sent]) {
    let mut world = World::new(MetadataVersion::V1, json!({"a": "x".repeat(20_000)}));
    world.network.accept(&mut arp(2, SERVICE), world.now);
    let mut expected = [Expected::default(); 3];
    for sent in sent {
        let mut frame = match sent {
            Sent::Garbage(bytes) => bytes.clone(),
            Sent::Mutated { position, value } => {
                let mut frame = segment(&SYN, b"x");
                if let Some(byte) = frame.get_mut(*position) {
                    *byte = *value;
                }
                frame
            }
            Sent::Segment(sent) => {
                let expected = expected[usize::from(sent.port - 3000)];
                let tcp = TcpRepr {
                    src_port: sent.port,
                    control: [
                        TcpControl::None,
                        TcpControl::Psh,
                        TcpControl::Syn,
                        TcpControl::Fin,
                        TcpControl::Rst,
                    ][usize::from(sent.control)],
                    seq_number: TcpSeqNumber(expected.sequence.wrapping_add(sent.sequence)),
                    ack_number: sent
                        .acknowledgement
                        .map(|number| TcpSeqNumber(expected.acknowledgement.wrapping_add(number))),
                    window_len: sent.window,
                    window_scale: sent.scale,
                    max_seg_size: sent.segment_size,
                    sack_permitted: sent.sack,
                    payload: &sent.payload,
                    ..SYN
                };
                segment(&tcp, &[])
            }
            Sent::Request => {
                // Three variants; at least one has the expected numbers.
                let expected = expected[0];
                let tcp = TcpRepr {
                    control: TcpControl::Psh,
                    seq_number: TcpSeqNumber(expected.sequence),
                    ack_number: Some(TcpSeqNumber(expected.acknowledgement)),
                    window_len: 60_000,
                    payload: b"GET /a HTTP/1.1\r\n\r\n",
                    ..SYN
                };
                segment(&tcp, &[])
            }
            Sent::Pass(milliseconds) => {
                world.now += Duration::from_millis(u64::from(*milliseconds));
                Vec::new()
            }
        };
        world.network.accept(&mut frame, world.now);
        world.network.poll(world.now);
        assert!(world.network.to_guest.len() <= MAX_WAITING_FRAMES);
        while let Some(frame) = world.network.next_frame() {
            learn(&mut expected, frame);
            world.network.take_frame(true);
        }
        world.network.poll(world.now);
        let wait = world.network.wait_time(world.now);
        assert!(wait.is_none_or(|wait| wait >= TIMER_RESOLUTION));
    }
    // It still serves requests.
    world.pass(TIME_LIMIT);
    // A stack that asks for an address that nobody has waits for a second before it asks for
    // another.
    world.pass(Duration::from_secs(2));
    assert_eq!(body(&world.ask("GET /a HTTP/1.1\n\n")).len(), 20_000);
}

fn learn(expected: &mut [Expected; 3], frame: &[u8]) {
    let Ok(frame) = EthernetFrame::new_checked(frame) else {
        return;
    };
    let Ok(packet) = Ipv4Packet::new_checked(frame.payload()) else {
        return;
    };
    let Ok(tcp) = TcpPacket::new_checked(packet.payload()) else {
        return;
    };
    if let Some(place) = expected.get_mut(usize::from(tcp.dst_port().wrapping_sub(3000))) {
        let end = tcp.seq_number() + tcp.segment_len();
        *place = Expected {
            sequence: tcp.ack_number().0,
            acknowledgement: end.0,
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn no_frames_break_the_service(sent in prop::collection::vec(any_sent(), 0..60)) {
        disturb(&sent);
    }
}

/// How many inputs to try.
fn cases() -> u32 {
    let wanted = std::env::var("PROPTEST_CASES").ok();
    wanted.and_then(|cases| cases.parse().ok()).unwrap_or(256)
}
