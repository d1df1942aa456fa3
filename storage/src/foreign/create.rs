//! Creates an image by the options that qemu-img has for its format.

use std::io;
use std::sync::Arc;

use super::ForeignFormat;
use super::vdi::VdiWriter;
use super::vhd::VhdWriter;
use super::vhdx::VhdxWriter;
use super::vmdk::{Adapter, VmdkStreamWriter, VmdkWriter};
use crate::{ImageFile, OptionError, Options, Target};

const SWITCH: [(&str, bool); 2] = [("off", false), ("on", true)];

/// How an image is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignOptions {
    /// As VMDK.
    Vmdk {
        /// The controller that it names.
        adapter: Adapter,
        /// Whether it is a stream of compressed grains.
        is_stream: bool,
    },
    /// As VHD.
    Vhd {
        /// Whether all blocks are there from the start.
        is_fixed: bool,
        /// Whether the disk has exactly the size that is asked for.
        exact: bool,
    },
    /// As VHDX.
    Vhdx {
        /// The size of a block. `None` if it is to fit the disk.
        block: Option<u64>,
        /// Whether all blocks are there from the start.
        is_fixed: bool,
    },
    /// As VDI.
    Vdi {
        /// Whether all blocks are there from the start.
        is_static: bool,
    },
}

impl ForeignOptions {
    /// Reads the options of a format.
    ///
    /// # Errors
    /// If the format has no such option, or the value is not possible.
    pub fn parse(
        format: ForeignFormat,
        mut options: Options,
    ) -> Result<ForeignOptions, OptionError> {
        let fixed = [("dynamic", false), ("fixed", true)];
        let (parsed, name) = match format {
            ForeignFormat::Vmdk => {
                let adapters = [
                    ("ide", Adapter::Ide),
                    ("buslogic", Adapter::BusLogic),
                    ("lsilogic", Adapter::LsiLogic),
                    ("legacyESX", Adapter::LegacyEsx),
                ];
                let subformats = [("monolithicSparse", false), ("streamOptimized", true)];
                let adapter = options.take_choice("adapter_type", &adapters)?;
                let is_stream = options.take_choice("subformat", &subformats)?;
                (ForeignOptions::Vmdk { adapter, is_stream }, "vmdk")
            }
            ForeignFormat::Vhd => {
                let is_fixed = options.take_choice("subformat", &fixed)?;
                let exact = options.take_choice("force_size", &SWITCH)?;
                (ForeignOptions::Vhd { is_fixed, exact }, "vpc")
            }
            ForeignFormat::Vhdx => {
                let is_fixed = options.take_choice("subformat", &fixed)?;
                let block = options.take_size("block_size")?.filter(|&block| block > 0);
                (ForeignOptions::Vhdx { block, is_fixed }, "vhdx")
            }
            ForeignFormat::Vdi => {
                let is_static = options.take_choice("static", &SWITCH)?;
                (ForeignOptions::Vdi { is_static }, "vdi")
            }
        };
        options.finish(name)?;
        Ok(parsed)
    }

    /// Creates an image of a disk of `size` bytes in an empty file with this name. It is an image once the target is
    /// finished.
    ///
    /// # Errors
    /// If the disk is too large, or the host cannot write to the file.
    pub fn create(
        self,
        file: Arc<dyn ImageFile>,
        size: u64,
        name: &str,
    ) -> io::Result<Box<dyn Target>> {
        // Readers take an empty disk for damage, except in VDI.
        if size == 0 && !matches!(self, ForeignOptions::Vdi { .. }) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a disk of this format cannot be empty",
            ));
        }
        Ok(match self {
            ForeignOptions::Vmdk {
                adapter,
                is_stream: true,
            } => Box::new(VmdkStreamWriter::new(file, size, adapter, name)?),
            ForeignOptions::Vmdk { adapter, .. } => {
                Box::new(VmdkWriter::new(file, size, adapter, name.to_owned())?)
            }
            ForeignOptions::Vhd { is_fixed, exact } => {
                Box::new(VhdWriter::new(file, size, is_fixed, exact)?)
            }
            ForeignOptions::Vhdx { block, is_fixed } => {
                Box::new(VhdxWriter::new(file, size, block, is_fixed)?)
            }
            ForeignOptions::Vdi { is_static } => Box::new(VdiWriter::new(file, size, is_static)?),
        })
    }
}
