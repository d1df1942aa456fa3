//! `bantam attach-disk`, `detach-disk`, `attach-interface`, `detach-interface` and `change-media`.

use std::path::PathBuf;

use anyhow::Context;

use super::args::{
    AttachDiskArgs, AttachInterfaceArgs, ChangeMediaArgs, DetachDiskArgs, DetachInterfaceArgs,
};
use super::edit::say_next_start;
use super::machine;

pub fn attach_disk(args: AttachDiskArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let mut disk = args.disk;
    disk.path = absolute(&disk.path)?;
    machine.attach_disk(disk)?;
    say_next_start(&machine)
}

pub fn detach_disk(args: &DetachDiskArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    machine.detach_disk(&args.disk)?;
    say_next_start(&machine)
}

pub fn attach_interface(args: AttachInterfaceArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    machine.attach_interface(args.net)?;
    say_next_start(&machine)
}

pub fn detach_interface(args: &DetachInterfaceArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    machine.detach_interface(&args.interface)?;
    say_next_start(&machine)
}

pub fn change_media(args: &ChangeMediaArgs) -> anyhow::Result<()> {
    let path = absolute(&args.path)?;
    machine(&args.name)?.change_media(&args.disk, &path, args.format)?;
    Ok(())
}

/// Returns a path that means the same to the machine's process, which has another current folder.
fn absolute(path: &PathBuf) -> anyhow::Result<PathBuf> {
    std::path::absolute(path)
        .with_context(|| format!("cannot find the folder of '{}'", path.display()))
}
