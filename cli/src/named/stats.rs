//! `bantam domstats`.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use bantam_manager::{Machine, Manager, Rates, Usage};
use serde::Serialize;
use serde_json::json;

use super::args::{DomstatsArgs, Output};
use super::{print, print_json};

/// What a machine uses in each second, as JSON.
#[derive(Debug, Serialize)]
struct NamedRates<'a> {
    name: &'a str,
    resident: u64,
    #[serde(flatten)]
    rates: Rates,
}

pub fn stats(args: &DomstatsArgs) -> anyhow::Result<()> {
    let manager = Manager::of_user()?;
    let Some(seconds) = args.watch else {
        for machine in machines(&manager, args)? {
            let usage = machine.usage()?;
            show(&machine, &usage, args.output)?;
        }
        return Ok(());
    };
    let interval = Duration::from_secs(seconds.into());
    let mut earlier: HashMap<String, (Instant, Usage)> = HashMap::new();
    loop {
        for machine in machines(&manager, args)? {
            // One that has ended meanwhile has no rates.
            let Ok(usage) = machine.usage() else { continue };
            let now = Instant::now();
            let name = machine.name().to_string();
            if let Some((then, before)) = earlier.insert(name, (now, usage.clone())) {
                let rates = usage.rates_since(&before, now - then);
                show_rates(&machine, &usage, &rates, args.output)?;
            }
        }
        thread::sleep(interval);
    }
}

fn machines(manager: &Manager, args: &DomstatsArgs) -> anyhow::Result<Vec<Machine>> {
    if args.names.is_empty() {
        let entries = manager.list(false)?;
        return Ok(entries.into_iter().map(|entry| entry.machine).collect());
    }
    let found = args.names.iter().map(|name| manager.machine(name));
    Ok(found.collect::<Result<_, _>>()?)
}

fn show(machine: &Machine, usage: &Usage, output: Output) -> anyhow::Result<()> {
    let name = machine.name();
    if output == Output::Json {
        return print_json(&json!({"name": name, "usage": usage}));
    }
    let mut text = format!("Machine: '{name}'\n");
    let mut add = |key: &str, value: u64| text.push_str(&format!("  {key}={value}\n"));
    add("cpu.time", nanoseconds(usage.cpu_time));
    add("vcpu.current", usage.vcpus as u64);
    add("memory.resident", usage.resident);
    for disk in &usage.disks {
        let name = &disk.name;
        add(&format!("block.{name}.rd.reqs"), disk.reads);
        add(&format!("block.{name}.rd.bytes"), disk.read_bytes);
        add(&format!("block.{name}.wr.reqs"), disk.writes);
        add(&format!("block.{name}.wr.bytes"), disk.write_bytes);
    }
    for net in &usage.networks {
        let name = &net.name;
        add(&format!("net.{name}.rx.pkts"), net.received_packets);
        add(&format!("net.{name}.rx.bytes"), net.received_bytes);
        add(&format!("net.{name}.tx.pkts"), net.sent_packets);
        add(&format!("net.{name}.tx.bytes"), net.sent_bytes);
    }
    print(&text)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Prints what a machine uses in each second.
fn show_rates(
    machine: &Machine,
    usage: &Usage,
    rates: &Rates,
    output: Output,
) -> anyhow::Result<()> {
    let name = machine.name();
    if output == Output::Json {
        return print_json(&NamedRates {
            name: name.as_str(),
            resident: usage.resident,
            rates: *rates,
        });
    }
    let kib = |bytes: f64| bytes / 1024.0;
    print(&format!(
        "{name}: CPU {:.1} %, memory {} MiB, disks {:.0} KiB/s read {:.0} KiB/s written, networks {:.0} KiB/s \
         received {:.0} KiB/s sent\n",
        rates.cpu_percent,
        usage.resident >> 20,
        kib(rates.read_bytes_per_second),
        kib(rates.written_bytes_per_second),
        kib(rates.received_bytes_per_second),
        kib(rates.sent_bytes_per_second)
    ))
}
