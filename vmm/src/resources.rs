//! The files, sockets and taps that a machine uses, all opened before its first thread starts.

use std::fs::File;
use std::path::Path;

use bantam_devices::opener::Opener;
use bantam_storage::FileAccess;
use kvm_ioctls::Kvm;

use crate::config::MachineConfig;
use crate::console::Console;
use crate::devices::{self, Build, OpenSerial, Opening};
use crate::error::Error;
use crate::gdb::GdbListener;
use crate::host;
use crate::machine::MachineContext;
use crate::metadata::MachineMetadata;

/// The open files, sockets and taps of a machine.
pub(crate) struct Resources {
    pub(crate) kvm: Kvm,
    /// What the guest is loaded from; `None` for one that goes on from saved state.
    pub(crate) images: Option<Images>,
    pub(crate) metadata: Option<MachineMetadata>,
    pub(crate) virtio: Vec<Build>,
    /// The partition of the first disk with the root file system, if the kernel is to be told.
    pub(crate) root_partition: Option<u32>,
    pub(crate) serial: OpenSerial,
    pub(crate) gdb: Option<GdbListener>,
}

/// What a guest is loaded from.
pub(crate) struct Images {
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
}

impl Resources {
    /// Opens everything that `config` names, including kernel and initrd if the guest `boots`. `stdio` is the
    /// program's end of the stream that is configured as `stdio`.
    ///
    /// # Errors
    /// If something cannot be opened.
    pub(crate) fn open(
        config: &MachineConfig,
        boots: bool,
        context: &MachineContext,
        mut stdio: Console,
    ) -> Result<Resources, Error> {
        let opener = &context.opener;
        let kvm = host::open_kvm_by(&**opener)?;
        host::require_capabilities(&kvm, &config.cpu.required_capabilities)?;
        let images = match boots {
            true => Some(Images::open(config, &**opener)?),
            false => None,
        };
        let metadata = config.metadata.as_ref().map(MachineMetadata::new);
        let metadata = metadata.transpose()?;
        let mut opening = Opening {
            config,
            opener,
            place_keeper: context.place_keeper.as_ref(),
            stdio: &mut stdio,
            metadata: metadata.as_ref(),
            root_partition: None,
        };
        let virtio = devices::open_virtio(&mut opening)?;
        let serial = devices::open_serial(&mut opening)?;
        let root_partition = opening.root_partition;
        let gdb = match &config.gdb {
            Some(gdb) => Some(GdbListener::open(gdb, &**opener)?),
            None => None,
        };
        Ok(Resources {
            kvm,
            images,
            metadata,
            virtio,
            root_partition,
            serial,
            gdb,
        })
    }
}

impl Images {
    fn open(config: &MachineConfig, opener: &dyn Opener) -> Result<Images, Error> {
        let open = |path: &Path| opener.file(path, FileAccess::Read);
        let path = &config.kernel;
        let kernel = open(path).map_err(|source| Error::OpenKernel {
            path: path.clone(),
            source,
        })?;
        let initrd = match &config.initrd {
            Some(path) => Some(open(path).map_err(|source| Error::OpenInitrd {
                path: path.clone(),
                source,
            })?),
            None => None,
        };
        Ok(Images { kernel, initrd })
    }
}
