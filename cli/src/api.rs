//! `bantam api`: a machine that clients of an API configure, start and change.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use bantam_api::bodies::logger::Logger;
use bantam_api::bodies::metrics::Metrics;
use bantam_api::{
    API_VERSION, Configuration, InstanceOptions, ProgramLog, Request, Server, ServerLimits,
    new_instance, parse_json, parse_value,
};
use bantam_jail::{Files, Networks};
use bantam_vmm::config::{Seccomp, read_text_file};
use bantam_vmm::{Controller, ControllerOptions, ListeningSocket};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::Value;

use crate::args::ApiArgs;
use crate::confine::{self, Confinement};
use crate::console::{OUTPUT_LIMIT_AFTER_STOP, StdioConsole};
use crate::control::{self, Control};
use crate::log;
use crate::main_loop::{Awaited, EndedBy, attend, await_end, await_start};
use crate::process_times::ProcessTimes;
use crate::signals::Signals;
use crate::stopping;

/// How long the thread of the API may take to end: longer than the time that it gives its clients.
const API_END_TIME: Duration = Duration::from_secs(2);

/// How long the end may wait for an API that is only being prepared.
const API_START_TIME: Duration = Duration::from_millis(500);

/// Serves the API until the machine has ended or the user wants the program to end.
pub fn serve(args: &ApiArgs) -> anyhow::Result<()> {
    let mut program_log = log::adjustable(&args.id);
    program_log.set(&args.logger())?;
    tracing::info!("Bantam {}, API {API_VERSION}", env!("CARGO_PKG_VERSION"));
    if args.seccomp_filter.is_some() {
        tracing::info!("--seccomp-filter has no effect: Bantam has filters of its own");
    }
    // Before signals are diverted, so that one ends the process even if the host does not answer.
    let control = args.control.as_deref().map(control::listen).transpose()?;
    let signals = Signals::block().context("cannot divert signals")?;
    let mut console = StdioConsole::new()?;
    let served = serve_instance(args, program_log.clone(), &signals, &mut console, control);
    // An error must not wait for a reader that may never return.
    let ends_soon = stopping::is_asked() || served.is_err();
    let limit = ends_soon.then(|| stopping::time_left(OUTPUT_LIMIT_AFTER_STOP));
    console.finish(&signals, limit);
    program_log.flush();
    served.map(|_| ())
}

/// What a process that serves the API can give up. Its clients can name any file, and make any network device that the API has,
/// while it runs.
pub fn confinement(args: &ApiArgs) -> Confinement {
    Confinement {
        seccomp: match args.no_seccomp {
            true => Seccomp::Off,
            false => args.seccomp,
        },
        networks: Networks {
            // Clients of the control socket can have the machine moved.
            program: args.control.is_some(),
            interfaces: true,
            streams: true,
            sockets: true,
            ..Networks::default()
        },
        files: args.landlock.then(Files::all),
        coredump: args.coredump,
        is_visible: args.coredump,
        with_places: None,
    }
}

fn serve_instance(
    args: &ApiArgs,
    program_log: log::AdjustableLog,
    signals: &Signals,
    console: &mut StdioConsole,
    control: Option<ListeningSocket>,
) -> anyhow::Result<EndedBy> {
    let controller = Controller::with(ControllerOptions {
        thread_hook: confine::thread_hook(),
        ..ControllerOptions::default()
    })?;
    let control = control
        .map(|socket| Control::start(socket, controller.clone()))
        .transpose()?;
    let machine_console = console
        .for_machine()
        .context("cannot pass the serial console to the machine")?;
    controller.set_console(machine_console)?;
    let started = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .context("cannot create an event")?;
    let started = Arc::new(started);
    let (serving, served) = mpsc::channel();
    let (ready, prepared) = mpsc::channel();
    thread::Builder::new()
        .name("bantam-api".into())
        .spawn({
            let (args, controller) = (args.clone(), controller.clone());
            let started = started.clone();
            move || {
                // Here, so that a signal ends the process even if the host does not answer.
                let result = prepare(&args, program_log, &controller, &started);
                let result = result.and_then(|server| {
                    // It fails if the process ends without waiting for this.
                    let _ = ready.send(server.ending());
                    Ok(server.run()?)
                });
                // No client could reach the machine any more.
                controller.stop();
                // It fails if the process ends without waiting for this.
                let _ = serving.send(result);
            }
        })
        .context("cannot start the thread of the API")?;
    let timeout = args.shutdown_timeout.get();
    let ended = attend_instance(&controller, signals, console, &started, timeout);
    let ended = ended.map(|by| control.as_ref().map_or(by, |control| control.ended_by(by)));
    if !matches!(ended, Ok(EndedBy::Guest)) {
        controller.stop();
    }
    // The machine ends meanwhile.
    let _ = controller.wait_within(Duration::ZERO);
    if let Ok(ending) = prepared.recv_timeout(stopping::time_left(API_START_TIME)) {
        ending.notify_one();
    }
    let served = served.recv_timeout(stopping::time_left(API_END_TIME));
    let reason = await_end(&controller, signals, Some(console))?;
    if let Some(control) = control {
        control.end();
    }
    match served {
        Ok(served) => served?,
        // The process ends now in any case.
        Err(RecvTimeoutError::Timeout) => tracing::warn!("the API has not ended in time"),
        Err(RecvTimeoutError::Disconnected) => {
            bail!("the API has failed: this is a bug, please report it with the log")
        }
    }
    if let Some(reason) = reason {
        tracing::info!("the machine has ended: {reason}");
    }
    ended
}

/// Makes the instance that the options describe, starts its machine if they have one, and returns a server
/// of its API.
fn prepare(
    args: &ApiArgs,
    program_log: log::AdjustableLog,
    controller: &Controller,
    started: &Arc<EventFd>,
) -> anyhow::Result<Server> {
    let mut instance = new_instance(
        controller.clone(),
        InstanceOptions {
            id: args.id.clone(),
            log: Box::new(program_log),
            log_path: args.log_path.clone(),
            startup_times: ProcessTimes {
                start_us: args.start_time_us,
                start_cpu_us: args.start_time_cpu_us,
                parent_cpu_us: args.parent_cpu_time_us,
            }
            .until_now(),
            on_start: Box::new({
                let started = started.clone();
                move || {
                    // It fails only if the counter is full, and then the event is readable anyway.
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
        let metrics = Metrics {
            metrics_path: path.clone(),
        };
        Request::from(metrics).execute(&mut instance)?;
    }
    if let Some(path) = &args.metadata {
        instance.put_metadata(read_metadata(path)?)?;
    }
    if let Some(path) = &args.config_file {
        let what = "configuration file";
        let configuration: Configuration = parse_json(read_file(what, path)?.as_bytes())
            .with_context(|| format!("cannot use {what} '{}'", path.display()))?;
        instance.configure(configuration)?;
    }
    // No guest must run that no client could reach.
    let listener = match args.no_api {
        true => None,
        false => Some(listen(&args.api_sock)?),
    };
    if args.config_file.is_some() {
        instance.start()?;
    }
    let limits = ServerLimits {
        body_size: args.http_api_max_payload_size,
        ..ServerLimits::default()
    };
    Ok(Server::new(instance, listener, limits))
}

fn listen(path: &Path) -> anyhow::Result<ListeningSocket> {
    ListeningSocket::bind(path).with_context(|| {
        format!(
            "cannot listen on '{}' for the API (--api-sock)",
            path.display()
        )
    })
}

fn attend_instance(
    controller: &Controller,
    signals: &Signals,
    console: &mut StdioConsole,
    started: &EventFd,
    shutdown_timeout: Duration,
) -> anyhow::Result<EndedBy> {
    let (console, stop) = match await_start(controller, signals, started.as_fd())? {
        Awaited::Started => {
            console.input.enter_terminal()?;
            (Some(console), None)
        }
        Awaited::Stop(signal) => (None, Some(signal)),
        Awaited::Ended => return Ok(EndedBy::Guest),
    };
    attend(controller, signals, console, shutdown_timeout, false, stop)
}

/// Reads a file with metadata for a guest, in JSON.
pub fn read_metadata(path: &Path) -> anyhow::Result<Value> {
    let what = "metadata file";
    parse_value(read_file(what, path)?.as_bytes())
        .with_context(|| format!("cannot use {what} '{}'", path.display()))
}

fn read_file(what: &str, path: &Path) -> anyhow::Result<String> {
    read_text_file(path).with_context(|| format!("cannot read {what} '{}'", path.display()))
}

impl ApiArgs {
    /// The settings of the log on the command line.
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
