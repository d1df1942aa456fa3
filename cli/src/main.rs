//! Bantam, a KVM virtual machine monitor: the command line.

mod api;
mod args;
mod check;
mod confine;
mod console;
mod control;
mod default_kernel;
mod ends;
mod escape;
mod exit_status;
mod fork;
mod generated_docs;
#[cfg(target_env = "gnu")]
mod heap;
mod image;
mod jailer;
mod local_time;
mod log;
mod main_loop;
mod message;
mod migrate;
mod named;
mod network;
mod outlet;
mod own_code;
mod place_keeper;
mod process_times;
mod restart;
mod restore;
mod run;
mod signals;
mod snapshot;
mod stopping;
mod terminal;
mod virsh;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use bantam_jail::Files;
use bantam_vmm::config::ExitStatus;
use bantam_vmm::text::without_error_numbers;
use clap::Parser;
use clap::error::ErrorKind;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::close;
use tracing::level_filters::LevelFilter;

use args::{Args, Command, FirecrackerArgs, RestoreArgs, RunArgs};
use confine::Confinement;
use image::QemuImgArgs;
use jailer::JailerArgs;
use message::say;
use migrate::{MigrateArgs, Received, ReceivingEnd};
use run::{Foreground, Origin};

fn main() -> ExitCode {
    #[cfg(target_env = "gnu")]
    heap::share_among_threads();
    let status = run_command();
    message::flush();
    status
}

fn run_command() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    let file_name = Path::new(&name).file_name().unwrap_or_default();
    if file_name == "jailer" {
        return match JailerArgs::try_parse() {
            Ok(args) if args.version => status_of(print_version_of("Jailer")),
            Ok(args) => status_of(jailer::enter(args).map(|never| match never {})),
            Err(error) => report_usage::<JailerArgs>(&error, ExitCode::FAILURE),
        };
    }
    // A jailer starts files with other names that contain this one, too.
    if file_name.to_string_lossy().contains("firecracker") {
        return match FirecrackerArgs::try_parse() {
            Ok(args) if args.version => status_of(print_version_of("Firecracker")),
            Ok(args) => execute(Command::Api(Box::new(args.api))),
            Err(error) => report_usage::<FirecrackerArgs>(&error, ExitCode::FAILURE),
        };
    }
    let arguments = image::prepare(std::env::args_os().collect());
    if image::is_qemu_img(&name) {
        return match QemuImgArgs::try_parse_from(arguments) {
            Ok(args) => image::run(args.image),
            Err(error) => report_usage::<QemuImgArgs>(&error, ExitCode::FAILURE),
        };
    }
    if virsh::is_virsh(&name) {
        return virsh::execute(std::env::args_os().skip(1).collect());
    }
    match Args::try_parse_from(arguments) {
        Ok(args) => execute(args.command),
        Err(error) => {
            let command = std::env::args_os().nth(1);
            let runs = command.is_some_and(|command| command == "run" || command == "restore");
            let failure = match runs {
                true => exit_status::of_error(ExitStatus::Guest),
                false => ExitCode::FAILURE,
            };
            report_usage::<Args>(&error, failure)
        }
    }
}

fn execute(command: Command) -> ExitCode {
    match command {
        Command::Run(args) => {
            raise_descriptor_limit();
            run(*args)
        }
        Command::Api(args) => {
            raise_descriptor_limit();
            let confined = api::confinement(&args).enter();
            status_of(
                confined
                    .and_then(|()| message::start())
                    .and_then(|()| api::serve(&args)),
            )
        }
        Command::Control(args) => status_of(control::control(*args)),
        Command::Restore(args) => {
            if let Some(restored) = named::restore(&args) {
                return status_of_machine(restored.map(|()| 0), ExitStatus::default());
            }
            raise_descriptor_limit();
            restore(&args)
        }
        Command::Fork(args) => status_of(fork::fork(&args)),
        Command::Migrate(args) => match &args.receive {
            Some(end) => {
                raise_descriptor_limit();
                receive(&args, end)
            }
            None => status_of(migrate::migrate(&args)),
        },
        Command::Snapshot(args) => status_of(snapshot::run(*args)),
        Command::Network(args) => status_of(message::start().and_then(|()| {
            log::to_stderr(args.log_level());
            network::run(*args)
        })),
        Command::Virsh(args) => virsh::run(args),
        Command::Nodeinfo => status_of(virsh::print_node_information()),
        Command::Check => status_of(check::check(&mut io::stdout().lock())),
        Command::Image(args) => image::run(*args),
        Command::Completions { shell } => status_of(generated_docs::print_completions(shell)),
        Command::Named(command) => named::execute(command),
        Command::Man { folder } => status_of(generated_docs::write_man_pages(&folder)),
    }
}

fn run(args: RunArgs) -> ExitCode {
    // Until the machine file is read, only the command line decides what a status means.
    let mut meaning = args.machine.exit_status.unwrap_or_default();
    log::to_stderr(args.log);
    let ended = (|| {
        let control = args.control.clone();
        let table = args.into_table()?;
        meaning = table.exit_status();
        let config = default_kernel::complete(table, false)?.into_config()?;
        if config.cgroup.is_some() {
            anyhow::bail!(
                "[cgroup] limits named machines (bantam create --config FILE); limit this command by systemd-run --scope"
            );
        }
        let files = control.is_none().then(Files::none);
        Confinement::of_machine(&config, files).enter()?;
        message::start()?;
        let owner = Foreground(config.on_reboot);
        run::run(&config, Origin::Boot, control.as_deref(), &owner)
    })();
    status_of_machine(ended, meaning)
}

fn restore(args: &RestoreArgs) -> ExitCode {
    let mut meaning = ExitStatus::default();
    log::to_stderr(args.log);
    let ended = (|| {
        let (snapshot, config) = restore::prepare(args)?;
        meaning = config.exit_status;
        let files = args.control.is_none();
        let files = files.then(|| Files::none().folder(&args.directory));
        Confinement::of_machine(&config, files).enter()?;
        message::start()?;
        let origin = Origin::Snapshot {
            snapshot: Arc::new(snapshot),
            paused: args.paused,
        };
        let owner = Foreground(config.on_reboot);
        run::run(&config, origin, args.control.as_deref(), &owner)
    })();
    status_of_machine(ended, meaning)
}

fn receive(args: &MigrateArgs, end: &ReceivingEnd) -> ExitCode {
    let mut meaning = ExitStatus::default();
    log::to_stderr(LevelFilter::WARN);
    let ended = (|| {
        let (arrival, config) = match migrate::receive(args, end)? {
            Received::Machine(arrival, config) => (arrival, *config),
            Received::Named(machine) => {
                let line = format!("machine '{}' has arrived", machine.name());
                match end {
                    ReceivingEnd::Address(_) | ReceivingEnd::Tls(_) => {
                        named::print(&(line + "\n"))?;
                    }
                    // Standard output is the connection.
                    ReceivingEnd::Stdio => say(format_args!("{line}")),
                }
                return Ok(0);
            }
            Received::Nothing => return Ok(0),
        };
        meaning = config.exit_status;
        let files = args.control.is_none().then(Files::none);
        Confinement::of_machine(&config, files).enter()?;
        message::start()?;
        let owner = Foreground(config.on_reboot);
        let origin = Origin::Arrival {
            arrival,
            settle: Box::new(|| Ok(())),
        };
        run::run(&config, origin, args.control.as_deref(), &owner)
    })();
    status_of_machine(ended, meaning)
}

fn status_of_machine(ended: anyhow::Result<u8>, meaning: ExitStatus) -> ExitCode {
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            report(&error);
            exit_status::of_error(meaning)
        }
    }
}

fn status_of(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Reports an error to the user, in one line.
fn report(error: &anyhow::Error) {
    message::say_last(format_args!("error: {}", reason(error)));
}

/// Whether an error is that nobody reads the output any more.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Closes all descriptors beside standard input, output and error, and `kept`. Nothing that this process has opened itself may
/// be used any more.
fn close_others(kept: &[RawFd]) {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<RawFd> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&number| number > 2 && !kept.contains(&number))
        .collect();
    for number in numbers {
        // The one by which the folder was read is closed already.
        let _ = close(number);
    }
}

/// Raises the limit of file descriptors to the maximum: connections to a guest take one each.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // It fails if the host does not allow it; then the present limit must do.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Prints the version of Firecracker's program that this one stands for. Programs that drive it look for the version after
/// the name.
fn print_version_of(program: &str) -> anyhow::Result<()> {
    let version = bantam_api::API_VERSION;
    let bantam = env!("CARGO_PKG_VERSION");
    writeln!(
        io::stdout(),
        "{program} v{version}\n\nServed by Bantam {bantam}"
    )?;
    Ok(())
}

/// Prints help and version in clap's layout, and an error, whose status is `failure`, as one line.
fn report_usage<T: Parser>(error: &clap::Error, failure: ExitCode) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => status_of(print_usage(error)),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            failure
        }
        ErrorKind::InvalidUtf8 => {
            let arguments: Vec<OsString> = std::env::args_os().collect();
            say(format_args!("error: {}", not_utf8::<T>(&arguments)));
            failure
        }
        _ => {
            say(format_args!("{}", usage_line(&error.to_string())));
            failure
        }
    }
}

fn print_usage(usage: &clap::Error) -> anyhow::Result<()> {
    match usage.print().and_then(|()| io::stdout().flush()) {
        // A reader that closes early, such as a pager, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("cannot write to standard output"),
    }
}

/// Names the first argument that has to be UTF-8 and is not, as clap does not name it.
fn not_utf8<T: Parser>(arguments: &[OsString]) -> String {
    let lossy = |argument: &OsString| OsString::from(argument.to_string_lossy().into_owned());
    // It is refused although all others have been converted to UTF-8.
    let is_refused = |&index: &usize| {
        let others_mended = arguments.iter().enumerate().map(|(other, argument)| {
            if other == index {
                argument.clone()
            } else {
                lossy(argument)
            }
        });
        let parsed = T::try_parse_from(others_mended);
        matches!(parsed, Err(error) if error.kind() == ErrorKind::InvalidUtf8)
    };
    let index = (0..arguments.len())
        .filter(|&index| arguments[index].to_str().is_none())
        .find(is_refused)
        .unwrap_or_default();
    let argument = arguments.get(index).map(lossy).unwrap_or_default();
    let option = index
        .checked_sub(1)
        .map(|before| lossy(&arguments[before]))
        .filter(|before| before.as_encoded_bytes().starts_with(b"--"))
        .filter(|_| !argument.as_encoded_bytes().starts_with(b"-"));
    let of_option = option.map_or_else(String::new, |option| format!(" of '{}'", option.display()));
    format!(
        "the value '{}'{of_option} is not UTF-8: only paths may have other characters",
        argument.display()
    )
}

/// Returns the paragraphs with the error and its remedy, without those that repeat the usage.
fn usage_line(rendered: &str) -> String {
    rendered
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|paragraph| {
            !paragraph.is_empty()
                && !paragraph.starts_with("Usage:")
                && !paragraph.starts_with("For more information")
        })
        .collect::<Vec<_>>()
        .join("; ")
}

/// Formats an error and its causes on one line, without causes that the text before them already
/// contains.
fn reason(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = match cause.downcast_ref::<Errno>() {
            // It would begin with the constant's name.
            Some(&errno) => io::Error::from(errno).to_string(),
            None => cause.to_string(),
        };
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    without_error_numbers(line.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn usage_error(line: &str) -> String {
        let error = Args::try_parse_from(line.split(' ')).unwrap_err();
        usage_line(&error.to_string())
    }

    #[test]
    fn usage_errors_are_one_line() {
        assert_eq!(
            usage_error("bantam run --boot-protocol bios"),
            "error: invalid value 'bios' for '--boot-protocol <PROTOCOL>' \
             [possible values: auto, pvh, linux64]"
        );
        assert_eq!(
            usage_error("bantam run --kernle x"),
            "error: unexpected argument '--kernle' found; \
             tip: a similar argument exists: '--kernel'"
        );
        assert_eq!(
            usage_error("bantam run --cpus 0"),
            "error: invalid value '0' for '--cpus <N>': \
             invalid number of vCPUs '0': expected 1 to 32"
        );
        assert_eq!(
            usage_error("bantam run --disk a,poll=1"),
            "error: invalid value 'a,poll=1' for '--disk <PATH[,ro][,KEY=VALUE]...>': \
             'poll' is on or off; a disk is PATH[,ro][,id=NAME][,KEY=VALUE]..."
        );
    }

    #[test]
    fn an_argument_that_is_not_utf_8_is_named() {
        let message = |line: &[u8]| {
            let words = line.split(|&byte| byte == b' ');
            let arguments: Vec<_> = words.map(|word| OsStr::from_bytes(word).into()).collect();
            let error = Args::try_parse_from(&arguments).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidUtf8);
            not_utf8::<Args>(&arguments)
        };
        let rest = "is not UTF-8: only paths may have other characters";
        assert_eq!(
            message(b"bantam run --kernel k\xe9 --cpus \xff"),
            format!("the value '\u{fffd}' of '--cpus' {rest}")
        );
        assert_eq!(
            message(b"bantam run --disk d\xe9 --append=x\xff --log \xff"),
            format!("the value '--append=x\u{fffd}' {rest}")
        );
        assert_eq!(
            message(b"bantam api --api-sock \xff --id i\xff"),
            format!("the value 'i\u{fffd}' of '--id' {rest}")
        );
    }

    #[test]
    fn system_errors_are_printed_in_words() {
        let error = io::Error::from_raw_os_error(2);
        let told = anyhow::anyhow!("cannot open 'x': {error}; try another");
        assert_eq!(
            reason(&told),
            "cannot open 'x': No such file or directory; try another"
        );
    }

    #[test]
    fn the_remedy_for_too_few_descriptors_is_printed_wherever_they_run_out() {
        let line = "cannot create an event: Too many open files: raise the limit (ulimit -n)";
        for error in [
            anyhow::Error::from(Errno::EMFILE),
            io::Error::from(Errno::EMFILE).into(),
        ] {
            assert_eq!(reason(&error.context("cannot create an event")), line);
        }
    }

    #[test]
    fn causes_are_printed_once() {
        let io = || io::Error::other("it is gone");
        let told = Err::<(), _>(io())
            .context("cannot open 'x': it is gone")
            .unwrap_err();
        assert_eq!(reason(&told), "cannot open 'x': it is gone");
        let untold = Err::<(), _>(io()).context("cannot open 'x'").unwrap_err();
        assert_eq!(reason(&untold), "cannot open 'x': it is gone");
    }
}
