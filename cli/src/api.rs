//! `bantam api`: a machine that is put together, started and changed by clients of an API.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, bail};
use bantam_api::resources::{Logger, Metrics};
use bantam_api::{
    API_VERSION, Configuration, Instance, InstanceOptions, ProcessTimes, ProgramLog, Request,
    Server, ServerLimits, parse_json,
};
use bantam_vmm::Controller;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::args::ApiArgs;
use crate::attend::{EndedBy, attend, await_start};
use crate::console::StdioConsole;
use crate::log;
use crate::run::OUTPUT_LIMIT_AFTER_STOP;
use crate::signals::Signals;

/// Most bytes of a configuration or metadata file.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// Serves the API until the machine has ended or the user wants the program to end.
pub fn serve(args: &ApiArgs) -> anyhow::Result<()> {
    let mut program_log = log::adjustable(&args.id);
    program_log.set(&args.logger())?;
    tracing::info!("Bantam {}, API {API_VERSION}", env!("CARGO_PKG_VERSION"));
    for (given, option) in [
        (args.seccomp_filter.is_some(), "--seccomp-filter"),
        (args.no_seccomp, "--no-seccomp"),
    ] {
        if given {
            tracing::info!("{option} has no effect: there is no seccomp filter yet");
        }
    }
    let signals = Signals::block().context("cannot divert signals")?;
    let mut console = StdioConsole::new()?;
    let served = serve_instance(args, program_log, &signals, &mut console);
    let limit = matches!(served, Ok(EndedBy::User)).then_some(OUTPUT_LIMIT_AFTER_STOP);
    console.finish(&signals, limit);
    served.map(|_| ())
}

fn serve_instance(
    args: &ApiArgs,
    program_log: log::AdjustableLog,
    signals: &Signals,
    console: &mut StdioConsole,
) -> anyhow::Result<EndedBy> {
    let controller = Controller::new()?;
    let started = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .context("cannot create an event")?;
    let started = Arc::new(started);
    let mut instance = Instance::new(
        controller.clone(),
        InstanceOptions {
            id: args.id.clone(),
            console: console
                .for_machine()
                .context("cannot pass the serial console to the machine")?,
            log: Box::new(program_log),
            process_times: ProcessTimes {
                start_us: args.start_time_us,
                start_cpu_us: args.start_time_cpu_us,
                parent_cpu_us: args.parent_cpu_time_us,
            },
            on_start: Box::new({
                let started = started.clone();
                move || {
                    // It fails only when the counter is full, and then it is readable as wanted.
                    let _ = started.write(1);
                }
            }),
            boot_timer: args.boot_timer,
            metadata_size: args
                .mmds_size_limit
                .unwrap_or(args.http_api_max_payload_size),
        },
    );
    if let Some(path) = &args.metrics_path {
        instance.execute(Request::PutMetrics(Metrics {
            metrics_path: path.clone(),
        }))?;
    }
    if let Some(path) = &args.metadata {
        let what = "metadata file";
        let contents = parse_json(&read_file(what, path)?)
            .with_context(|| format!("cannot use {what} '{}'", path.display()))?;
        instance.put_metadata(contents)?;
    }
    if let Some(path) = &args.config_file {
        let what = "configuration file";
        let configuration: Configuration = parse_json(&read_file(what, path)?)
            .with_context(|| format!("cannot use {what} '{}'", path.display()))?;
        instance.configure(configuration)?;
        instance.start()?;
    }
    let socket = (!args.no_api).then_some(args.api_sock.as_path());
    let limits = ServerLimits {
        body_size: args.http_api_max_payload_size,
        ..ServerLimits::default()
    };
    let server = Server::new(instance, socket, limits)?;
    let ending = server.ending();
    let serving = thread::Builder::new()
        .name("bantam-api".into())
        .spawn({
            let controller = controller.clone();
            move || {
                let served = server.run();
                // Nobody could speak to the machine any more.
                controller.stop();
                served
            }
        })
        .context("cannot start the thread of the API")?;
    let ended = attend_instance(&controller, signals, console, &started);
    if !matches!(ended, Ok(EndedBy::Guest)) {
        controller.stop();
    }
    ending.notify_one();
    let served = serving.join();
    let reason = controller.wait()?;
    tracing::info!("the machine has ended: {reason:?}");
    match served {
        Ok(served) => served?,
        Err(_) => bail!("the API has failed: this is a bug, please report it with the log"),
    }
    ended
}

fn attend_instance(
    controller: &Controller,
    signals: &Signals,
    console: &mut StdioConsole,
    started: &EventFd,
) -> anyhow::Result<EndedBy> {
    if let Some(ended) = await_start(controller, signals, started.as_fd())? {
        return Ok(ended);
    }
    console.input.enter_terminal()?;
    attend(controller, signals, Some(console), false)
}

fn read_file(what: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = || {
        // Without waiting for what it may be instead: a pipe that nobody writes to.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes)?;
        anyhow::ensure!(
            bytes.len() as u64 <= MAX_FILE_SIZE,
            "it is larger than 1 MiB"
        );
        Ok(bytes)
    };
    read().with_context(|| format!("cannot read {what} '{}'", path.display()))
}

impl ApiArgs {
    /// What the command line says of the log.
    fn logger(&self) -> Logger {
        Logger {
            log_path: self.log_path.clone(),
            level: self.level,
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        }
    }
}
