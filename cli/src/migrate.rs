//! `bantam migrate`: moves a machine to another process or host, and receives one.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use bantam_vmm::config::{MachineConfig, ShutdownTimeout};
use bantam_vmm::{
    Answer, Arrival, AtTimeout, Command, ListeningSocket, Migrated, MigrationAddress,
    MigrationConnection, MigrationOptions, MigrationOrder,
};
use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::args::EndArgs;
use crate::control::{Output, connect};
use crate::message::say;

// The options of `bantam migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The machine: the control socket that it was started with (--control), or its name
    #[arg(required_unless_present = "receive")]
    pub machine: Option<PathBuf>,

    /// Where it is received: unix:PATH or tcp://HOST:PORT
    #[arg(
        required_unless_present_any = ["receive", "cancel", "take_back"],
        value_parser = address_parser(),
    )]
    pub destination: Option<MigrationAddress>,

    /// Wait for a machine at ADDRESS, unix:PATH or tcp://HOST:PORT, and run it
    #[arg(
        long,
        value_name = "ADDRESS",
        value_parser = address_parser(),
        conflicts_with_all = ["machine", "destination", "cancel", "take_back", "downtime", "timeout", "at_timeout"],
    )]
    pub receive: Option<MigrationAddress>,

    /// For how long the guest should stand still at most
    #[arg(long, value_name = "TIME", default_value = "50ms")]
    pub downtime: ShutdownTimeout,

    /// How long the machine may run while its memory is copied
    #[arg(long, value_name = "TIME", default_value = "2m")]
    pub timeout: ShutdownTimeout,

    /// What is done when that time is over, as the guest writes faster than its memory is copied
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub at_timeout: TimeoutAction,

    /// Let the memory cross a network where others can read and change it
    ///
    /// Otherwise ADDRESS has to be a Unix socket or a loopback address, such as the end of a tunnel of ssh.
    #[arg(long)]
    pub insecure: bool,

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

    /// Unix socket by which other programs control the machine that is received, as for bantam run
    #[arg(long, value_name = "PATH", requires = "receive")]
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

fn address_parser() -> impl TypedValueParser<Value = MigrationAddress> {
    OsStringValueParser::new().try_map(|text| MigrationAddress::parse(OsStr::new(&text)))
}

/// Executes `bantam migrate` for a machine that runs.
pub fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    let machine = args.machine.as_deref().context("no machine is named")?;
    if !args.ends.is_empty() {
        bail!(
            "disks, taps and other ends are those of the receiver: name them there, with --receive"
        );
    }
    let mut client = connect(machine)?;
    if args.cancel {
        client.execute(Command::CancelMigration)?;
        return Ok(());
    }
    if args.take_back {
        client.execute(Command::TakeBack)?;
        return Ok(());
    }
    let destination = args.destination.clone();
    let order = MigrationOrder {
        destination: destination
            .context("no destination is named")?
            .looked_up()?,
        insecure: args.insecure,
        options: MigrationOptions {
            downtime: args.downtime.get(),
            timeout: args.timeout.get(),
            at_timeout: match args.at_timeout {
                TimeoutAction::Cancel => AtTimeout::Cancel,
                TimeoutAction::Stop => AtTimeout::Stop,
            },
        },
    };
    client.set_answer_time(Duration::MAX);
    let Answer::Migrated(migrated) = client.execute(Command::Migrate(Box::new(order)))? else {
        bail!("the machine gives another answer than that of a migration");
    };
    let text = match args.output {
        Output::Human => describe(&migrated),
        Output::Json => serde_json::to_string(&migrated)?,
    };
    writeln!(io::stdout().lock(), "{text}").context("cannot write to standard output")
}

fn describe(migrated: &Migrated) -> String {
    format!(
        "moved in {:.2} s: the guest stood still for {:.1} ms; {:.1} MiB of memory in {} rounds",
        migrated.time.as_secs_f64(),
        migrated.downtime.as_secs_f64() * 1000.0,
        migrated.sent as f64 / f64::from(1 << 20),
        migrated.rounds,
    )
}

/// Waits for a machine at `address`, and returns it with its configuration at this end.
pub fn receive(
    args: &MigrateArgs,
    address: &MigrationAddress,
) -> anyhow::Result<(Arrival, MachineConfig)> {
    if !args.insecure && !address.is_local() {
        bail!(
            "cannot receive a machine at '{address}': anyone who reaches it there could send one, and read its memory; \
             listen on 127.0.0.1 and use a tunnel such as 'ssh -L', or allow it (--insecure)"
        );
    }
    let arrival = Arrival::new(MigrationConnection::new(accept(address)?)?)?;
    let mut config = arrival.config().clone();
    match args.ends.apply(&mut config) {
        Ok(()) => Ok((arrival, config)),
        Err(error) => {
            arrival.refuse(&crate::reason(&error));
            Err(error)
        }
    }
}

/// Waits for a connection.
fn accept(address: &MigrationAddress) -> anyhow::Result<OwnedFd> {
    let failed = || format!("cannot listen on '{address}'");
    match address {
        MigrationAddress::Unix(path) => {
            let socket = ListeningSocket::bind_private(path).with_context(failed)?;
            let listener = socket.try_clone_listener().with_context(failed)?;
            listener.set_nonblocking(false).with_context(failed)?;
            Ok(listener.accept().with_context(failed)?.0.into())
        }
        MigrationAddress::Tcp(place) => {
            let listener = TcpListener::bind(place).with_context(failed)?;
            let address = listener.local_addr().with_context(failed)?;
            if place.ends_with(":0") {
                say(format_args!("waiting at tcp://{address}"));
            }
            Ok(listener.accept().with_context(failed)?.0.into())
        }
    }
}
