// SPDX-License-Identifier: Apache-2.0

//! The commands that a test can give to the guest, written as `name` or `name:argument:...`.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::{FromStr, Split};

use crate::error::{Context, Error, Result};
use crate::vsock::Exchange;

/// The doc of each is its answer after `ok`.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing.
    FirstLine,
    /// The output of `uname -a`.
    Uname,
    /// `arguments=["/init", ...] environment=["HOME=/", ...]` of the first process.
    Arguments,
    /// `online=N packages=N cpu0=package:N;core:N;siblings:LIST ...`
    Cpus,
    /// `total=NkB`
    Memory,
    /// The name of the current clock source.
    Clocksource,
    /// `devices=NAME+...`, the devices of a driver on the platform bus, or `devices=-`.
    PlatformDriver {
        driver: String,
    },
    /// `slept=Nms wall=SECONDS`, the duration of a sleep of 200 ms, and the time since 1970.
    Time,
    /// Nothing, but late.
    Sleep {
        milliseconds: u64,
    },
    /// Never: it prints `bantam: random HEX` again and again, of numbers from the kernel's generator, and ends with a
    /// failure when a clock goes back.
    Watch {
        milliseconds: u64,
    },
    /// `size=BYTES ro=0|1 serial=TEXT|- logical=BYTES physical=BYTES discard-max=BYTES
    /// write-zeroes-max=BYTES`
    DiskInfo {
        disk: String,
    },
    /// `direct=yes|no write=RATE read=RATE`, if the pattern of the seed is written and read back.
    DiskWriteVerify {
        disk: String,
        offset: u64,
        length: u64,
        seed: u64,
    },
    /// `block-sizes=BYTES+...`, if random work on disks leaves the expected data. The disks are
    /// written `vdb+vdc+...`; the first holds the pattern of the seed, the next that of the next
    /// seed, and so on. The number of operations is for each area of a disk.
    DiskVerifyRandom {
        disks: Vec<String>,
        seed: u64,
        operations: u32,
    },
    /// `bytes=N crc32=HEX` of the whole disk.
    DiskChecksum {
        disk: String,
    },
    /// `zeroes=yes|no`, whether the part reads as zeroes afterwards.
    DiskDiscard {
        disk: String,
        offset: u64,
        length: u64,
    },
    /// Nothing, if the part is zero afterwards.
    DiskZeroout {
        disk: String,
        offset: u64,
        length: u64,
    },
    /// `error=KIND`, if the disk cannot be written to.
    DiskWriteRefused {
        disk: String,
    },
    /// `rtt=Nus`, the time of the first ping that the peer answers.
    Net {
        interface: String,
        address: Ipv4Addr,
        prefix: u8,
        peer: Ipv4Addr,
    },
    /// `mac=ADDRESS mtu=N state=TEXT rx-checksum=0|1 tx-checksum=0|1 scatter-gather=0|1 tso=0|1 gso=0|1
    /// gro=0|1`
    NetInfo {
        interface: String,
    },
    /// `bytes=N rate=RATE`, once the peer has received the pattern of the seed and closes the
    /// connection.
    NetTcpSend {
        peer: SocketAddrV4,
        length: u64,
        seed: u64,
    },
    /// `bytes=N rate=RATE`, if the pattern of the seed arrives from the peer.
    NetTcpReceive {
        peer: SocketAddrV4,
        length: u64,
        seed: u64,
    },
    /// `lines=N`, how many different lines this many simultaneous connections to the peer got.
    NetTcpCrowd {
        peer: SocketAddrV4,
        connections: u32,
    },
    /// `bytes=N rate=RATE`, once data was exchanged on this many simultaneous connections to a port
    /// of the host.
    VsockConnect(Exchange),
    /// `bytes=N rate=RATE`, the same on connections of the host, for which the guest waits.
    VsockListen(Exchange),
    /// Never: it returns to connections of the host what they send.
    VsockEcho {
        port: u32,
    },
    /// `status=N body=TEXT`, the metadata at a path, with `+` in place of spaces and ends of lines.
    /// The interface gets an address for this.
    Metadata {
        interface: String,
        path: String,
    },
    /// `requests=N body=TEXT bytes=N rate=RATE`, after reading the metadata at a path in a session
    /// while a peer receives the pattern of the seed.
    MetadataSession {
        path: String,
        peer: SocketAddrV4,
        length: u64,
        seed: u64,
    },
    /// `source=NAME bytes=N values=N crc32=HEX` of bytes from the virtio random number generator;
    /// `values` counts the different ones.
    Rng {
        length: u64,
    },
    /// `available=BITS`, if the kernel's random number generator is ready.
    Entropy,
    /// The next line of the console's input.
    EchoLine,
    /// `bytes=N crc32=HEX` of the next bytes of the console's input.
    SerialEchoBytes {
        length: u64,
    },
    /// Nothing, once the power button is pressed.
    PowerButton,
    /// Nothing, once Ctrl-Alt-Del is pressed.
    CtrlAltDel,
    /// Nothing. This one and the next three end a list of commands.
    Poweroff,
    Reboot,
    Panic,
    /// Ends the machine with a number.
    Exit {
        number: u8,
    },
}

impl FromStr for Command {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.split(':');
        let name = words.next().unwrap_or_default();
        let mut arguments = Arguments(words);
        let command = match name {
            "first-line" => Self::FirstLine,
            "uname" => Self::Uname,
            "arguments" => Self::Arguments,
            "cpus" => Self::Cpus,
            "memory" => Self::Memory,
            "clocksource" => Self::Clocksource,
            "platform-driver" => Self::PlatformDriver {
                driver: arguments.device("driver")?,
            },
            "time" => Self::Time,
            "sleep" => Self::Sleep {
                milliseconds: arguments.parsed("milliseconds")?,
            },
            "watch" => Self::Watch {
                milliseconds: arguments.parsed("milliseconds")?,
            },
            "disk-info" => Self::DiskInfo {
                disk: arguments.device("disk")?,
            },
            "disk-write-verify" => Self::DiskWriteVerify {
                disk: arguments.device("disk")?,
                offset: arguments.size("offset")?,
                length: arguments.size("length")?,
                seed: arguments.parsed("seed")?,
            },
            "disk-verify-random" => Self::DiskVerifyRandom {
                disks: arguments.devices("disk")?,
                seed: arguments.parsed("seed")?,
                operations: arguments.parsed("operations")?,
            },
            "disk-checksum" => Self::DiskChecksum {
                disk: arguments.device("disk")?,
            },
            "disk-discard" => Self::DiskDiscard {
                disk: arguments.device("disk")?,
                offset: arguments.size("offset")?,
                length: arguments.size("length")?,
            },
            "disk-zeroout" => Self::DiskZeroout {
                disk: arguments.device("disk")?,
                offset: arguments.size("offset")?,
                length: arguments.size("length")?,
            },
            "disk-write-refused" => Self::DiskWriteRefused {
                disk: arguments.device("disk")?,
            },
            "net" => {
                let interface = arguments.device("interface")?;
                let (address, prefix) = arguments.subnet("address")?;
                Self::Net {
                    interface,
                    address,
                    prefix,
                    peer: arguments.parsed("peer")?,
                }
            }
            "net-info" => Self::NetInfo {
                interface: arguments.device("interface")?,
            },
            "net-tcp-send" => Self::NetTcpSend {
                peer: arguments.peer()?,
                length: arguments.size("length")?,
                seed: arguments.parsed("seed")?,
            },
            "net-tcp-receive" => Self::NetTcpReceive {
                peer: arguments.peer()?,
                length: arguments.size("length")?,
                seed: arguments.parsed("seed")?,
            },
            "net-tcp-crowd" => Self::NetTcpCrowd {
                peer: arguments.peer()?,
                connections: arguments.parsed("connections")?,
            },
            "vsock-connect" => Self::VsockConnect(arguments.exchange()?),
            "vsock-listen" => Self::VsockListen(arguments.exchange()?),
            "vsock-echo" => Self::VsockEcho {
                port: arguments.parsed("port")?,
            },
            "metadata" => Self::Metadata {
                interface: arguments.device("interface")?,
                path: arguments.text("path")?.to_owned(),
            },
            "metadata-session" => Self::MetadataSession {
                path: arguments.text("path")?.to_owned(),
                peer: arguments.peer()?,
                length: arguments.size("length")?,
                seed: arguments.parsed("seed")?,
            },
            "rng" => Self::Rng {
                length: arguments.size("length")?,
            },
            "entropy" => Self::Entropy,
            "echo-line" => Self::EchoLine,
            "serial-echo-bytes" => Self::SerialEchoBytes {
                length: arguments.size("length")?,
            },
            "power-button" => Self::PowerButton,
            "ctrl-alt-del" => Self::CtrlAltDel,
            "poweroff" => Self::Poweroff,
            "reboot" => Self::Reboot,
            "panic" => Self::Panic,
            "exit" => Self::Exit {
                number: arguments.parsed("number")?,
            },
            _ => return Err(Error::new("unknown command")),
        };
        arguments.end()?;
        Ok(command)
    }
}

struct Arguments<'a>(Split<'a, char>);

impl<'a> Arguments<'a> {
    fn text(&mut self, name: &str) -> Result<&'a str> {
        self.0
            .next()
            .filter(|word| !word.is_empty())
            .ok_or_else(|| Error::new(format!("missing argument: {name}")))
    }

    fn parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> Result<T> {
        let word = self.text(name)?;
        word.parse().context(format_args!("{name} {word}"))
    }

    /// A name that is safe to put into a path.
    fn device(&mut self, name: &str) -> Result<String> {
        device(name, self.text(name)?)
    }

    /// Such names, separated by `+`.
    fn devices(&mut self, name: &str) -> Result<Vec<String>> {
        let words = self.text(name)?.split('+');
        words.map(|word| device(name, word)).collect()
    }

    /// A number of bytes, with an optional K, M or G (powers of 1024).
    fn size(&mut self, name: &str) -> Result<u64> {
        let word = self.text(name)?;
        let (digits, shift) = match word.as_bytes() {
            [.., b'K'] => (&word[..word.len() - 1], 10),
            [.., b'M'] => (&word[..word.len() - 1], 20),
            [.., b'G'] => (&word[..word.len() - 1], 30),
            _ => (word, 0),
        };
        let number: u64 = digits.parse().context(format_args!("{name} {word}"))?;
        number
            .checked_mul(1 << shift)
            .ok_or_else(|| Error::new(format!("{name} {word}: too large")))
    }

    fn subnet(&mut self, name: &str) -> Result<(Ipv4Addr, u8)> {
        let word = self.text(name)?;
        let invalid = || Error::new(format!("{name} {word}: not ADDRESS/PREFIX"));
        let (address, prefix) = word.split_once('/').ok_or_else(invalid)?;
        let address = address.parse().map_err(|_| invalid())?;
        let prefix = prefix.parse().map_err(|_| invalid())?;
        if prefix > 32 {
            return Err(invalid());
        }
        Ok((address, prefix))
    }

    fn peer(&mut self) -> Result<SocketAddrV4> {
        Ok(SocketAddrV4::new(
            self.parsed("peer")?,
            self.parsed("port")?,
        ))
    }

    fn exchange(&mut self) -> Result<Exchange> {
        Ok(Exchange {
            port: self.parsed("port")?,
            connections: self.parsed("connections")?,
            length: self.size("length")?,
        })
    }

    fn end(mut self) -> Result<()> {
        match self.0.next() {
            None => Ok(()),
            Some(word) => Err(Error::new(format!("unexpected argument: {word}"))),
        }
    }
}

fn device(name: &str, word: &str) -> Result<String> {
    if word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Error::new(format!("{name} {word}: not a device name")));
    }
    Ok(word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(text: &str) -> String {
        match text.parse::<Command>() {
            Ok(command) => panic!("{text} was taken for {command:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn words_alone() {
        assert_eq!("cpus".parse(), Ok(Command::Cpus));
        assert_eq!("power-button".parse(), Ok(Command::PowerButton));
        assert_eq!("exit:255".parse(), Ok(Command::Exit { number: 255 }));
        assert!(reason("exit:256").starts_with("number 256: "));
    }

    #[test]
    fn arguments_in_order() {
        assert_eq!(
            "disk-write-verify:vdb:4K:1M:18446744073709551615".parse(),
            Ok(Command::DiskWriteVerify {
                disk: "vdb".into(),
                offset: 4096,
                length: 1 << 20,
                seed: u64::MAX,
            })
        );
        assert_eq!(
            "disk-verify-random:vdb+vdc:7:32".parse(),
            Ok(Command::DiskVerifyRandom {
                disks: vec!["vdb".into(), "vdc".into()],
                seed: 7,
                operations: 32,
            })
        );
        assert_eq!(
            "net:eth0:192.168.7.2/24:192.168.7.1".parse(),
            Ok(Command::Net {
                interface: "eth0".into(),
                address: Ipv4Addr::new(192, 168, 7, 2),
                prefix: 24,
                peer: Ipv4Addr::new(192, 168, 7, 1),
            })
        );
        assert_eq!(
            "net-tcp-send:10.0.0.1:8080:2G:3".parse(),
            Ok(Command::NetTcpSend {
                peer: SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 8080),
                length: 2 << 30,
                seed: 3,
            })
        );
    }

    #[test]
    fn exchanges() {
        assert_eq!(
            "vsock-listen:52:4:1M".parse(),
            Ok(Command::VsockListen(Exchange {
                port: 52,
                connections: 4,
                length: 1 << 20,
            }))
        );
        assert_eq!(reason("vsock-connect:52:4"), "missing argument: length");
    }

    #[test]
    fn paths_of_metadata() {
        assert_eq!(
            "metadata:eth0:/latest/meta-data".parse(),
            Ok(Command::Metadata {
                interface: "eth0".into(),
                path: "/latest/meta-data".into(),
            })
        );
        assert_eq!(reason("metadata:eth0"), "missing argument: path");
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(reason(""), "unknown command");
        assert_eq!(reason("disks"), "unknown command");
        assert_eq!(reason("disk-info"), "missing argument: disk");
        assert_eq!(reason("disk-info:"), "missing argument: disk");
        assert_eq!(reason("disk-info:vda:1"), "unexpected argument: 1");
        assert_eq!(reason("disk-info:../sda"), "disk ../sda: not a device name");
        assert_eq!(
            reason("disk-verify-random:vdb+:1:1"),
            "disk : not a device name"
        );
        assert_eq!(
            reason("rng:lots"),
            "length lots: invalid digit found in string"
        );
        assert_eq!(reason("rng:99999999999G"), "length 99999999999G: too large");
        assert_eq!(
            reason("net:eth0:10.0.0.1/33:10.0.0.2"),
            "address 10.0.0.1/33: not ADDRESS/PREFIX"
        );
        assert_eq!(
            reason("net-tcp-send:10.0.0.1:65536:1:1"),
            "port 65536: number too large to fit in target type"
        );
    }
}
