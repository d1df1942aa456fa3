//! `bantam image info`.

use std::fmt::{Display, Write};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail};
use bantam_storage::foreign::VmdkDetails;
use bantam_storage::qcow2::{Compression, MAX_DEPTH, Qcow2};
use bantam_storage::tools::{Format, open_alone};
use serde::Serialize;

use super::args::{InfoArgs, Output};
use super::output::{print, print_json};
use super::purpose;
use super::size::human;
use super::snapshot::{Listed, list};

/// What is told about an image, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    virtual_size: u64,
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: String,
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    dirty_flag: bool,
}

/// A snapshot, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct SnapshotInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
    vm_clock_nsec: u64,
    name: String,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    id: String,
    vm_state_size: u64,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
enum Specific {
    Vmdk(Vmdk),
    Qcow2(Qcow2Details),
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Details {
    compat: &'static str,
    compression_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy_refcounts: Option<bool>,
    refcount_bits: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_l2: Option<bool>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Vmdk {
    cid: u32,
    parent_cid: u32,
    create_type: String,
    extents: Vec<VmdkExtent>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct VmdkExtent {
    #[serde(skip_serializing_if = "Option::is_none")]
    compressed: Option<bool>,
    virtual_size: u64,
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: String,
}

/// Shows what an image is.
pub fn info(args: &InfoArgs) -> anyhow::Result<()> {
    let mut infos = vec![Info::open(&args.file, args.format, args.force_share)?];
    let mut files = vec![identity(&args.file)?];
    while args.backing_chain && infos.len() < MAX_DEPTH {
        let Some(Info {
            full_backing_filename: Some(backing),
            backing_filename_format: Some(format),
            ..
        }) = infos.last()
        else {
            break;
        };
        let file = identity(backing.as_ref())?;
        if files.contains(&file) {
            bail!("the backing files of '{}' form a loop", args.file.display());
        }
        files.push(file);
        let format = format.parse()?;
        infos.push(Info::open(
            backing.as_ref(),
            Some(format),
            args.force_share,
        )?);
    }
    match (args.output, &infos[..]) {
        (Output::Human, _) => {
            let texts: Vec<_> = infos.iter().map(Info::human).collect();
            print(&texts.join("\n"))
        }
        (Output::Json, [info]) if !args.backing_chain => print_json(info),
        (Output::Json, infos) => print_json(&infos),
    }
}

/// Returns what tells a file from all others, whatever name it has.
fn identity(path: &Path) -> anyhow::Result<(u64, u64)> {
    let file = fs::metadata(path);
    let file = file.with_context(|| format!("cannot open '{}'", path.display()))?;
    Ok((file.dev(), file.ino()))
}

impl Info {
    fn open(path: &Path, format: Option<Format>, force_share: bool) -> anyhow::Result<Info> {
        let opened = open_alone(path, format, purpose(force_share))?;
        // Only a VMDK image has files of its own besides the first; others are backing files.
        let own = match &opened.vmdk {
            Some(_) => opened.files.len(),
            None => 1,
        };
        let mut actual_size = 0;
        for path in &opened.files[..own] {
            let file = fs::metadata(path);
            let file = file.with_context(|| format!("cannot examine '{}'", path.display()))?;
            // Blocks of stat() have 512 bytes.
            actual_size += file.blocks() * 512;
        }
        let name = |file: usize| opened.files[file].display().to_string();
        let vmdk = opened.vmdk.as_ref();
        let mut info = Info {
            snapshots: Vec::new(),
            backing_filename_format: None,
            virtual_size: opened.image.size(),
            filename: path.display().to_string(),
            cluster_size: opened.cluster_size,
            format: opened.format.to_string(),
            actual_size,
            format_specific: vmdk.map(|details| Specific::Vmdk(Vmdk::new(details, name))),
            full_backing_filename: None,
            backing_filename: None,
            dirty_flag: false,
        };
        if let Some(image) = &opened.qcow2 {
            info.add_qcow2(image, path)?;
        }
        Ok(info)
    }

    fn add_qcow2(&mut self, image: &Qcow2, path: &Path) -> anyhow::Result<()> {
        let header = image.header();
        let is_new = header.version() > 2;
        self.dirty_flag = header.is_dirty();
        self.format_specific = Some(Specific::Qcow2(Qcow2Details {
            compat: if is_new { "1.1" } else { "0.10" },
            compression_type: match header.compression() {
                Compression::Zlib => "zlib",
                Compression::Zstd => "zstd",
            },
            lazy_refcounts: is_new.then(|| header.has_lazy_refcounts()),
            refcount_bits: header.refcount_bits(),
            corrupt: is_new.then(|| header.is_corrupt()),
            extended_l2: is_new.then(|| header.has_subclusters()),
        }));
        if let Some(named) = header.backing() {
            self.backing_filename = Some(named.name.clone());
            self.backing_filename_format = named.format.clone();
            let folder = path.parent().unwrap_or(Path::new(""));
            let full = folder.join(&named.name);
            self.full_backing_filename = Some(full.display().to_string());
        }
        for snapshot in image.snapshots()? {
            self.snapshots.push(SnapshotInfo {
                icount: snapshot.instructions(),
                vm_clock_nsec: snapshot.guest_clock % 1_000_000_000,
                date_sec: snapshot.seconds,
                date_nsec: snapshot.nanoseconds,
                vm_clock_sec: snapshot.guest_clock / 1_000_000_000,
                vm_state_size: snapshot.machine_state,
                name: snapshot.name,
                id: snapshot.id,
            });
        }
        Ok(())
    }

    fn human(&self) -> String {
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
            self.filename,
            self.format,
            human(self.virtual_size),
            self.virtual_size,
            human(self.actual_size),
        );
        if let Some(size) = self.cluster_size {
            let _ = writeln!(text, "cluster_size: {size}");
        }
        if let Some(backing) = &self.backing_filename {
            let _ = write!(text, "backing file: {backing}");
            // What is relative to the image's folder is told with it too.
            match &self.full_backing_filename {
                Some(full) if full != backing => {
                    let _ = writeln!(text, " (actual path: {full})");
                }
                _ => text.push('\n'),
            }
        }
        if let Some(format) = &self.backing_filename_format {
            let _ = writeln!(text, "backing file format: {format}");
        }
        if !self.snapshots.is_empty() {
            let snapshots = self.snapshots.iter().map(|snapshot| Listed {
                id: &snapshot.id,
                name: &snapshot.name,
                machine_state: snapshot.vm_state_size,
                seconds: snapshot.date_sec,
                instructions: snapshot.icount,
                guest_clock: snapshot.vm_clock_sec * 1_000_000_000 + snapshot.vm_clock_nsec,
            });
            text.push_str(&list(snapshots));
        }
        match &self.format_specific {
            Some(Specific::Vmdk(vmdk)) => vmdk.describe(&mut text),
            Some(Specific::Qcow2(qcow2)) => qcow2.describe(&mut text),
            None => {}
        }
        text
    }
}

impl Qcow2Details {
    fn describe(&self, text: &mut String) {
        let _ = write!(
            text,
            "Format specific information:\n    compat: {}\n    compression type: {}\n",
            self.compat, self.compression_type
        );
        let mut add = |name: &str, value: &dyn Display| {
            let _ = writeln!(text, "    {name}: {value}");
        };
        if let Some(lazy) = self.lazy_refcounts {
            add("lazy refcounts", &lazy);
        }
        add("refcount bits", &self.refcount_bits);
        if let Some(corrupt) = self.corrupt {
            add("corrupt", &corrupt);
        }
        if let Some(extended) = self.extended_l2 {
            add("extended l2", &extended);
        }
    }
}

impl Vmdk {
    fn new(details: &VmdkDetails, name: impl Fn(usize) -> String) -> Vmdk {
        let extents = details.extents.iter().map(|extent| VmdkExtent {
            compressed: extent.is_compressed.then_some(true),
            virtual_size: extent.size,
            filename: name(extent.file),
            cluster_size: extent.grain,
            format: extent.kind.clone().unwrap_or_default(),
        });
        Vmdk {
            cid: details.cid,
            parent_cid: details.parent_cid,
            create_type: details.create_type.clone(),
            extents: extents.collect(),
        }
    }

    fn describe(&self, text: &mut String) {
        let _ = write!(
            text,
            "Format specific information:\n    cid: {}\n    parent cid: {}\n    create type: {}\n    extents:\n",
            self.cid, self.parent_cid, self.create_type
        );
        for (index, extent) in self.extents.iter().enumerate() {
            let _ = writeln!(text, "        [{index}]:");
            if extent.compressed == Some(true) {
                let _ = writeln!(text, "            compressed: true");
            }
            let _ = write!(
                text,
                "            virtual size: {}\n            filename: {}\n",
                extent.virtual_size, extent.filename
            );
            if let Some(size) = extent.cluster_size {
                let _ = writeln!(text, "            cluster size: {size}");
            }
            let _ = writeln!(text, "            format: {}", extent.format);
        }
    }
}
