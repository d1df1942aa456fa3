//! `bantam restore`: a machine that goes on from a snapshot.

use std::fs::{self, File};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bantam_storage::ImageFormat;
use bantam_storage::tools::{self, Format, NewContent};
use bantam_vmm::config::{DiskConfig, DiskFormatOption, MachineConfig};
use nix::unistd::close;

use bantam_vmm::{MemoryLoad, Snapshot, SnapshotFiles};

use crate::args::RestoreArgs;
use crate::image::{open_backing, options, set_backing};

/// Where the memory of a machine comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemorySource {
    /// From the memory file.
    File(MemoryLoad),
    /// From the program that listens on this socket.
    Server(PathBuf),
}

/// Opens the snapshot, and returns it with the configuration of the machine that goes on from it.
pub fn prepare(args: &RestoreArgs) -> anyhow::Result<(Snapshot, MachineConfig)> {
    let mut snapshot = open(args)?;
    if args.force {
        snapshot.take_changed_disks();
    }
    let mut config = snapshot.config().clone();
    args.ends.apply(&mut config)?;
    config.seccomp = args.seccomp.unwrap_or(config.seccomp);
    // The rest are frozen with the snapshot, and become backing files.
    snapshot.check_disks(&config)?;
    if let Some(folder) = &args.overlays {
        add_overlays(&mut config, args, folder)?;
    }
    Ok((snapshot, config))
}

fn open(args: &RestoreArgs) -> anyhow::Result<Snapshot> {
    if !args.descriptors.is_empty() {
        let descriptors = inherited(&args.descriptors)?;
        return Ok(Snapshot::from_descriptors(descriptors)?);
    }
    let mut snapshot = match &args.memory_load {
        MemorySource::File(load) => {
            let mut snapshot = Snapshot::open(&args.directory)?;
            snapshot.set_memory_load(*load);
            snapshot
        }
        MemorySource::Server(socket) => {
            let files = SnapshotFiles::in_directory(&args.directory);
            Snapshot::open_served(&files.state, socket)?
        }
    };
    if args.record_working_set {
        if matches!(args.memory_load, MemorySource::Server(_)) {
            bail!(
                "cannot record the working set of memory that another program serves (--memory-load uffd): that program \
                 sees which pages are touched"
            );
        }
        snapshot.record_working_set()?;
    }
    Ok(snapshot)
}

/// Gives each disk that can be written to, and was not given another image, an overlay in `folder`.
fn add_overlays(
    config: &mut MachineConfig,
    args: &RestoreArgs,
    folder: &Path,
) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create '{}'", folder.display()))?;
    let names: Vec<_> = config.disk_names().collect();
    for (disk, name) in config.disks.iter_mut().zip(names) {
        let is_replaced = args.ends.disks.iter().any(|it| it.device == name);
        if disk.readonly || is_replaced {
            continue;
        }
        let overlay = folder.join(format!("{name}.qcow2"));
        create_overlay(disk, &overlay)?;
        disk.path = overlay;
        disk.format = Some(DiskFormatOption::Qcow2);
        disk.backing = true;
    }
    Ok(())
}

/// Makes an empty image at `overlay` whose backing file is the image of `disk`.
fn create_overlay(disk: &DiskConfig, overlay: &Path) -> anyhow::Result<()> {
    let name = overlay.display();
    if overlay.exists() {
        bail!("cannot create '{name}': there is a file already; remove it, or name another folder");
    }
    let format = match (disk.format, ImageFormat::of_name(&disk.path)) {
        (Some(DiskFormatOption::Qcow2), _) | (None, ImageFormat::Qcow2) => Format::Qcow2,
        (Some(DiskFormatOption::Raw), _) | (None, ImageFormat::Raw) => Format::Raw,
    };
    let backing = fs::canonicalize(&disk.path)
        .with_context(|| format!("cannot find disk '{}'", disk.path.display()))?;
    let backing = backing.to_str();
    let backing = backing.context("a backing file must have a name in UTF-8")?;
    let mut image_options = options(&[])?;
    set_backing(&mut image_options, Some(backing), Some(format));
    let opened = open_backing(overlay, &image_options)?;
    let opened = opened.context("an overlay needs a backing file")?;
    let size = opened.image.size();
    let content = NewContent {
        compress: false,
        backing: Some(opened.image),
    };
    let created = tools::create(overlay, Format::Qcow2, size, image_options, content)?;
    let finished = created.target.finish(true);
    if finished.is_err() {
        created.remove();
    }
    finished.with_context(|| format!("cannot create '{name}'"))
}

/// Reads where memory comes from.
pub fn memory_source(text: &str) -> Result<MemorySource, String> {
    let load = match text {
        "lazy" => MemoryLoad::Lazy,
        "prefetch" => MemoryLoad::Prefetch,
        "copy" => MemoryLoad::Copy,
        "copy-all" => MemoryLoad::CopyAll,
        _ => {
            let socket = text.strip_prefix("uffd=").filter(|path| !path.is_empty());
            return socket
                .map(|path| MemorySource::Server(PathBuf::from(path)))
                .ok_or_else(|| {
                    "expected lazy, prefetch, copy, copy-all or uffd=SOCKET".to_owned()
                });
        }
    };
    Ok(MemorySource::File(load))
}

/// Takes over descriptors that the program was started with.
fn inherited(numbers: &[RawFd]) -> anyhow::Result<Vec<OwnedFd>> {
    let take = |&number: &RawFd| {
        // This program reads from its own place in the file, and none of its own programs inherits it.
        let path = format!("/proc/self/fd/{number}");
        let file = File::open(&path).with_context(|| format!("cannot open '{path}'"))?;
        close(number).context("cannot close an inherited descriptor")?;
        Ok(file.into())
    };
    numbers.iter().map(take).collect()
}
