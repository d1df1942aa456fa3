//! Machines that run the payload `count`, which counts in memory, in registers, by accesses to a device and by interrupts.

use std::env;
use std::fs::File;
use std::io::{ErrorKind, PipeReader, Read};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use bantam_vmm::config::{MachineConfig, VcpuCount};
use bantam_vmm::{Console, Controller, GuestMemory};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::{Bytes, GuestAddress};

use crate::payload;

const PATIENCE: Duration = Duration::from_secs(20);

/// The payload's state of one of its processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processor {
    /// How often it has counted.
    pub count: u64,
    /// How often a register or memory had the wrong content.
    pub faults: u64,
    /// How often it has accessed the device.
    pub accesses: u64,
    /// How many interrupts it has taken.
    pub interrupts: u64,
}

impl Processor {
    /// Returns whether it has counted, accessed the device and been interrupted since `before`.
    pub fn has_gone_on_since(&self, before: &Processor) -> bool {
        self.count > before.count
            && self.accesses > before.accesses
            && self.interrupts > before.interrupts
    }

    /// Returns whether nothing of it is from before `before`.
    pub fn is_at_or_after(&self, before: &Processor) -> bool {
        self.count >= before.count
            && self.accesses >= before.accesses
            && self.interrupts >= before.interrupts
    }
}

/// Words of the payload's counters.
const WORDS_OF_A_PROCESSOR: u64 = 4;
/// Word by which the second processor is told to start.
pub const START_SECOND: u64 = 4 * WORDS_OF_A_PROCESSOR;
/// Word by which the guest is told to end.
pub const STOP: u64 = START_SECOND + 1;

/// Address of the counters.
#[derive(Clone, Copy)]
pub struct Counters(u64);

impl Counters {
    fn word(self, memory: &GuestMemory, word: u64) -> u64 {
        let address = GuestAddress(self.0 + word * 8);
        memory
            .read_obj(address)
            .expect("the counters are in memory")
    }

    /// Sets `word` to one.
    pub fn set(self, memory: &GuestMemory, word: u64) {
        let address = GuestAddress(self.0 + word * 8);
        memory
            .write_obj(1_u64, address)
            .expect("the counters are in memory");
    }

    /// Returns the counters of `count` processors.
    pub fn processors(self, memory: &GuestMemory, count: u64) -> Vec<Processor> {
        (0..count)
            .map(|index| self.processor(memory, index))
            .collect()
    }

    fn processor(self, memory: &GuestMemory, index: u64) -> Processor {
        let word = |word| self.word(memory, index * WORDS_OF_A_PROCESSOR + word);
        Processor {
            count: word(0),
            faults: word(1),
            accesses: word(2),
            interrupts: word(3),
        }
    }
}

/// Describes a machine with `cpus` processors that counts, with more words on its command line.
pub fn config(cpus: u8, append: &str) -> MachineConfig {
    let mut config = MachineConfig::new(payload("count"));
    config.memory = "16M".parse().expect("this is a size");
    config.cpus = VcpuCount::try_from(i64::from(cpus)).expect("a machine can have them");
    config.append = Some(format!("{append} finish=poweroff"));
    config
}

/// Returns a machine that is configured, and what its guest prints.
pub fn configured(config: &MachineConfig) -> (Controller, PipeReader) {
    let (reader, writer) = std::io::pipe().expect("there are pipes");
    for end in [reader.as_fd(), writer.as_fd()] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("pipes can be non-blocking");
    }
    let console = Console {
        input: None,
        output: Some(writer.into()),
    };
    let machine = crate::configured(config.clone(), console);
    (machine, reader)
}

/// Appends the available output to `text`.
pub fn read_on(reader: &mut PipeReader, text: &mut String) {
    let mut bytes = [0; 4096];
    loop {
        match reader.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => text.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits until `done`, and fails if that takes too long.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A machine that counts, and the address of its counters.
pub fn counting(config: &MachineConfig) -> (Controller, PipeReader, Counters) {
    let (machine, mut reader) = configured(config);
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    let mut text = String::new();
    let mut address = None;
    wait_until("the guest counts", || {
        read_on(&mut reader, &mut text);
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("counting at 0x"));
        address = line
            .filter(|_| text.ends_with('\n'))
            .and_then(|address| u64::from_str_radix(address.trim(), 16).ok());
        address.is_some()
    });
    (machine, reader, Counters(address.expect("it was found")))
}

/// Returns how often tests let a machine go on from its state: `BANTAM_SNAPSHOT_ROUNDS`, or 30 times.
///
/// # Panics
/// If the variable is not a number.
pub fn rounds() -> usize {
    let rounds = env::var("BANTAM_SNAPSHOT_ROUNDS").ok();
    rounds.map_or(30, |rounds| rounds.parse().expect("it is a number"))
}

/// Returns a few milliseconds, different each time.
pub fn random_time() -> Duration {
    let mut byte = [0; 2];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut byte))
        .expect("there are random bytes");
    Duration::from_micros(u64::from(u16::from_le_bytes(byte)) / 4)
}

/// Waits until all processors that were as in `before` have counted, accessed a device and been interrupted.
pub fn wait_until_gone_on(counters: Counters, memory: &GuestMemory, before: &[Processor]) {
    for (index, before) in (0..).zip(before) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = counters.processor(memory, index);
            assert_eq!(now.faults, 0, "processor {index}");
            if now.has_gone_on_since(before) {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "processor {index} stands still: {before:?}, {now:?}"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}
