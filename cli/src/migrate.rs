//! `bantam migrate`: moves a machine to another process or host, and receives one.

mod endpoint;
mod progress;
mod stdio;
mod tls;
mod tunnel;

use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use bantam_manager::{Definition, Machine, MachineName, Manager, Removal};
use bantam_vmm::config::{MachineConfig, ShutdownTimeout};
use bantam_vmm::{
    Answer, Arrival, AtTimeout, Command, Controller, ListeningSocket, Migrated, MigrationAddress,
    MigrationCompression, MigrationConnection, MigrationOptions, MigrationOrder,
};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ValueEnum, value_parser};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::ServerConfig;

use crate::args::EndArgs;
use crate::control::{Output, connect};
use crate::message::say;
use crate::named::running_machine;
use progress::ProgressLine;
use stdio::Stdio;
use tls::SecureStream;
use tunnel::Tunnel;

pub use endpoint::{Destination, ReceivingEnd, SshHost, TlsPlace};

/// How long the process of a machine that has moved may take to end.
const END_TIME: Duration = Duration::from_secs(30);
/// How long each further connection of a source may take to come.
const JOIN_TIME: Duration = Duration::from_secs(10);
/// How many sources may be about to show who they are. Further ones are sent away.
const MAX_HANDSHAKES: usize = 64;

// The options of `bantam migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The machine: the control socket that it was started with (--control), or its name
    #[arg(required_unless_present = "receive")]
    pub machine: Option<PathBuf>,

    /// Where it is received: unix:PATH, tcp://HOST:PORT, tls://HOST:PORT or ssh://[USER@]HOST[:PORT]
    #[arg(
        required_unless_present_any = ["receive", "cancel", "progress", "take_back"],
        value_parser = OsStringValueParser::new().try_map(|text| Destination::parse(&text)),
    )]
    pub destination: Option<Destination>,

    /// Wait for a machine at ADDRESS, unix:PATH, tcp://HOST:PORT or tls://HOST:PORT, and run it
    ///
    /// stdio receives it by standard input and output, as ssh:// at the source has it done.
    #[arg(
        long,
        value_name = "ADDRESS",
        value_parser = OsStringValueParser::new().try_map(|text| ReceivingEnd::parse(&text)),
        conflicts_with_all = ["machine", "destination", "cancel", "progress", "take_back", "downtime", "timeout", "at_timeout", "max_throttle", "connections", "compress"],
    )]
    pub receive: Option<ReceivingEnd>,

    /// Only ask the other end whether it could run the machine; it goes on waiting for one
    #[arg(long, requires = "destination")]
    pub dry_run: bool,

    /// For how long the guest should stand still at most
    #[arg(long, value_name = "TIME", default_value = "50ms")]
    pub downtime: ShutdownTimeout,

    /// How long the machine may run while its memory is copied
    #[arg(long, value_name = "TIME", default_value = "2m")]
    pub timeout: ShutdownTimeout,

    /// What is done when that time is over, as the guest writes faster than its memory is copied
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub at_timeout: TimeoutAction,

    /// How much of its time the machine may lose at most, in percent, if it writes faster than its memory is copied
    ///
    /// It is slowed down in steps. 0 lets it run as fast as it can.
    #[arg(long, value_name = "PERCENT", default_value_t = 99, value_parser = value_parser!(u8).range(0..=99))]
    pub max_throttle: u8,

    /// Send memory over so many connections at once
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = value_parser!(u8).range(1..=i64::from(MigrationOptions::MAX_CONNECTIONS)))]
    pub connections: u8,

    /// Compress memory that is sent
    #[arg(long, value_name = "METHOD", value_enum)]
    pub compress: Option<CompressionMethod>,

    /// Let the memory cross a network where others can read and change it
    ///
    /// Otherwise ADDRESS has to be tls://, a Unix socket or a loopback address.
    #[arg(long)]
    pub insecure: bool,

    /// Folder with the certificate and the key of this end, and the certificate of the authority of both, for tls://
    ///
    /// The files are cacert.pem, and clientcert.pem and clientkey.pem at the source, or servercert.pem and serverkey.pem at the
    /// receiver.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["cancel", "progress", "take_back"])]
    pub tls_dir: Option<PathBuf>,

    /// Print how far the migration is that is under way
    #[arg(long, conflicts_with_all = ["destination", "cancel", "take_back"])]
    pub progress: bool,

    /// Undefine the machine here when it has moved, if it has a name. Its disks stay
    #[arg(long, requires = "destination", conflicts_with = "dry_run")]
    pub undefine_source: bool,

    /// End the migration that is under way; the machine goes on where it is
    #[arg(long, conflicts_with_all = ["destination", "take_back"])]
    pub cancel: bool,

    /// Let the machine go on here although nobody knows whether it was moved
    ///
    /// This is for a connection that broke at the last moment. Make sure before that the machine does not run at the other
    /// end, and never did.
    #[arg(long, conflicts_with = "destination")]
    pub take_back: bool,

    #[command(flatten)]
    pub ends: EndArgs,

    /// What the machine is called at the receiver; the name that it has at the source by default, if it has one
    ///
    /// It is given to the receiver, or with ssh:// to the source.
    #[arg(long, value_name = "NAME")]
    pub name: Option<MachineName>,

    /// Run the machine that is received in this process, even if it has a name, with this socket for other programs to control it
    #[arg(
        long,
        value_name = "PATH",
        requires = "receive",
        conflicts_with = "name"
    )]
    pub control: Option<PathBuf>,

    /// How the answer is printed
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub output: Output,
}

/// What is done with a guest that writes too fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TimeoutAction {
    /// The migration fails, and the machine goes on where it is
    #[default]
    Cancel,
    /// The guest stands still until all is copied
    Stop,
}

/// How memory is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompressionMethod {
    /// By Zstandard, at its fastest level
    Zstd,
}

/// Executes `bantam migrate` for a machine that runs.
pub fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    let machine = args.machine.as_deref().context("no machine is named")?;
    if !args.ends.is_empty() {
        bail!(
            "disks, taps and other ends are those of the receiver: name them there, with --receive"
        );
    }
    if args.progress {
        return print(&match (args.output, progress::ask(machine)?) {
            (Output::Json, progress) => serde_json::to_string(&progress)?,
            (Output::Human, None) => "no migration is under way".to_owned(),
            (Output::Human, Some(progress)) => progress::describe(&progress),
        });
    }
    if args.cancel {
        connect(machine)?.execute(Command::CancelMigration)?;
        return Ok(());
    }
    if args.take_back {
        connect(machine)?.execute(Command::TakeBack)?;
        return Ok(());
    }
    let relocation = Relocation {
        machine,
        destination: args
            .destination
            .as_ref()
            .context("no destination is named")?,
        name: args.name.as_ref(),
        tls_folder: args.tls_dir.as_deref(),
        insecure: args.insecure,
        dry_run: args.dry_run,
        undefine_source: args.undefine_source,
        options: MigrationOptions {
            downtime: args.downtime.get(),
            timeout: args.timeout.get(),
            at_timeout: match args.at_timeout {
                TimeoutAction::Cancel => AtTimeout::Cancel,
                TimeoutAction::Stop => AtTimeout::Stop,
            },
            max_throttle: args.max_throttle,
            connections: args.connections,
            compress: args
                .compress
                .map(|CompressionMethod::Zstd| MigrationCompression::Zstd),
            note: None,
        },
    };
    let line = ProgressLine::show(machine);
    let answer = relocation.execute();
    drop(line);
    let answer = answer?;
    print(&match (args.output, &answer) {
        (Output::Human, Answer::Migrated(migrated)) => describe(migrated),
        (Output::Json, Answer::Migrated(migrated)) => serde_json::to_string(migrated)?,
        (Output::Human, _) => "the machine could run there".to_owned(),
        (Output::Json, answer) => serde_json::to_string(answer)?,
    })
}

/// How a machine is moved.
pub struct Relocation<'a> {
    /// Its control socket, or its name.
    pub machine: &'a Path,
    /// Where it is moved.
    pub destination: &'a Destination,
    /// What it is called there, if this end decides that.
    pub name: Option<&'a MachineName>,
    /// The folder with the certificates for TLS.
    pub tls_folder: Option<&'a Path>,
    /// Whether its memory may cross a network where others can read and change it.
    pub insecure: bool,
    /// Whether the other end is only asked.
    pub dry_run: bool,
    /// Whether it is undefined here afterwards.
    pub undefine_source: bool,
    /// How it is copied.
    pub options: MigrationOptions,
}

impl Relocation<'_> {
    /// Moves the machine, and returns the answer of its process.
    pub fn execute(self) -> anyhow::Result<Answer> {
        let named = running_machine(self.machine);
        if self.undefine_source {
            let named = named.as_ref();
            let named = named.context("only a named machine can be undefined")?;
            named.require_removable_after_move()?;
        }
        let definition = named.as_ref().map(Machine::definition).transpose()?;
        let note = definition.map(|it| it.to_text()).transpose()?;
        let mut client = connect(self.machine)?;
        let is_tls = matches!(self.destination, Destination::Tls(_));
        require_tls_for_folder(is_tls, self.tls_folder)?;
        // A dry run has only one.
        let connections = if self.dry_run {
            1
        } else {
            self.options.connections
        };
        let (destination, tunnel) = match (self.destination, self.name) {
            (Destination::Address(_) | Destination::Tls(_), Some(_)) => {
                bail!("the receiver decides what the machine is called: name it there (--name)")
            }
            (Destination::Address(address), None) => (address.looked_up()?, None),
            (Destination::Tls(place), None) => {
                let tunnel = Tunnel::by_tls(place, tls_folder(self.tls_folder)?, connections)?;
                (tunnel.address(), Some(tunnel))
            }
            (Destination::Ssh(_), _) if connections > 1 => {
                bail!("ssh:// has one connection; use tls:// for several (--connections)")
            }
            (Destination::Ssh(host), name) => {
                let tunnel = Tunnel::by_ssh(host, name)?;
                (tunnel.address(), Some(tunnel))
            }
        };
        let order = MigrationOrder {
            destination,
            insecure: self.insecure,
            dry_run: self.dry_run,
            options: MigrationOptions {
                note,
                ..self.options
            },
        };
        client.set_answer_time(Duration::MAX);
        let answer = client.execute(Command::Migrate(Box::new(order)));
        let answer = match (answer, tunnel) {
            (Ok(answer), Some(tunnel)) => {
                if let Err(error) = tunnel.finish() {
                    say(format_args!("warning: {error}"));
                }
                answer
            }
            (Ok(answer), None) => answer,
            (Err(error), Some(tunnel)) => return Err(tunnel.explain(error.into())),
            (Err(error), None) => return Err(error.into()),
        };
        if let Some(named) = named.filter(|_| self.undefine_source) {
            if !named.wait_until_shut_off(Some(END_TIME))? {
                bail!(
                    "the machine has moved, but its process here does not end, so it was not undefined"
                );
            }
            let undefined = Manager::of_user()?.undefine(&named, Removal::default());
            undefined.context("the machine has moved, but was not undefined here")?;
        }
        Ok(answer)
    }
}

fn tls_folder(folder: Option<&Path>) -> anyhow::Result<&Path> {
    folder.context("tls:// needs the folder with the certificates (--tls-dir DIR)")
}

/// Nobody who names certificates expects a connection without them.
fn require_tls_for_folder(is_tls: bool, folder: Option<&Path>) -> anyhow::Result<()> {
    if folder.is_some() && !is_tls {
        bail!("--tls-dir is for tls://HOST:PORT");
    }
    Ok(())
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{text}").context("cannot write to standard output")
}

fn describe(migrated: &Migrated) -> String {
    let slowed = match migrated.throttle {
        0 => String::new(),
        share => format!("; it was slowed down by {share} % at the end"),
    };
    format!(
        "moved in {:.2} s: the guest stood still for {:.1} ms; {:.1} MiB of memory in {} rounds{slowed}",
        migrated.time.as_secs_f64(),
        migrated.downtime.as_secs_f64() * 1000.0,
        migrated.sent as f64 / f64::from(1 << 20),
        migrated.rounds,
    )
}

/// A machine that was received.
pub enum Received {
    /// It is to be run by this process, with this configuration.
    Machine(Box<Arrival>, Box<MachineConfig>),
    /// It is here, as a named machine.
    Named(Machine),
    /// The source has only asked whether it could run here.
    Nothing,
}

/// Waits for a machine, and makes it a named machine if it is one or is to have a name. Sources that only ask whether it
/// could run here get their answers meanwhile.
pub fn receive(args: &MigrateArgs, end: &ReceivingEnd) -> anyhow::Result<Received> {
    let is_tls = matches!(end, ReceivingEnd::Tls(_));
    require_tls_for_folder(is_tls, args.tls_dir.as_deref())?;
    let address = match end {
        ReceivingEnd::Address(address) => address,
        ReceivingEnd::Tls(place) => return receive_by_tls(args, place),
        ReceivingEnd::Stdio if args.control.is_some() => {
            bail!(
                "with standard input and output as the connection, a machine does not run in this process (--control)"
            )
        }
        ReceivingEnd::Stdio => {
            let (socket, stdio) = Stdio::start()?;
            let received = take(args, socket.into(), || bail!("ssh:// has one connection"));
            stdio.finish();
            return Ok(received?.unwrap_or(Received::Nothing));
        }
    };
    if !args.insecure && !address.is_local() {
        bail!(
            "cannot receive a machine at '{address}': anyone who reaches it there could send one, and read its memory; \
             use tls://, or allow it (--insecure)"
        );
    }
    let listener = Listener::bind(address)?;
    loop {
        let stream = listener.accept();
        let stream = stream.with_context(|| format!("cannot listen on '{address}'"))?;
        let next = || listener.accept_within(JOIN_TIME);
        if let Some(received) = take(args, stream, next)? {
            return Ok(received);
        }
    }
}

/// Waits for a machine behind TLS. Nothing of what a source sends is looked at before it has shown who it is.
fn receive_by_tls(args: &MigrateArgs, place: &TlsPlace) -> anyhow::Result<Received> {
    if args.control.is_some() {
        bail!("a machine that is received by TLS does not run in this process (--control)");
    }
    let config = tls::server_config(tls_folder(args.tls_dir.as_deref())?)?;
    let listener = TcpListener::bind((&*place.host, place.port))
        .with_context(|| format!("cannot listen on '{place}'"))?;
    if place.port == 0 {
        say(format_args!("waiting at tls://{}", listener.local_addr()?));
    }
    let sources = authenticated(listener, config)?;
    loop {
        let secure = sources
            .recv()
            .context("cannot wait for connections any longer")?;
        let mut relays = Vec::new();
        let mut relay = |secure: SecureStream| -> anyhow::Result<OwnedFd> {
            let (ours, theirs) = UnixStream::pair().context("cannot relay a connection")?;
            let relay = thread::Builder::new()
                .name("tls".into())
                .spawn(move || secure.relay(ours))
                .context("cannot start a thread for the connection")?;
            relays.push(relay);
            Ok(theirs.into())
        };
        let first = relay(secure)?;
        let received = take(args, first, || relay(sources.recv_timeout(JOIN_TIME)?));
        for relay in relays {
            // The source still has to be told how it has ended. If the connection fails now, the source reports it.
            let _ = relay.join();
        }
        if let Some(received) = received? {
            return Ok(received);
        }
    }
}

/// Returns the connections of sources that have shown who they are. Those that have not do not hold others up.
fn authenticated(
    listener: TcpListener,
    config: Arc<ServerConfig>,
) -> anyhow::Result<Receiver<SecureStream>> {
    let (sender, receiver) = mpsc::sync_channel(0);
    let handshakes = Arc::new(());
    let accept = move || {
        loop {
            let Ok((stream, peer)) = listener.accept() else {
                // Out of descriptors, for instance.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            if Arc::strong_count(&handshakes) > MAX_HANDSHAKES {
                continue;
            }
            let (sender, config) = (sender.clone(), config.clone());
            let counted = handshakes.clone();
            let shake_hands = move || {
                let accepted = SecureStream::accept(config, stream);
                drop(counted);
                match accepted {
                    // Nobody waits for another if a machine has arrived.
                    Ok(secure) => drop(sender.send(secure)),
                    Err(error) => say(format_args!(
                        "refused a connection from {peer}: {}",
                        crate::reason(&error)
                    )),
                }
            };
            // The source notices the end of its connection if there is no thread for it.
            let _ = thread::Builder::new()
                .name("handshake".into())
                .spawn(shake_hands);
        }
    };
    thread::Builder::new()
        .name("listener".into())
        .spawn(accept)
        .context("cannot start a thread for connections")?;
    Ok(receiver)
}

/// Receives the machine that comes by a connection, and by further ones that `next` waits for; `None` if the source has only
/// asked whether it could.
fn take(
    args: &MigrateArgs,
    stream: OwnedFd,
    mut next: impl FnMut() -> anyhow::Result<OwnedFd>,
) -> anyhow::Result<Option<Received>> {
    let mut arrival = Arrival::new(MigrationConnection::new(stream)?)?;
    while arrival.awaits_connections() {
        match next() {
            // One of another source is closed.
            Ok(stream) => drop(arrival.join(MigrationConnection::new(stream)?)),
            Err(error) => {
                arrival.refuse("not all connections have been made");
                return Err(error.context("not all connections of the source have been made"));
            }
        }
    }
    let is_trial = arrival.is_trial();
    let place = match Place::of(args, &arrival) {
        Ok(place) => place,
        Err(error) => {
            arrival.refuse(&crate::reason(&error));
            return if is_trial { Ok(None) } else { Err(error) };
        }
    };
    if !is_trial {
        return place.take(arrival).map(Some);
    }
    let controller = Controller::new()?;
    let answered = match controller.configure(place.config) {
        Ok(()) => arrival.answer_trial(&controller),
        Err(error) => {
            arrival.refuse(&error.to_string());
            Err(error)
        }
    };
    if let Err(error) = answered {
        say(format_args!("a machine could not run here: {error}"));
    }
    Ok(None)
}

/// What a machine that is offered is to be here.
struct Place {
    config: MachineConfig,
    named: Option<NamedPlace>,
}

/// What a machine that is offered is to be among the named machines.
struct NamedPlace {
    name: MachineName,
    definition: Option<Definition>,
    /// What it is at its next start.
    next: MachineConfig,
}

impl Place {
    fn of(args: &MigrateArgs, arrival: &Arrival) -> anyhow::Result<Place> {
        let mut config = arrival.config().clone();
        args.ends.apply(&mut config)?;
        if args.control.is_some() {
            return Ok(Place {
                config,
                named: None,
            });
        }
        let definition = arrival.note().map(Definition::parse).transpose()?;
        let own_name = definition.as_ref().map(|it| &it.name);
        let Some(name) = args.name.as_ref().or(own_name).cloned() else {
            if !matches!(args.receive, Some(ReceivingEnd::Address(_))) {
                bail!(
                    "a machine without a name cannot arrive by TLS or standard input and output; name it (--name)"
                );
            }
            return Ok(Place {
                config,
                named: None,
            });
        };
        Manager::of_user()?.require_free(&name)?;
        let next = match &definition {
            Some(definition) => {
                let mut next = definition.config()?;
                args.ends.apply(&mut next)?;
                next
            }
            None => config.clone(),
        };
        let named = Some(NamedPlace {
            name,
            definition,
            next,
        });
        Ok(Place { config, named })
    }

    fn take(self, arrival: Arrival) -> anyhow::Result<Received> {
        let Some(named) = self.named else {
            return Ok(Received::Machine(Box::new(arrival), Box::new(self.config)));
        };
        let expected = Manager::of_user()?.expect_arrival(
            &named.name,
            named.definition.as_ref(),
            self.config,
            &named.next,
        );
        match expected {
            Ok(expected) => Ok(Received::Named(expected.receive(arrival)?)),
            Err(error) => {
                arrival.refuse(&error.to_string());
                Err(error.into())
            }
        }
    }
}

/// Where connections of sources are waited for.
enum Listener {
    /// The socket is removed from the file system with this.
    Unix {
        _socket: ListeningSocket,
        listener: UnixListener,
    },
    Tcp(TcpListener),
}

impl Listener {
    fn bind(address: &MigrationAddress) -> anyhow::Result<Listener> {
        let failed = || format!("cannot listen on '{address}'");
        let listener = match address {
            MigrationAddress::Unix(path) => {
                let socket = ListeningSocket::bind_private(path).with_context(failed)?;
                let listener = socket.try_clone_listener().with_context(failed)?;
                listener.set_nonblocking(false).with_context(failed)?;
                Listener::Unix {
                    _socket: socket,
                    listener,
                }
            }
            MigrationAddress::Tcp(place) => {
                Listener::Tcp(TcpListener::bind(place).with_context(failed)?)
            }
        };
        if let (Listener::Tcp(listener), MigrationAddress::Tcp(place)) = (&listener, address)
            && place.ends_with(":0")
        {
            let address = listener.local_addr()?;
            say(format_args!("waiting at tcp://{address}"));
        }
        Ok(listener)
    }

    /// Waits for a connection for some time.
    fn accept_within(&self, time: Duration) -> anyhow::Result<OwnedFd> {
        let descriptor = match self {
            Listener::Unix { listener, .. } => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        };
        let mut waiting = [PollFd::new(descriptor, PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::try_from(time)?)? {
            0 => bail!("none has come within {time:?}"),
            _ => Ok(self.accept()?),
        }
    }

    fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Listener::Unix { listener, .. } => Ok(listener.accept()?.0.into()),
            Listener::Tcp(listener) => Ok(listener.accept()?.0.into()),
        }
    }
}
