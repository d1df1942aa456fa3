//! `bantam fork`: starts machines that go on from where another is.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child as Process, Command as Program, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bantam_control::ControlClient;
use bantam_vmm::config::{GuestCid, MachineConfig, SerialConfig};
use bantam_vmm::{Answer, Command, Event, Snapshot, SnapshotDisks, State};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::control::connect;
use crate::ends;
use crate::message::say;

/// How long the machine may take to copy its memory.
const COPY_TIME: Duration = Duration::from_secs(60 * 60);
/// How long a child may take to run.
const START_TIME: Duration = Duration::from_secs(30);
/// How often it is seen whether a child has its control socket yet.
const START_INTERVAL: Duration = Duration::from_millis(1);

// The options of `bantam fork`.
#[derive(Debug, clap::Args)]
pub struct ForkArgs {
    /// The control socket that the machine was started with (--control)
    pub socket: PathBuf,

    /// Directory for a folder of each child: 1, 2, ...
    ///
    /// A child's folder has its control socket (control.sock), the output of its serial port (serial.log), its
    /// own messages (log), its overlays, and the sockets of its socket device (vsock.sock) and of its channels
    /// (channel-NAME.sock).
    pub directory: PathBuf,

    /// Number of children
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,

    /// Tap for a network device of each child, with {} for its number; can be given more than once
    ///
    /// The guest has another MAC address from when its driver starts again: when it reboots, for example.
    #[arg(long = "net", value_name = "NAME=TAP[,mac=MAC]")]
    pub nets: Vec<String>,

    /// Context identifier of the first child's guest; each of the others has the next one
    #[arg(long, value_name = "N", value_parser = ends::cid)]
    pub cid: Option<GuestCid>,
}

/// What all children have in common.
struct Fork<'a> {
    args: &'a ForkArgs,
    program: PathBuf,
    directory: PathBuf,
    config: MachineConfig,
    /// Those of the snapshot, which each child inherits.
    descriptors: Vec<OwnedFd>,
}

/// A machine that has been started.
struct Child {
    number: u16,
    folder: PathBuf,
    process: Process,
    deadline: Instant,
}

/// Executes `bantam fork`.
pub fn fork(args: &ForkArgs) -> anyhow::Result<()> {
    for number in 1..=args.count {
        let folder = args.directory.join(number.to_string());
        if folder.exists() {
            bail!(
                "cannot fork into '{}': there is a child '{}' already; choose another directory",
                args.directory.display(),
                folder.display()
            );
        }
    }
    let fork = Fork::of_machine(args)?;
    let mut children = Vec::new();
    let Err(error) = fork.start_all(&mut children) else {
        return Ok(());
    };
    if children.is_empty() {
        return Err(error);
    }
    for child in children {
        child.remove();
    }
    Err(error.context("cannot start all children, so those that were started have been ended"))
}

impl<'a> Fork<'a> {
    /// Has the machine fork.
    fn of_machine(args: &'a ForkArgs) -> anyhow::Result<Fork<'a>> {
        let directory = &args.directory;
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create '{}'", directory.display()))?;
        let directory = fs::canonicalize(directory)
            .with_context(|| format!("cannot find '{}'", directory.display()))?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut client = connect(&args.socket)?;
        client.set_answer_time(COPY_TIME);
        let Answer::Forked(forked) = client.execute(Command::Fork(SnapshotDisks::Overlays))? else {
            bail!("the machine gives another answer than that of a fork");
        };
        let received = forked.snapshot.0.iter();
        let descriptors: Result<Vec<_>, _> = received.map(|it| it.try_clone()).collect();
        let descriptors = descriptors.context("cannot keep the snapshot")?;
        let own = descriptors.iter().map(OwnedFd::try_clone);
        let own: Result<Vec<_>, _> = own.collect();
        let snapshot = Snapshot::from_descriptors(own.context("cannot keep the snapshot")?)?;
        for descriptor in &descriptors {
            let inherits = FcntlArg::F_SETFD(FdFlag::empty());
            fcntl(descriptor, inherits).context("cannot pass on the snapshot")?;
        }
        Ok(Fork {
            args,
            program,
            directory,
            config: snapshot.config().clone(),
            descriptors,
        })
    }

    /// Starts all children, and adds them to `children`. Returns when they run.
    fn start_all(&self, children: &mut Vec<Child>) -> anyhow::Result<()> {
        // More at a time would only wait for each other.
        let limit = 2 * thread::available_parallelism().map_or(1, usize::from);
        let mut starting = VecDeque::new();
        let await_next = |starting: &mut VecDeque<usize>, children: &mut Vec<Child>| {
            let index = starting.pop_front();
            match index.and_then(|index| children.get_mut(index)) {
                Some(child) => child.await_running(),
                None => Ok(()),
            }
        };
        for number in 1..=self.args.count {
            if starting.len() == limit {
                await_next(&mut starting, children)?;
            }
            starting.push_back(children.len());
            children.push(self.start(number)?);
        }
        while !starting.is_empty() {
            await_next(&mut starting, children)?;
        }
        Ok(())
    }

    /// Starts a child in the background.
    fn start(&self, number: u16) -> anyhow::Result<Child> {
        let folder = self.directory.join(number.to_string());
        fs::create_dir(&folder).with_context(|| format!("cannot create '{}'", folder.display()))?;
        let started = self.start_in(number, &folder);
        if started.is_err() {
            remove_folder(&folder);
        }
        Ok(Child {
            number,
            process: started.with_context(|| format!("cannot start child {number}"))?,
            folder,
            deadline: Instant::now() + START_TIME,
        })
    }

    fn start_in(&self, number: u16, folder: &Path) -> anyhow::Result<Process> {
        let place = |name: &str| folder.join(name);
        let log = File::create(place("log"));
        let log = log.with_context(|| format!("cannot create '{}'", place("log").display()))?;
        let file = |name: &str| {
            let mut end = OsString::from("file=");
            end.push(place(name));
            end
        };
        let numbers: Vec<_> = self
            .descriptors
            .iter()
            .map(|it| it.as_raw_fd().to_string())
            .collect();
        let mut program = Program::new(&self.program);
        program.arg("restore").arg(&self.directory);
        program.arg("--descriptors").arg(numbers.join(","));
        program.arg("--overlays").arg(place("overlays"));
        program.arg("--control").arg(place("control.sock"));
        program.arg("--serial").arg(file("serial.log"));
        if self.config.console != SerialConfig::None {
            program.arg("--console").arg(file("console.log"));
        }
        for channel in &self.config.channels {
            let mut end = OsString::from(format!("{}=socket=", channel.name));
            end.push(place(&format!("channel-{}.sock", channel.name)));
            program.arg("--channel").arg(end);
        }
        if self.config.vsock.is_some() {
            program.arg("--vsock").arg(place("vsock.sock"));
        }
        if let Some(first) = self.args.cid {
            let cid = u64::from(first.get()) + u64::from(number) - 1;
            program.arg("--cid").arg(cid.to_string());
        }
        for net in &self.args.nets {
            program
                .arg("--net")
                .arg(net.replace("{}", &number.to_string()));
        }
        program
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // So that keys at this terminal do not end it.
        program.process_group(0);
        program.spawn().context("cannot start a process")
    }
}

impl Child {
    /// Waits until the child runs, or has run.
    fn await_running(&mut self) -> anyhow::Result<()> {
        let number = self.number;
        let runs = self
            .try_await_running()
            .with_context(|| format!("child {number} does not run"))?;
        match runs {
            true => say(format_args!(
                "child {number}: process {}, {}",
                self.process.id(),
                self.socket().display()
            )),
            false => say(format_args!("child {number}: its guest has ended already")),
        }
        Ok(())
    }

    /// Returns `false` if the child has run, but not for long.
    fn try_await_running(&mut self) -> anyhow::Result<bool> {
        loop {
            let client = ControlClient::connect(&self.socket());
            if client.is_ok_and(|mut client| self.await_state(&mut client).is_ok()) {
                return Ok(true);
            }
            if self.has_ended()? {
                return Ok(false);
            }
            thread::sleep(START_INTERVAL);
        }
    }

    fn await_state(&self, client: &mut ControlClient) -> anyhow::Result<()> {
        client.subscribe()?;
        if client.execute(Command::Query)? == Answer::State(State::Running) {
            return Ok(());
        }
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match client.next_event(Some(left))? {
                Some(Event::State {
                    state: State::Running,
                }) => return Ok(()),
                Some(_) => {}
                None => bail!("there are no more events"),
            }
        }
    }

    /// Returns whether the child's guest has ended.
    ///
    /// # Errors
    /// If the child has failed, or its time is over.
    fn has_ended(&mut self) -> anyhow::Result<bool> {
        if let Some(status) = self.process.try_wait().context("cannot wait for it")? {
            let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            let last = log.lines().last().unwrap_or_default();
            if let Some(error) = last.strip_prefix("error: ") {
                bail!("{}", error.to_owned());
            }
            if status.code().is_none() {
                bail!("it was killed: {status}");
            }
            return Ok(true);
        }
        if Instant::now() > self.deadline {
            bail!("it is not ready after {} s", START_TIME.as_secs());
        }
        Ok(false)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    /// Ends the child, and removes its folder.
    fn remove(mut self) {
        // It fails if the child has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
        remove_folder(&self.folder);
    }
}

fn remove_folder(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        say(format_args!(
            "cannot remove '{}': {error}",
            folder.display()
        ));
    }
}
