//! `bantam top`: what the machines that run use, in a table that renews itself.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use bantam_manager::{Manager, Rates, Usage};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;
use serde::Serialize;

use super::args::{Output, TopArgs, TopOrder};
use super::{print, print_json, table};
use crate::signals::{Request, Signals, sleep_until_continued};
use crate::terminal::{self, RawTerminal};

/// How long the first measurement takes, if tables are further apart than that.
const FIRST_INTERVAL: Duration = Duration::from_millis(500);
/// The other screen of a terminal, without a cursor (xterm control sequences).
const ENTER_SCREEN: &str = "\x1b[?1049h\x1b[?25l";
/// The way back.
const LEAVE_SCREEN: &str = "\x1b[?25h\x1b[?1049l";
/// Before each table: to the first place.
const HOME: &str = "\x1b[H";
/// At the end of each line: what is left of it becomes empty.
const CLEAR_LINE: &str = "\x1b[K";
/// At the end of a table: what is below it becomes empty.
const CLEAR_BELOW: &str = "\x1b[J";
/// What Ctrl-C and Escape send to a program that reads raw keys.
const END_KEYS: [u8; 4] = [b'q', b'Q', 0x03, 0x1b];
const HELP: &str = "q: quit   sort by c: CPU, m: memory, d: disks, n: networks, a: name";

pub fn top(args: &TopArgs) -> anyhow::Result<()> {
    let signals = Signals::block().context("cannot watch signals")?;
    let has_screen = io::stdout().is_terminal() && args.output == Output::Text;
    let screen = has_screen.then(Screen::enter).transpose()?.flatten();
    let mut meter = Meter {
        manager: Manager::of_user()?,
        earlier: HashMap::new(),
    };
    meter.measure()?;
    let interval = Duration::from_secs(args.delay.into());
    let mut order = args.sort;
    let mut next = Instant::now() + interval.min(FIRST_INTERVAL);
    let mut lines = Vec::new();
    let mut left = args.count.map(u64::from);
    loop {
        match wait(&signals, screen.as_ref(), next)? {
            Event::Time => {
                lines = meter.measure()?;
                next = Instant::now() + interval;
                left = left.map(|left| left.saturating_sub(1));
            }
            Event::Order(chosen) => order = chosen,
            // What was printed stays as it is.
            Event::Redraw if screen.is_none() => continue,
            Event::Redraw => {}
            Event::End => return Ok(()),
        }
        sort(&mut lines, order);
        match &screen {
            Some(_) => draw(&lines)?,
            None if args.output == Output::Json => print_json(&lines)?,
            None => print(&format!("{}\n", table(&cells(&lines))))?,
        }
        if left == Some(0) {
            return Ok(());
        }
    }
}

/// A machine that runs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Line {
    name: String,
    state: &'static str,
    vcpus: usize,
    resident: u64,
    /// Nothing for a machine that has been started since the last measurement.
    #[serde(flatten)]
    rates: Rates,
}

struct Meter {
    manager: Manager,
    /// What each machine had used at the last measurement.
    earlier: HashMap<String, (Instant, Usage)>,
}

impl Meter {
    /// Returns what each machine that runs uses.
    fn measure(&mut self) -> anyhow::Result<Vec<Line>> {
        let mut measured = HashMap::new();
        let mut lines = Vec::new();
        for entry in self.manager.list(false)? {
            // One that has ended meanwhile uses nothing.
            let Ok(usage) = entry.machine.usage() else {
                continue;
            };
            let now = Instant::now();
            let name = entry.machine.name().to_string();
            let rates = self.earlier.get(&name);
            let rates = rates.map(|(then, earlier)| usage.rates_since(earlier, now - *then));
            lines.push(Line {
                name: name.clone(),
                state: entry.state.as_str(),
                vcpus: usage.vcpus,
                resident: usage.resident,
                rates: rates.unwrap_or_default(),
            });
            measured.insert(name, (now, usage));
        }
        self.earlier = measured;
        Ok(lines)
    }
}

fn sort(lines: &mut [Line], order: TopOrder) {
    lines.sort_by(|one, other| one.name.cmp(&other.name));
    let rate = |line: &Line| match order {
        TopOrder::Name => 0.0,
        TopOrder::Cpu => line.rates.cpu_percent,
        TopOrder::Memory => line.resident as f64,
        TopOrder::Disk => line.rates.read_bytes_per_second + line.rates.written_bytes_per_second,
        TopOrder::Network => {
            line.rates.received_bytes_per_second + line.rates.sent_bytes_per_second
        }
    };
    lines.sort_by(|one, other| rate(other).total_cmp(&rate(one)));
}

fn cells(lines: &[Line]) -> Vec<Vec<String>> {
    let heading = [
        "NAME",
        "STATE",
        "VCPUS",
        "CPU %",
        "MEMORY",
        "READ/s",
        "WRITTEN/s",
        "RECEIVED/s",
        "SENT/s",
    ];
    let heading = heading.map(str::to_owned).to_vec();
    let row = |line: &Line| {
        let rates = &line.rates;
        vec![
            line.name.clone(),
            line.state.to_owned(),
            line.vcpus.to_string(),
            format!("{:.1}", rates.cpu_percent),
            size(line.resident as f64),
            size(rates.read_bytes_per_second),
            size(rates.written_bytes_per_second),
            size(rates.received_bytes_per_second),
            size(rates.sent_bytes_per_second),
        ]
    };
    std::iter::once(heading)
        .chain(lines.iter().map(row))
        .collect()
}

/// Returns a number of bytes with a unit, in at most six characters up to a few TiB.
fn size(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "K", "M"] {
        if value < 999.5 {
            return match unit {
                "B" => format!("{value:.0}"),
                _ => format!("{value:.1}{unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1}G")
}

/// Draws the table on the terminal, as much of it as has room there.
fn draw(lines: &[Line]) -> anyhow::Result<()> {
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let title = match lines.len() {
        1 => "1 machine runs".to_owned(),
        count => format!("{count} machines run"),
    };
    let table = table(&cells(lines));
    let text = [title.as_str(), "", HELP, ""]
        .into_iter()
        .chain(table.lines());
    let mut screen = HOME.to_owned();
    for (index, line) in text.take(rows.into()).enumerate() {
        if index > 0 {
            screen.push('\n');
        }
        screen.extend(line.chars().take(columns.into()));
        screen.push_str(CLEAR_LINE);
    }
    screen.push_str(CLEAR_BELOW);
    print(&screen)
}

/// The other screen of the terminal, while this lives.
struct Screen {
    terminal: RawTerminal,
}

impl Screen {
    /// Returns nothing if the keys do not come from a terminal.
    fn enter() -> anyhow::Result<Option<Self>> {
        let Some(terminal) = RawTerminal::enter().context("cannot set up the terminal")? else {
            return Ok(None);
        };
        print(ENTER_SCREEN)?;
        Ok(Some(Self { terminal }))
    }

    fn suspend(&self) -> anyhow::Result<()> {
        self.terminal.suspend();
        print(LEAVE_SCREEN)
    }

    fn resume(&self) -> anyhow::Result<()> {
        let resumed = self.terminal.resume();
        resumed.context("cannot set up the terminal again")?;
        print(ENTER_SCREEN)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = print(LEAVE_SCREEN);
    }
}

enum Event {
    Time,
    Order(TopOrder),
    Redraw,
    End,
}

/// Waits for the time of the next table, a key or a signal.
fn wait(signals: &Signals, screen: Option<&Screen>, until: Instant) -> anyhow::Result<Event> {
    let stdin = io::stdin();
    loop {
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if screen.is_some_and(|screen| screen.terminal.in_foreground()) {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Event::Time);
        }
        // Rounded up, so that it does not wake before the time.
        let timeout = left + Duration::from_micros(999);
        match poll(
            &mut fds,
            PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(io::Error::from(errno)).context("cannot wait for events"),
        }
        let is_ready = |index: usize| fds.get(index).and_then(PollFd::any).unwrap_or(false);
        if is_ready(0) {
            match signals.next().context("cannot read signals")? {
                Some(Request::Stop(_)) => return Ok(Event::End),
                Some(Request::Suspend) => {
                    screen.map_or(Ok(()), Screen::suspend)?;
                    sleep_until_continued().context("cannot suspend")?;
                }
                Some(Request::Continue) => {
                    screen.map_or(Ok(()), Screen::resume)?;
                    return Ok(Event::Redraw);
                }
                Some(Request::Resize) => return Ok(Event::Redraw),
                None => {}
            }
        }
        if is_ready(1) {
            let mut keys = [0; 16];
            let count = match read(&stdin, &mut keys) {
                // A terminal that is gone is a user that is gone.
                Ok(0) => return Ok(Event::End),
                Ok(count) => count,
                Err(Errno::EINTR | Errno::EAGAIN) => 0,
                Err(errno) => {
                    return Err(io::Error::from(errno)).context("cannot read standard input");
                }
            };
            if let Some(event) = keys.iter().take(count).find_map(|&key| of_key(key)) {
                return Ok(event);
            }
        }
    }
}

fn of_key(key: u8) -> Option<Event> {
    if END_KEYS.contains(&key) {
        return Some(Event::End);
    }
    let order = match key {
        b'c' => TopOrder::Cpu,
        b'm' => TopOrder::Memory,
        b'd' => TopOrder::Disk,
        b'n' => TopOrder::Network,
        b'a' => TopOrder::Name,
        b' ' | b'\r' => return Some(Event::Redraw),
        _ => return None,
    };
    Some(Event::Order(order))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, cpu_percent: f64, resident: u64) -> Line {
        Line {
            name: name.to_owned(),
            state: "running",
            vcpus: 1,
            resident,
            rates: Rates {
                cpu_percent,
                ..Rates::default()
            },
        }
    }

    #[test]
    fn the_largest_comes_first_and_equals_by_name() {
        let mut lines = [line("c", 5.0, 1), line("b", 5.0, 2), line("a", 0.0, 9)];
        for (order, names) in [
            (TopOrder::Cpu, "bca"),
            (TopOrder::Memory, "abc"),
            (TopOrder::Disk, "abc"),
            (TopOrder::Name, "abc"),
        ] {
            sort(&mut lines, order);
            let found: String = lines.iter().map(|line| line.name.as_str()).collect();
            assert_eq!(found, names, "{order:?}");
        }
    }

    #[test]
    fn sizes_have_the_unit_that_keeps_them_short() {
        for (bytes, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (1000.0, "1.0K"),
            (1536.0, "1.5K"),
            (1e6, "976.6K"),
            (1048064.0, "1.0M"),
            (5e12, "4656.6G"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
