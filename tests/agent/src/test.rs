// SPDX-License-Identifier: Apache-2.0

//! Executes commands, and answers each with one line.

use std::thread;
use std::time::Duration;

use crate::command::Command;
use crate::console::{self, say};
use crate::error::{Context, Result};
use crate::power::{self, Ending};
use crate::{disk, metadata, net, random, sys, system, vsock};

/// Executes the commands in order, those of a word with `&` between them at the same time, and returns how the guest has to
/// end. A failed command does not prevent the next one.
pub fn run<'a>(commands: impl Iterator<Item = &'a str>) -> Ending {
    let mut ending = None;
    for words in commands {
        ending = thread::scope(|scope| {
            let (first, others) = words.split_once('&').unwrap_or((words, ""));
            for word in others.split_terminator('&') {
                scope.spawn(|| execute(word));
            }
            execute(first)
        });
        if ending.is_some() {
            break;
        }
    }
    say(format_args!("bantam: done"));
    ending.unwrap_or(Ending::PowerOff)
}

/// Executes a command, and returns how the guest has to end if it says so.
fn execute(word: &str) -> Option<Ending> {
    match word.parse().and_then(|command| carry_out(&command, word)) {
        Ok(Outcome::Done(details)) => {
            let space = if details.is_empty() { "" } else { " " };
            say(format_args!("bantam: {word} ok{space}{details}"));
        }
        Ok(Outcome::End(how)) => {
            say(format_args!("bantam: {word} ok"));
            return Some(how);
        }
        Err(reason) => say(format_args!("bantam: {word} failed {reason}")),
    }
    None
}

enum Outcome {
    Done(String),
    End(Ending),
}

fn carry_out(command: &Command, word: &str) -> Result<Outcome> {
    // The host must not act before the guest is ready for it.
    let waiting = || say(format_args!("bantam: {word} waiting"));
    let details = match *command {
        Command::FirstLine => String::new(),
        Command::Uname => sys::uname().context("uname")?,
        Command::Arguments => system::arguments()?,
        Command::Cpus => system::cpus()?,
        Command::Memory => format!("total={}kB", system::memory()?),
        Command::Clocksource => system::clocksource()?,
        Command::PlatformDriver { ref driver } => system::platform_driver(driver)?,
        Command::Time => system::time()?,
        Command::Sleep { milliseconds } => {
            thread::sleep(Duration::from_millis(milliseconds));
            String::new()
        }
        Command::Watch { milliseconds } => system::watch(Duration::from_millis(milliseconds))?,
        Command::DiskInfo { ref disk } => disk::info(disk)?,
        Command::DiskWriteVerify {
            ref disk,
            offset,
            length,
            seed,
        } => disk::write_verify(disk, offset, length, seed)?,
        Command::DiskVerifyRandom {
            ref disks,
            seed,
            operations,
        } => disk::verify_random(disks, seed, operations)?,
        Command::DiskChecksum { ref disk } => disk::checksum(disk)?,
        Command::DiskDiscard {
            ref disk,
            offset,
            length,
        } => disk::discard(disk, offset, length)?,
        Command::DiskZeroout {
            ref disk,
            offset,
            length,
        } => disk::zeroout(disk, offset, length)?,
        Command::DiskWriteRefused { ref disk } => disk::write_refused(disk)?,
        Command::Net {
            ref interface,
            address,
            prefix,
            peer,
        } => net::configure(interface, address, prefix, peer)?,
        Command::NetInfo { ref interface } => net::info(interface)?,
        Command::NetTcpSend { peer, length, seed } => net::tcp_send(peer, length, seed)?,
        Command::NetTcpReceive { peer, length, seed } => net::tcp_receive(peer, length, seed)?,
        Command::NetTcpCrowd { peer, connections } => net::tcp_crowd(peer, connections)?,
        Command::VsockConnect(exchange) => vsock::connect(exchange)?,
        Command::VsockListen(exchange) => vsock::listen(exchange, waiting)?,
        Command::VsockEcho { port } => vsock::echo(port, waiting)?,
        Command::Metadata {
            ref interface,
            ref path,
        } => metadata::get(interface, path)?,
        Command::MetadataSession {
            ref path,
            peer,
            length,
            seed,
        } => metadata::session(path, peer, length, seed)?,
        Command::Rng { length } => random::hardware(length)?,
        Command::Entropy => random::entropy()?,
        Command::EchoLine => console::echo_line(waiting)?,
        Command::SerialEchoBytes { length } => console::echo_bytes(length, waiting)?,
        Command::PowerButton => {
            power::button(waiting)?;
            String::new()
        }
        Command::CtrlAltDel => {
            power::ctrl_alt_del(waiting)?;
            String::new()
        }
        Command::Poweroff => return Ok(Outcome::End(Ending::PowerOff)),
        Command::Reboot => return Ok(Outcome::End(Ending::Restart)),
        Command::Panic => return Ok(Outcome::End(Ending::Panic)),
        Command::Exit { number } => return Ok(Outcome::End(Ending::Number(number))),
    };
    Ok(Outcome::Done(details))
}
