// SPDX-License-Identifier: Apache-2.0

//! Commands about the machine as the kernel sees it, and helpers to read the kernel's files.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::console::say;
use crate::error::{Context, Error, Result};
use crate::sys;

/// Returns the text of one of the kernel's small files, without the line end.
pub fn attribute(path: &str) -> Result<String> {
    Ok(fs::read_to_string(path)
        .context(path)?
        .trim_end()
        .to_owned())
}

pub fn number(path: &str) -> Result<u64> {
    let text = attribute(path)?;
    text.parse().context(format_args!("{path}: {text}"))
}

pub fn rate(bytes: u64, time: Duration) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    format!("{:.1}MiB/s", mebibytes / time.as_secs_f64().max(1e-9))
}

/// Returns the names in one of the kernel's folders, in order.
pub fn names(folder: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).context(folder)? {
        let name = entry.context(folder)?.file_name();
        names.extend(name.into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Returns the numbers of the processors that are online.
pub fn online_cpus() -> Result<Vec<u32>> {
    let path = "/sys/devices/system/cpu/online";
    let text = attribute(path)?;
    cpu_list(&text).ok_or_else(|| Error::new(format!("{path}: {text}")))
}

fn cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

pub fn arguments() -> Result<String> {
    let strings = |path: &str| -> Result<Vec<String>> {
        let text = fs::read_to_string(path).context(path)?;
        Ok(text.split_terminator('\0').map(str::to_owned).collect())
    };
    let (arguments, environment) = (strings("/proc/1/cmdline")?, strings("/proc/1/environ")?);
    Ok(format!(
        "arguments={arguments:?} environment={environment:?}"
    ))
}

pub fn cpus() -> Result<String> {
    let online = online_cpus()?;
    let mut packages = BTreeSet::new();
    let mut details = String::new();
    for &cpu in &online {
        let topology =
            |name| attribute(&format!("/sys/devices/system/cpu/cpu{cpu}/topology/{name}"));
        // A uniprocessor kernel has no topology.
        let Ok(package) = topology("physical_package_id") else {
            continue;
        };
        let core = topology("core_id")?;
        let siblings = topology("thread_siblings_list")?;
        details += &format!(" cpu{cpu}=package:{package};core:{core};siblings:{siblings}");
        packages.insert(package);
    }
    Ok(format!(
        "online={} packages={}{details}",
        online.len(),
        packages.len().max(1)
    ))
}

/// Returns the memory that the kernel manages, in KiB.
pub fn memory() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = attribute(path)?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()
        })
        .ok_or_else(|| Error::new(format!("{path}: no MemTotal")))
}

pub fn clocksource() -> Result<String> {
    attribute("/sys/devices/system/clocksource/clocksource0/current_clocksource")
}

pub fn platform_driver(driver: &str) -> Result<String> {
    let mut devices = names(&format!("/sys/bus/platform/drivers/{driver}"))?;
    // The others are the driver's own files; the id of an ACPI device is followed by a number.
    devices.retain(|name| name.contains(':'));
    let devices = match &devices[..] {
        [] => "-".to_owned(),
        devices => devices.join("+"),
    };
    Ok(format!("devices={devices}"))
}

/// Checks that a sleep takes as long as it should by the monotonic clock.
pub fn time() -> Result<String> {
    const ASKED: Duration = Duration::from_millis(200);
    // A busy host may keep the guest from running for a while, but not for this long.
    const LIMIT: Duration = Duration::from_secs(5);

    let started = Instant::now();
    thread::sleep(ASKED);
    let slept = started.elapsed();
    if slept < ASKED || slept > LIMIT {
        return Err(Error::new(format!("a sleep of {ASKED:?} took {slept:?}")));
    }
    let wall = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .context("wall clock")?;
    Ok(format!(
        "slept={}ms wall={}",
        slept.as_millis(),
        wall.as_secs()
    ))
}

/// Prints random numbers again and again, and fails when the time goes back.
pub fn watch(interval: Duration) -> Result<String> {
    // Clocks are compared more often than numbers are printed.
    const COMPARISONS: u32 = 10;
    let mut last = Instant::now();
    loop {
        for _ in 0..COMPARISONS {
            let now = Instant::now();
            if now < last {
                return Err(Error::new(format!(
                    "the time goes from {last:?} to {now:?}"
                )));
            }
            last = now;
            thread::sleep(interval / COMPARISONS);
        }
        let mut bytes = [0; 8];
        sys::random(&mut bytes).context("getrandom")?;
        say(format_args!(
            "bantam: random {:016x}",
            u64::from_le_bytes(bytes)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0"), Some(vec![0]));
        assert_eq!(cpu_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(cpu_list(""), None);
        assert_eq!(cpu_list("0-x"), None);
    }

    #[test]
    fn rates() {
        assert_eq!(rate(3 << 20, Duration::from_secs(2)), "1.5MiB/s");
    }
}
