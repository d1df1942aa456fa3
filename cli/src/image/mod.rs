//! `bantam image`: disk images without a machine.

mod amend;
mod args;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod info;
mod interrupt;
mod map;
mod measure;
mod output;
mod progress;
mod rebase;
mod resize;
mod size;
mod snapshot;
mod target;

use std::ffi::OsString;
use std::process::ExitCode;

use bantam_storage::tools::{Purpose, ToolError};
use nix::sys::signal::{SigSet, Signal};

use args::ImageCommand;
pub use args::{ImageArgs, QemuImgArgs};
pub use interrupt::cancel_on_signal;
pub use progress::Progress;
pub use target::{open_backing, options, set_backing};

use crate::message::say_last;
use crate::{is_broken_pipe, reason};

/// The exit statuses of a comparison: the disks are the same or differ; more means that it failed.
const SAME: u8 = 0;
const DIFFERENT: u8 = 1;
const COMPARISON_FAILED: u8 = 2;
const FAILED: u8 = 1;

/// Runs a command, reports an error in one line and returns the exit status.
pub fn run(args: ImageArgs) -> ExitCode {
    // A write beyond the limit of file sizes is an error then, which has its message.
    if let Err(error) = SigSet::from(Signal::SIGXFSZ).thread_block() {
        say_last(format_args!("bantam image: cannot block a signal: {error}"));
        return FAILED.into();
    }
    let (failed, result) = match args.command {
        ImageCommand::Create(args) => (FAILED, create::create(args).map(|()| 0)),
        ImageCommand::Info(args) => (FAILED, info::info(&args).map(|()| 0)),
        ImageCommand::Check(args) => (FAILED, check::check(&args)),
        ImageCommand::Convert(args) => (FAILED, convert::convert(&args).map(|()| 0)),
        ImageCommand::Resize(args) => (FAILED, resize::resize(&args).map(|()| 0)),
        ImageCommand::Compare(args) => (COMPARISON_FAILED, compare::compare(&args)),
        ImageCommand::Map(args) => (FAILED, map::map(&args).map(|()| 0)),
        ImageCommand::Measure(args) => (FAILED, measure::measure(args).map(|()| 0)),
        ImageCommand::Dd(args) => (FAILED, dd::dd(&args).map(|()| 0)),
        ImageCommand::Snapshot(args) => (FAILED, snapshot::snapshot(&args).map(|()| 0)),
        ImageCommand::Commit(args) => (FAILED, commit::commit(&args).map(|()| 0)),
        ImageCommand::Rebase(args) => (FAILED, rebase::rebase(&args).map(|()| 0)),
        ImageCommand::Amend(args) => (FAILED, amend::amend(&args).map(|()| 0)),
    };
    match result {
        Ok(status) => status.into(),
        // Who reads the output has seen enough.
        Err(error) if is_broken_pipe(&error) => failed.into(),
        Err(error) => {
            say_last(format_args!("bantam image: {}", reason(&error)));
            match (error.downcast_ref(), interrupt::status()) {
                (Some(ToolError::Cancelled), Some(status)) => status.into(),
                _ => failed.into(),
            }
        }
    }
}

/// Returns what an image is opened for that is only read.
fn purpose(force_share: bool) -> Purpose {
    match force_share {
        true => Purpose::ReadShared,
        false => Purpose::Read,
    }
}

/// Whether the program was started as qemu-img, by a link or a copy with that name.
pub fn is_qemu_img(program: &OsString) -> bool {
    std::path::Path::new(program).file_name() == Some("qemu-img".as_ref())
}

/// Prepares arguments for the parser: the last one of `resize` is a size even if it begins with a dash.
pub fn prepare(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let command =
        |argument: Option<&OsString>| argument.is_some_and(|argument| argument == "resize");
    let is_resize = command(arguments.get(1))
        || (arguments.get(1).is_some_and(|argument| argument == "image")
            && command(arguments.get(2)));
    let shrinks = |size: &OsString| {
        let size = size.as_encoded_bytes();
        size.first() == Some(&b'-') && size.get(1).is_some_and(u8::is_ascii_digit)
    };
    if is_resize && arguments.last().is_some_and(shrinks) && !arguments.contains(&"--".into()) {
        arguments.insert(arguments.len() - 1, "--".into());
    }
    arguments
}

#[cfg(test)]
mod tests;
