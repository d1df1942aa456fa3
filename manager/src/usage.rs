//! What a machine that runs has used.

use std::array;
use std::fs;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;
use serde_json::Value;

use crate::error::Error;
use crate::machine::Machine;

/// What a machine has used since its process was started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Usage {
    /// Processor time of the process, its vCPUs included.
    pub cpu_time: Duration,
    /// Memory of the process that is in the host's memory, in bytes, that of the guest included.
    pub resident: u64,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Its disks.
    pub disks: Vec<DiskUsage>,
    /// Its network devices.
    pub networks: Vec<NetworkUsage>,
}

/// What a disk has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskUsage {
    /// The disk.
    pub name: String,
    /// Reads that it has done.
    pub reads: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Writes that it has done.
    pub writes: u64,
    /// Bytes that were written.
    pub write_bytes: u64,
}

/// What a network device has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkUsage {
    /// The device.
    pub name: String,
    /// Packets to the guest.
    pub received_packets: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Packets from the guest.
    pub sent_packets: u64,
    /// Bytes from the guest.
    pub sent_bytes: u64,
}

/// What a machine uses in each second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rates {
    /// Processor time: 100 is all of one processor.
    pub cpu_percent: f64,
    /// Bytes that were read from its disks.
    pub read_bytes_per_second: f64,
    /// Bytes that were written to its disks.
    pub written_bytes_per_second: f64,
    /// Bytes to the guest from networks.
    pub received_bytes_per_second: f64,
    /// Bytes from the guest to networks.
    pub sent_bytes_per_second: f64,
}

impl Usage {
    /// Returns what was used in each second since `earlier`, which was `time` ago. A machine that has been started again
    /// meanwhile has used less than before, which counts as nothing.
    pub fn rates_since(&self, earlier: &Self, time: Duration) -> Rates {
        let seconds = time.as_secs_f64();
        if seconds <= 0.0 {
            return Rates::default();
        }
        let cpu_time = self.cpu_time.saturating_sub(earlier.cpu_time);
        let (now, then) = (self.bytes(), earlier.bytes());
        let [read, written, received, sent] =
            array::from_fn(|index| now[index].saturating_sub(then[index]) as f64 / seconds);
        Rates {
            cpu_percent: cpu_time.as_secs_f64() / seconds * 100.0,
            read_bytes_per_second: read,
            written_bytes_per_second: written,
            received_bytes_per_second: received,
            sent_bytes_per_second: sent,
        }
    }

    /// Returns the bytes that all disks have read and written, and all network devices received and sent.
    fn bytes(&self) -> [u64; 4] {
        let disks = self.disks.iter();
        let networks = self.networks.iter();
        [
            disks.clone().map(|it| it.read_bytes).sum(),
            disks.map(|it| it.write_bytes).sum(),
            networks.clone().map(|it| it.received_bytes).sum(),
            networks.map(|it| it.sent_bytes).sum(),
        ]
    }
}

impl Machine {
    /// Returns what the machine has used.
    ///
    /// # Errors
    /// If it does not run, or its process does not answer.
    pub fn usage(&self) -> Result<Usage, Error> {
        let counters = self.counters()?;
        let mut usage = of_counters(&counters);
        if let Some(process) = self.process() {
            let read = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}"));
            if let Ok(text) = read("stat") {
                usage.cpu_time = cpu_time(&text).unwrap_or_default();
            }
            if let Ok(text) = read("statm") {
                let pages = text.split(' ').nth(1).and_then(|it| it.parse::<u64>().ok());
                usage.resident = pages.unwrap_or_default() * system_value(SysconfVar::PAGE_SIZE);
            }
        }
        Ok(usage)
    }
}

/// Reads the processor time from the text of `/proc/PID/stat` (proc_pid_stat(5)).
fn cpu_time(text: &str) -> Option<Duration> {
    // The name of the program may have spaces and parentheses in it.
    let (_, fields) = text.rsplit_once(") ")?;
    // The first of these is field 3; user and system time are 14 and 15.
    let mut fields = fields.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let ticks = ticks()?.checked_add(ticks()?)?;
    let per_second = system_value(SysconfVar::CLK_TCK).max(1);
    Some(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

fn system_value(variable: SysconfVar) -> u64 {
    let value = sysconf(variable).ok().flatten();
    value.and_then(|value| value.try_into().ok()).unwrap_or(0)
}

fn of_counters(counters: &Value) -> Usage {
    let mut usage = Usage {
        vcpus: counters["vcpus"].as_array().map_or(0, Vec::len),
        ..Usage::default()
    };
    let devices = counters["devices"].as_object();
    for (name, device) in devices.into_iter().flatten() {
        let number = |key: &str| device[key].as_u64().unwrap_or_default();
        if device.get("read_bytes").is_some() {
            usage.disks.push(DiskUsage {
                name: name.clone(),
                reads: number("read_count"),
                read_bytes: number("read_bytes"),
                writes: number("write_count"),
                write_bytes: number("write_bytes"),
            });
        } else if device.get("rx_packets_count").is_some() {
            usage.networks.push(NetworkUsage {
                name: name.clone(),
                received_packets: number("rx_packets_count"),
                received_bytes: number("rx_bytes_count"),
                sent_packets: number("tx_packets_count"),
                sent_bytes: number("tx_bytes_count"),
            });
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0";
        let per_second = system_value(SysconfVar::CLK_TCK);
        let expected = Some(Duration::from_secs_f64(200.0 / per_second as f64));
        for name in ["bantam", "a) S 1 (b", "x y"] {
            assert_eq!(cpu_time(&format!("7 ({name}) {rest}")), expected);
        }
        assert_eq!(cpu_time("7 (bantam) S 1"), None);
    }

    #[test]
    fn devices_are_told_apart_by_their_counters() {
        let usage = of_counters(&json!({
            "vcpus": [{}, {}],
            "devices": {
                "disk0": {"read_count": 1, "read_bytes": 512, "write_count": 2, "write_bytes": 9},
                "net0": {"rx_packets_count": 3, "rx_bytes_count": 4, "tx_packets_count": 5, "tx_bytes_count": 6},
                "rng": {},
            },
        }));
        assert_eq!(usage.vcpus, 2);
        assert_eq!(usage.disks[0].read_bytes, 512);
        assert_eq!(usage.networks[0].sent_bytes, 6);
        assert_eq!((usage.disks.len(), usage.networks.len()), (1, 1));
        assert_eq!(of_counters(&json!(null)), Usage::default());
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,200}") {
            let _ = cpu_time(&text);
        }
    }
}
