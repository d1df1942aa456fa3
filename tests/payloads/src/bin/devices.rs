//! Uses every virtio device on the command line, as a driver should.
//!
//! Arguments: `expect-devices=ID,ID,...`, the device ids in the command line's order;
//! `block-test=write` writes to every block device that is not read-only, destroying what it has;
//! `net-arp=OWN,TARGET` asks the network for the hardware address of TARGET (IPv4 addresses);
//! `net-link=N` then waits N times for the loss of the link, and asks again when there is another;
//! `net-echo=N` sends N frames back to their sender, and `offloads` negotiates checksum and
//! segmentation offload for that; `rounds=N` does all of it N times (1).

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use runtime::random::Random;
use runtime::time::{self, Deadline};
use runtime::virtio::block::{
    Block, RequestHeader, RequestType, SECTOR_SIZE, STATUS_IO_ERROR, STATUS_UNSUPPORTED,
    SectorRange, block_feature,
};
use runtime::virtio::console::{Channels, Console, console_feature};
use runtime::virtio::net::{Header, Net, OFFLOADS, net_feature};
use runtime::virtio::rng::Rng;
use runtime::virtio::vsock::Vsock;
use runtime::virtio::{Buffer, Completion, Error, MmioDevice, Transport, device_id, wait_for_used};
use runtime::{arguments, heap, interrupts, payload, println, report};

const FIRST_DEVICE_VECTOR: u8 = 0x50;
const QUEUE_SIZE: u16 = 16;
const INTERRUPT_ROUNDS: u64 = 10;

payload!(check_devices);

fn check_devices() {
    for _ in 1..arguments::parsed("rounds").unwrap_or(1) {
        // SAFETY: the round keeps nothing, and resets the devices.
        unsafe { heap::freeing(check_and_reset) };
    }
    // The devices are in use afterwards.
    check_each();
}

fn check_and_reset() {
    check_each();
    for device in arguments::virtio_mmio_windows().filter_map(|it| MmioDevice::probe(it).ok()) {
        if let Err(reason) = device.reset() {
            report::fail("a device resets", reason);
        }
    }
}

fn check_each() {
    let mut ids = Vec::new();
    for (number, window) in arguments::virtio_mmio_windows().enumerate() {
        let name = format!("device {number} at {:#x}", window.address);
        let device = match MmioDevice::probe(window) {
            Ok(device) => device,
            Err(reason) => {
                report::fail(name, reason);
                continue;
            }
        };
        let id = device.device_id();
        ids.push(id);
        println!("{name}: id {id}, GSI {}", window.gsi);
        let vector = FIRST_DEVICE_VECTOR + number as u8;
        match id {
            device_id::RNG => check_rng(device, vector),
            device_id::BLOCK => check_block(device, vector),
            device_id::NET => check_net(device, vector),
            device_id::VSOCK => check_vsock(device),
            device_id::CONSOLE => check_console(device),
            _ => report::check(format!("{name} resets"), device.reset()),
        }
    }
    if let Some(expected) = arguments::value("expect-devices") {
        let found = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let result = if found == expected {
            Ok(())
        } else {
            Err(format!("found {found}"))
        };
        report::check(format!("the devices are {expected}"), result);
    }
}

/// The payload `vsock` does the rest.
fn check_vsock(device: MmioDevice) {
    let result = Vsock::open(device, QUEUE_SIZE).and_then(|mut vsock| {
        println!("vsock: cid {}", vsock.cid);
        vsock.is_refused(1)
    });
    report::check("vsock answers", result);
}

/// The payload `console` does the rest.
fn check_console(device: MmioDevice) {
    if device.offered_features() & console_feature::MULTIPORT == 0 {
        let result = Console::open(device, QUEUE_SIZE)
            .and_then(|mut console| console.port.send(&device, b"console\n"));
        return report::check("console takes output", result);
    }
    let result = Channels::open(device, QUEUE_SIZE).and_then(|mut channels| {
        println!("channels: {}", channels.open_all()?.join(" "));
        channels.ports[1].send(&device, b"channel\n")
    });
    report::check("channels are announced", result);
}

/// Routes the device's interrupt to `vector`, with nothing pending from before.
fn route(device: &MmioDevice, vector: u8) {
    device.acknowledge_interrupt();
    interrupts::route(device.window().gsi, vector);
}

/// Executes `request` several times, and checks that each causes an interrupt.
fn check_interrupts(
    device: &MmioDevice,
    vector: u8,
    mut request: impl FnMut(Completion) -> Result<(), Error>,
) -> Result<(), String> {
    route(device, vector);
    let result = (0..INTERRUPT_ROUNDS).try_for_each(|round| {
        let before = interrupts::count(vector);
        request(Completion::InterruptOf { vector, before }).map_err(|error| {
            let interrupts = interrupts::count(vector) - before;
            format!("request {round}, {interrupts} interrupts: {error}")
        })
    });
    interrupts::mask(device.window().gsi);
    result
}

// --- Entropy --------------------------------------------------------------------------------------

fn check_rng(device: MmioDevice, vector: u8) {
    let mut rng = match Rng::open(device, QUEUE_SIZE) {
        Ok(rng) => rng,
        Err(reason) => return report::fail("rng initialises", reason),
    };
    report::check("rng gives random bytes", random_bytes(&mut rng));
    let by_interrupt = check_interrupts(&device, vector, |completion| {
        rng.read(&mut [0; 8], completion).map(drop)
    });
    report::check("rng interrupts", by_interrupt);
}

fn random_bytes(rng: &mut Rng) -> Result<(), String> {
    let mut ones = 0;
    let mut total = 0;
    let mut previous = [0; 64];
    for _ in 0..64 {
        let mut bytes = [0; 64];
        let filled = rng
            .read(&mut bytes, Completion::Polled)
            .map_err(|error| error.to_string())?;
        if filled == 0 {
            return Err(String::from("a request got no bytes"));
        }
        if bytes == previous {
            return Err(String::from("two requests got the same bytes"));
        }
        previous = bytes;
        ones += bytes[..filled]
            .iter()
            .map(|byte| byte.count_ones())
            .sum::<u32>();
        total += 8 * filled as u32;
    }
    // The standard deviation of 32768 fair bits is 90.
    if ones.abs_diff(total / 2) > total / 20 {
        return Err(format!("{ones} of {total} bits are set"));
    }
    Ok(())
}

// --- Block ----------------------------------------------------------------------------------------

fn check_block(device: MmioDevice, vector: u8) {
    let mut block = match Block::open(device, QUEUE_SIZE) {
        Ok(block) => block,
        Err(reason) => return report::fail("block initialises", reason),
    };
    let capacity = block.capacity();
    println!("block: {capacity} sectors, features {:#x}", block.features);
    if capacity == 0 {
        return report::fail("block capacity", "it is zero");
    }
    report::check(
        "block reads its first and last sector",
        first_and_last(&mut block),
    );
    report::check("block refuses what is outside it", outside(&mut block));
    report::check(
        "block refuses unknown requests",
        unknown_request(&mut block),
    );
    match block.read_id(Completion::Polled) {
        Ok(id) => {
            let end = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
            println!("block: id '{}'", id[..end].escape_ascii());
            report::ok("block has an id");
        }
        Err(reason) => report::fail("block has an id", reason),
    }
    let by_interrupt = check_interrupts(&device, vector, |completion| {
        block.read(0, &mut [0; SECTOR_SIZE], completion)
    });
    report::check("block interrupts", by_interrupt);
    if block.features & block_feature::READ_ONLY != 0 {
        let refused = match block.write(0, &[0; SECTOR_SIZE], Completion::Polled) {
            Err(Error::Status(STATUS_IO_ERROR)) => Ok(()),
            other => Err(format!("{other:?}")),
        };
        report::check("block is read-only and refuses a write", refused);
    } else if arguments::value("block-test") == Some("write") {
        check_block_writes(&mut block);
    }
}

fn first_and_last(block: &mut Block) -> Result<(), Error> {
    let mut sector = [0; SECTOR_SIZE];
    block.read(0, &mut sector, Completion::Polled)?;
    block.read(block.capacity() - 1, &mut sector, Completion::Polled)
}

fn outside(block: &mut Block) -> Result<(), String> {
    let capacity = block.capacity();
    let mut sectors = vec![0; 2 * SECTOR_SIZE];
    for sector in [
        capacity - 1,
        capacity,
        u64::MAX,
        u64::MAX / SECTOR_SIZE as u64,
    ] {
        match block.read(sector, &mut sectors, Completion::Polled) {
            Err(Error::Status(STATUS_IO_ERROR)) => {}
            other => return Err(format!("two sectors from {sector}: {other:?}")),
        }
    }
    match block.read(0, &mut sectors[..100], Completion::Polled) {
        Err(Error::Status(_)) => Ok(()),
        other => Err(format!("a read of 100 bytes: {other:?}")),
    }
}

fn unknown_request(block: &mut Block) -> Result<(), String> {
    let mut bytes = [0; SECTOR_SIZE];
    let header = RequestHeader {
        kind: 0x1234,
        ..RequestHeader::default()
    };
    let result = block
        .submit_header(header, Some(Buffer::writable(&mut bytes)))
        .map(|_| block.kick())
        .and_then(|_| wait_for_used(&block.device, &mut block.queue, Completion::Polled))
        .map(|used| block.status_of(used));
    match result {
        Ok(STATUS_UNSUPPORTED) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// Returns the content of a sector that `check_block_writes` has written in `generation`.
fn pattern(sector: u64, generation: u64) -> [u8; SECTOR_SIZE] {
    let mut bytes = [0; SECTOR_SIZE];
    Random::new(sector << 16 | generation).fill(&mut bytes);
    bytes
}

fn check_block_writes(block: &mut Block) {
    let area = block.capacity().min(2048);
    report::check("block keeps what is written", random_writes(block, area));
    report::check(
        "block does many requests at a time",
        many_at_a_time(block, area),
    );
    if block.features & block_feature::FLUSH != 0 {
        report::check("block flushes", block.flush(Completion::Polled));
    }
    if block.features & block_feature::WRITE_ZEROES != 0 {
        report::check("block writes zeroes", zeroes(block, area));
    }
    if block.features & block_feature::DISCARD != 0 {
        let range = SectorRange {
            sector: 0,
            count: area as u32,
            flags: 0,
        };
        let discarded = block.clear(RequestType::Discard, range, Completion::Polled);
        report::check("block discards", discarded);
    }
}

/// Writes all of the area, then parts of it again, then reads all of it.
fn random_writes(block: &mut Block, area: u64) -> Result<(), String> {
    let mut random = Random::new(area);
    let mut generations = vec![0_u64; area as usize];
    for generation in 0..64 {
        let (start, count) = if generation == 0 {
            (0, area)
        } else {
            let start = random.below(area);
            (start, 1 + random.below((area - start).min(128)))
        };
        let mut bytes = Vec::with_capacity(count as usize * SECTOR_SIZE);
        for sector in start..start + count {
            generations[sector as usize] = generation;
            bytes.extend_from_slice(&pattern(sector, generation));
        }
        block
            .write(start, &bytes, Completion::Polled)
            .map_err(|error| format!("{count} sectors from {start}: {error}"))?;
    }
    let mut bytes = vec![0; area as usize * SECTOR_SIZE];
    block
        .read(0, &mut bytes, Completion::Polled)
        .map_err(|error| error.to_string())?;
    for (sector, found) in bytes.chunks(SECTOR_SIZE).enumerate() {
        if found != pattern(sector as u64, generations[sector]) {
            return Err(format!(
                "sector {sector} does not have what was written last"
            ));
        }
    }
    Ok(())
}

/// Keeps the queue full of reads in random order; each must bring the sector it asked for.
fn many_at_a_time(block: &mut Block, area: u64) -> Result<(), String> {
    const REQUESTS: usize = 256;
    for sector in 0..area {
        if sector % 64 == 0 {
            let count = (area - sector).min(64);
            let mut bytes = Vec::with_capacity(count as usize * SECTOR_SIZE);
            (sector..sector + count)
                .for_each(|sector| bytes.extend_from_slice(&pattern(sector, 1)));
            block
                .write(sector, &bytes, Completion::Polled)
                .map_err(|error| format!("{count} sectors from {sector}: {error}"))?;
        }
    }
    let depth = usize::from(block.queue.size());
    let mut buffers = vec![[0_u8; SECTOR_SIZE]; depth];
    let mut sectors = vec![0; depth];
    let mut random = Random::new(7);
    let (mut submitted, mut completed) = (0, 0);
    let deadline = Deadline::after(Duration::from_secs(10));
    while completed < REQUESTS {
        while submitted < REQUESTS {
            let Some(head) = block.queue.next_head(3) else {
                break;
            };
            let sector = random.below(area);
            let buffer = &mut buffers[usize::from(head)];
            sectors[usize::from(head)] = sector;
            block
                .submit(RequestType::Read, sector, Some(Buffer::writable(buffer)))
                .map_err(|error| error.to_string())?;
            submitted += 1;
        }
        block.kick();
        while let Some(done) = block.complete().map_err(|error| error.to_string())? {
            let head = done.head;
            let sector = sectors[usize::from(head)];
            done.result
                .map_err(|error| format!("sector {sector}: {error}"))?;
            if buffers[usize::from(head)] != pattern(sector, 1) {
                return Err(format!("a read of sector {sector} brought another"));
            }
            completed += 1;
        }
        if deadline.passed() {
            return Err(format!(
                "{completed} of {REQUESTS} requests were done in time"
            ));
        }
    }
    Ok(())
}

fn zeroes(block: &mut Block, area: u64) -> Result<(), String> {
    let (start, count) = (area / 4, area / 2);
    let range = SectorRange {
        sector: start,
        count: count as u32,
        flags: 0,
    };
    block
        .clear(RequestType::WriteZeroes, range, Completion::Polled)
        .map_err(|error| error.to_string())?;
    let mut bytes = vec![0xff; area as usize * SECTOR_SIZE];
    block
        .read(0, &mut bytes, Completion::Polled)
        .map_err(|error| error.to_string())?;
    for (sector, found) in (0..).zip(bytes.chunks(SECTOR_SIZE)) {
        let zero = found.iter().all(|&byte| byte == 0);
        if zero != (start..start + count).contains(&sector) {
            return Err(format!("sector {sector}: zero is {zero}"));
        }
    }
    Ok(())
}

// --- Network --------------------------------------------------------------------------------------

fn check_net(device: MmioDevice, vector: u8) {
    let wanted = if arguments::flag("offloads") {
        OFFLOADS
    } else {
        0
    };
    let mut net = match Net::open(device, QUEUE_SIZE, wanted) {
        Ok(net) => net,
        Err(reason) => return report::fail("net initialises", reason),
    };
    println!(
        "net: address {:02x?}, features {:#x}",
        net.mac(),
        net.features
    );
    report::check("net has an address", has_address(&net));
    let broadcast = arp_request(net.mac(), [0; 4], [0; 4]);
    report::check(
        "net sends",
        (0..64).try_for_each(|_| net.send(Header::default(), &broadcast, Completion::Polled)),
    );
    let by_interrupt = check_interrupts(&device, vector, |completion| {
        net.send(Header::default(), &broadcast, completion)
    });
    report::check("net interrupts", by_interrupt);
    if let Some(addresses) = arguments::value("net-arp") {
        report::check(
            format!("net resolves {addresses}"),
            resolve(&mut net, addresses),
        );
        let rounds = arguments::parsed::<usize>("net-link").unwrap_or(0);
        let names = ["the first time", "the second time"];
        for round in names.into_iter().take(rounds) {
            println!("net: waits for a loss of its link {round}");
            let lost = wait_for_link(&net, false);
            // What is sent meanwhile goes nowhere.
            let lost = lost.and_then(|()| {
                net.send(Header::default(), &broadcast, Completion::Polled)
                    .map_err(|error| error.to_string())
            });
            report::check(format!("net loses its link {round}"), lost);
            let found = wait_for_link(&net, true).and_then(|()| resolve(&mut net, addresses));
            report::check(format!("net resolves with a new link {round}"), found);
        }
    }
    if let Some(count) = arguments::parsed::<u32>("net-echo") {
        report::check(
            format!("net echoes {count} frames"),
            echo(&mut net, vector, count),
        );
    }
}

fn has_address(net: &Net) -> Result<(), String> {
    if net.features & net_feature::MAC == 0 {
        return Err(String::from("MAC is not offered"));
    }
    match net.mac() {
        [0, 0, 0, 0, 0, 0] => Err(String::from("it is zero")),
        [first, ..] if first & 1 != 0 => Err(String::from("it is a group's")),
        _ => Ok(()),
    }
}

/// An ARP request (RFC 826) for the hardware address of `target`, in an Ethernet frame of the
/// least size.
fn arp_request(mac: [u8; 6], own: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&mac);
    // EtherType ARP; Ethernet and IPv4 addresses of 6 and 4 bytes; operation 1, request.
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&own);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&target);
    frame.resize(60, 0);
    frame
}

fn parse_ipv4(text: &str) -> Option<[u8; 4]> {
    let bytes: Vec<u8> = text
        .split('.')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    bytes.try_into().ok()
}

fn wait_for_link(net: &Net, is_up: bool) -> Result<(), String> {
    let deadline = Deadline::after(Duration::from_secs(20));
    while net.has_link() != is_up {
        if deadline.passed() {
            return Err(String::from("its link stays as it is"));
        }
    }
    Ok(())
}

fn resolve(net: &mut Net, addresses: &str) -> Result<(), String> {
    let parsed = addresses
        .split_once(',')
        .and_then(|(own, target)| Some((parse_ipv4(own)?, parse_ipv4(target)?)));
    let Some((own, target)) = parsed else {
        return Err(String::from("these are not two IPv4 addresses"));
    };
    let request = arp_request(net.mac(), own, target);
    net.send(Header::default(), &request, Completion::Polled)
        .map_err(|error| error.to_string())?;
    let deadline = Deadline::after(Duration::from_secs(3));
    while !deadline.passed() {
        let answer = net.receive(Completion::Polled, |_, frame| {
            let is_answer = frame.len() >= 42
                && frame[12..14] == [8, 6]
                && frame[20..22] == [0, 2]
                && frame[28..32] == target;
            is_answer.then(|| frame[22..28].to_vec())
        });
        if let Some(mac) = answer.map_err(|error| error.to_string())? {
            println!("net: {target:?} is at {mac:02x?}");
            return Ok(());
        }
    }
    Err(String::from("other frames came, but no answer"))
}

fn echo(net: &mut Net, vector: u8, count: u32) -> Result<(), String> {
    route(&net.device, vector);
    println!("net: ready to echo");
    let mut bytes = 0;
    let mut start = 0;
    for frame_number in 0..count {
        let (mut header, mut frame) = net
            .receive(Completion::Interrupt, |header, frame| {
                (header, frame.to_vec())
            })
            .map_err(|error| format!("frame {frame_number}: {error}"))?;
        if frame.len() < 14 {
            return Err(format!("frame {frame_number} has {} bytes", frame.len()));
        }
        if frame_number == 0 {
            start = time::ticks();
        }
        let (to, from) = frame.split_at_mut(6);
        to.swap_with_slice(&mut from[..6]);
        header.buffer_count = 0;
        // The flag for a verified checksum is only for the receiver.
        header.flags &= 1;
        net.send(header, &frame, Completion::Polled)
            .map_err(|error| format!("frame {frame_number}, sent back: {error}"))?;
        bytes += frame.len();
    }
    let elapsed = time::duration(start, time::ticks());
    println!(
        "net: {count} frames, {bytes} bytes in {} us",
        elapsed.as_micros()
    );
    Ok(())
}
