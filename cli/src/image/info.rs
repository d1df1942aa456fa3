//! `bantam image info`.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use bantam_storage::foreign::VmdkDetails;
use bantam_storage::tools::{Opened, open};
use serde::Serialize;

use super::args::{InfoArgs, Output};
use super::output::{print, print_json};
use super::size::human;

/// What is told about an image, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: String,
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific>,
    dirty_flag: bool,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
enum Specific {
    Vmdk(Vmdk),
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
    let opened = open(&args.file, args.format, false)?;
    let info = Info::new(&opened)?;
    match args.output {
        Output::Human => print(&info.human()),
        Output::Json if args.backing_chain => print_json(&[info]),
        Output::Json => print_json(&info),
    }
}

impl Info {
    fn new(opened: &Opened) -> anyhow::Result<Info> {
        let mut actual_size = 0;
        for path in &opened.files {
            let file = fs::metadata(path);
            let file = file.with_context(|| format!("cannot examine '{}'", path.display()))?;
            // Blocks of stat() have 512 bytes.
            actual_size += file.blocks() * 512;
        }
        let name = |file: usize| opened.files[file].display().to_string();
        let vmdk = opened.vmdk.as_ref();
        Ok(Info {
            virtual_size: opened.image.size(),
            filename: name(0),
            cluster_size: opened.cluster_size,
            format: opened.format.to_string(),
            actual_size,
            format_specific: vmdk.map(|details| Specific::Vmdk(Vmdk::new(details, name))),
            dirty_flag: false,
        })
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
        if let Some(Specific::Vmdk(vmdk)) = &self.format_specific {
            vmdk.describe(&mut text);
        }
        text
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
