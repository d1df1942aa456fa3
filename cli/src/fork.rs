//! `bantam fork`: starts machines that go on from where another is.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bantam_control::ControlClient;
use bantam_vmm::config::SerialConfig;
use bantam_vmm::{Answer, Command, SnapshotDescription, SnapshotFiles, State};

use crate::message::say;
use crate::snapshot::take_into;

/// How long a child may take to run.
const START_TIME: Duration = Duration::from_secs(30);
const START_INTERVAL: Duration = Duration::from_millis(1);

/// The options of `bantam fork`.
#[derive(Debug, clap::Args)]
pub struct ForkArgs {
    /// The control socket that the machine was started with (--control)
    pub socket: PathBuf,

    /// Directory for the snapshot, and for a folder of each child: 1, 2, ...
    ///
    /// A child's folder has its control socket (control.sock), the output of its serial port (serial.log), its
    /// own messages (log), its overlays, and the sockets of its socket device (vsock.sock) and of its channels
    /// (channel-NAME.sock).
    pub directory: PathBuf,

    /// Number of children
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,

    /// Tap for a network device of each child, with {} for its number; can be given more than once
    #[arg(long = "net", value_name = "NAME=TAP")]
    pub nets: Vec<String>,
}

/// Executes `bantam fork`.
pub fn fork(args: &ForkArgs) -> anyhow::Result<()> {
    let directory = &args.directory;
    for number in 1..=args.count {
        let folder = directory.join(number.to_string());
        if folder.exists() {
            bail!(
                "cannot fork into '{}': there is a child '{}' already; choose another directory",
                directory.display(),
                folder.display()
            );
        }
    }
    take_into(&args.socket, directory)?;
    let directory = fs::canonicalize(directory)
        .with_context(|| format!("cannot find '{}'", directory.display()))?;
    let snapshot = SnapshotDescription::read(&SnapshotFiles::in_directory(&directory))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut children = Vec::new();
    for number in 1..=args.count {
        let folder = directory.join(number.to_string());
        children.push(start(
            &program, &directory, &folder, &snapshot, args, number,
        )?);
    }
    let deadline = Instant::now() + START_TIME;
    let mut failed = 0;
    for (number, (mut child, folder)) in (1..).zip(children) {
        let socket = folder.join("control.sock");
        match await_running(&mut child, &socket, deadline) {
            Ok(()) => say(format_args!(
                "child {number}: process {}, {}",
                child.id(),
                socket.display()
            )),
            Err(error) => {
                failed += 1;
                say(format_args!("child {number}: {error:#}"));
            }
        }
    }
    match failed {
        0 => Ok(()),
        count => bail!("{count} of {} children do not run", args.count),
    }
}

/// Starts a child in the background.
fn start(
    program: &Path,
    directory: &Path,
    folder: &Path,
    snapshot: &SnapshotDescription,
    args: &ForkArgs,
    number: u16,
) -> anyhow::Result<(Child, PathBuf)> {
    fs::create_dir(folder).with_context(|| format!("cannot create '{}'", folder.display()))?;
    let place = |name: &str| folder.join(name);
    let log = File::create(place("log"));
    let log = log.with_context(|| format!("cannot create '{}'", place("log").display()))?;
    let file = |name: &str| {
        let mut end = std::ffi::OsString::from("file=");
        end.push(place(name));
        end
    };
    let mut process = Process::new(program);
    process.arg("restore").arg(directory);
    process.arg("--overlays").arg(place("overlays"));
    process.arg("--control").arg(place("control.sock"));
    process.arg("--serial").arg(file("serial.log"));
    if snapshot.config.console != SerialConfig::None {
        process.arg("--console").arg(file("console.log"));
    }
    for channel in &snapshot.config.channels {
        let mut end = std::ffi::OsString::from(format!("{}=socket=", channel.name));
        end.push(place(&format!("channel-{}.sock", channel.name)));
        process.arg("--channel").arg(end);
    }
    if snapshot.config.vsock.is_some() {
        process.arg("--vsock").arg(place("vsock.sock"));
    }
    for net in &args.nets {
        let tap = net.replace("{}", &number.to_string());
        process.arg("--net").arg(tap);
    }
    process
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // So that keys at this terminal do not end it.
    process.process_group(0);
    let child = process.spawn().context("cannot start a child")?;
    Ok((child, folder.to_path_buf()))
}

/// Waits until the child runs.
fn await_running(child: &mut Child, socket: &Path, deadline: Instant) -> anyhow::Result<()> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for it")? {
            let log = fs::read_to_string(socket.with_file_name("log")).unwrap_or_default();
            match log.lines().last() {
                Some(line) => bail!("{}", line.trim_start_matches("error: ")),
                None => bail!("it has ended: {status}"),
            }
        }
        if let Ok(mut client) = ControlClient::connect(socket)
            && let Ok(Answer::State(State::Running)) = client.execute(Command::Query)
        {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("it does not run after {} s", START_TIME.as_secs());
        }
        thread::sleep(START_INTERVAL);
    }
}
