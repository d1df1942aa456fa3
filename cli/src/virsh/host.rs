//! Commands about the host and the program.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::Context;
use nix::sys::utsname::uname;

use super::Session;
use super::args::Arguments;
use super::table;
use crate::named::print;

const CPUS: &str = "/sys/devices/system/cpu";
const NODES: &str = "/sys/devices/system/node";

pub fn uri(session: &mut Session, _arguments: &Arguments) -> anyhow::Result<()> {
    let uri = session.uri();
    session.print(&(uri + "\n"));
    Ok(())
}

pub fn hostname(session: &mut Session, _arguments: &Arguments) -> anyhow::Result<()> {
    let system = uname().context("failed to get hostname")?;
    session.print(&format!("{}\n", system.nodename().display()));
    Ok(())
}

pub fn version(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    const VERSION: &str = concat!("Bantam ", env!("CARGO_PKG_VERSION"));
    let mut text = format!(
        "Compiled against library: {VERSION}\nUsing library: {VERSION}\nUsing API: {VERSION}\n\
         Running hypervisor: {VERSION}\n"
    );
    if arguments.has("daemon") {
        text.push_str("Running against daemon: none\n");
    }
    session.print(&text);
    Ok(())
}

pub fn node_information(session: &mut Session, _arguments: &Arguments) -> anyhow::Result<()> {
    let text = node_text()?;
    session.print(&text);
    Ok(())
}

/// Executes `bantam nodeinfo`.
pub fn print_node_information() -> anyhow::Result<()> {
    print(&node_text()?)
}

fn node_text() -> anyhow::Result<String> {
    let read =
        |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read '{path}'"));
    let cpuinfo = read("/proc/cpuinfo")?;
    let memory = memory_size(&read("/proc/meminfo")?);
    let memory = memory.context("'/proc/meminfo' does not say how much memory there is")?;
    let topology = topology();
    let system = uname().context("cannot ask for the kernel of the host")?;
    Ok(table::facts(
        21,
        &[
            ("CPU model", system.machine().display().to_string()),
            ("CPU(s)", topology.cpus.to_string()),
            ("CPU frequency", format!("{} MHz", frequency(&cpuinfo))),
            ("CPU socket(s)", topology.sockets.to_string()),
            ("Core(s) per socket", topology.cores.to_string()),
            ("Thread(s) per core", topology.threads.to_string()),
            ("NUMA cell(s)", topology.cells.to_string()),
            ("Memory size", format!("{memory} KiB")),
        ],
    ))
}

/// Returns the frequency of the first CPU in MHz, or 0 if the host does not tell.
fn frequency(cpuinfo: &str) -> u64 {
    let values = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let mut found = values.filter(|(key, _)| key.trim() == "cpu MHz");
    let mhz = found
        .next()
        .and_then(|(_, value)| value.trim().split('.').next());
    mhz.and_then(|mhz| mhz.parse().ok()).unwrap_or_default()
}

/// Returns the memory of the host in KiB.
fn memory_size(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// How the CPUs of the host are arranged.
#[derive(Debug, PartialEq, Eq)]
struct Topology {
    cpus: usize,
    cells: usize,
    /// Sockets of a cell.
    sockets: usize,
    /// Cores of a socket.
    cores: usize,
    /// Threads of a core.
    threads: usize,
}

/// Asks sysfs for the arrangement of the CPUs that are online.
fn topology() -> Topology {
    let mut places = Vec::new();
    for number in numbered(Path::new(CPUS), "cpu") {
        let read = |name: &str| {
            let path = format!("{CPUS}/cpu{number}/topology/{name}");
            fs::read_to_string(path).ok()?.trim().parse::<i64>().ok()
        };
        // One that is offline has no topology.
        places.extend(read("physical_package_id").zip(read("core_id")));
    }
    if places.is_empty() {
        let online = std::thread::available_parallelism().map_or(1, usize::from);
        places.extend((0..).map(|core| (0, core)).take(online));
    }
    arrange(&places, numbered(Path::new(NODES), "node").len())
}

/// Returns the numbers behind `prefix` in the names of what is in a folder.
fn numbered(folder: &Path, prefix: &str) -> Vec<usize> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix(prefix)?.parse().ok()
    });
    numbers.collect()
}

/// Returns the arrangement of CPUs, of each of which the socket and the core are known. As libvirt does, it says that all
/// are cores of one socket if they are not arranged evenly.
fn arrange(places: &[(i64, i64)], cells: usize) -> Topology {
    let cpus = places.len();
    let cells = cells.max(1);
    let distinct = |items: HashSet<(i64, i64)>| items.len().max(1);
    let all_sockets = distinct(places.iter().map(|&(socket, _)| (socket, 0)).collect());
    let all_cores = distinct(places.iter().copied().collect());
    let topology = Topology {
        cpus,
        cells,
        sockets: (all_sockets / cells).max(1),
        cores: all_cores / all_sockets,
        threads: cpus / all_cores,
    };
    match topology.cells * topology.sockets * topology.cores * topology.threads == cpus {
        true => topology,
        false => Topology {
            cpus,
            cells: 1,
            sockets: 1,
            cores: cpus,
            threads: 1,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn even(sockets: i64, cores: i64, threads: i64) -> Vec<(i64, i64)> {
        let all = (0..sockets).flat_map(|socket| (0..cores).map(move |core| (socket, core)));
        let all = all.flat_map(|place| (0..threads).map(move |_| place));
        all.collect()
    }

    fn numbers(places: &[(i64, i64)], cells: usize) -> [usize; 5] {
        let it = arrange(places, cells);
        [it.cpus, it.cells, it.sockets, it.cores, it.threads]
    }

    #[test]
    fn numbers_multiply_to_that_of_the_cpus() {
        assert_eq!(numbers(&even(1, 2, 1), 1), [2, 1, 1, 2, 1]);
        assert_eq!(numbers(&even(2, 8, 2), 2), [32, 2, 1, 8, 2]);
        assert_eq!(numbers(&even(2, 4, 1), 1), [8, 1, 2, 4, 1]);
        // Two cells in one socket.
        assert_eq!(numbers(&even(1, 8, 1), 2), [8, 1, 1, 8, 1]);
        // A core whose second thread is offline.
        assert_eq!(numbers(&even(1, 4, 2)[1..], 1), [7, 1, 1, 7, 1]);
        assert_eq!(numbers(&even(1, 1, 1), 0), [1, 1, 1, 1, 1]);
    }

    #[test]
    fn frequency_and_memory_are_found() {
        let cpuinfo =
            "processor\t: 0\nmodel name\t: A: B\ncpu MHz\t\t: 2399.998\ncpu MHz\t\t: 1.0\n";
        assert_eq!(frequency(cpuinfo), 2399);
        assert_eq!(frequency(""), 0);
        let meminfo = "MemTotal:       16384000 kB\nMemFree: 1 kB\n";
        assert_eq!(memory_size(meminfo), Some(16_384_000));
        assert_eq!(memory_size("MemFree: 1 kB\n"), None);
    }
}
