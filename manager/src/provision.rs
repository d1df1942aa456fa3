//! Machines that are made of an image, and set themselves up at their first boot.

use std::fs;
use std::path::{Path, PathBuf};

use bantam_seed::{Given, HostName, MetaData, NetworkConfig, Seed};
use bantam_vmm::config::{DiskConfig, DiskFormatOption, MachineConfig};

use crate::definition::{Settings, machine_file, random_uuid};
use crate::error::Error;
use crate::files;
use crate::images::create_overlay_of_size;
use crate::machine::Machine;
use crate::store::checked_format;

/// The overlay of the image that a machine is made of.
const OVERLAY: &str = "disk.qcow2";
/// The disk for cloud-init.
const SEED: &str = "seed.img";
/// The serial number of that disk, and its name on the host.
const SEED_ID: &str = "cidata";

/// What a new machine gets beside what its machine file says. Its files are in the folder of the machine.
#[derive(Clone, Debug, Default)]
pub struct Provision {
    /// The image whose overlay is the first disk.
    pub image: Option<BaseImage>,
    /// What cloud-init finds on a disk after all others.
    pub seed: Option<SeedSource>,
}

/// An image that machines are made of. It is only read, and must stay as it is while there are machines of it.
#[derive(Clone, Debug)]
pub struct BaseImage {
    /// Its path.
    pub path: PathBuf,
    /// Its format, if its name does not say it.
    pub format: Option<DiskFormatOption>,
    /// The size of the disk in bytes; by default that of the image.
    pub size: Option<u64>,
}

/// What cloud-init is told. The rest, such as the instance id, follows from the machine.
#[derive(Clone, Debug)]
pub struct SeedSource {
    /// What the user gives.
    pub given: Given,
    /// The name of the guest in networks; by default that of the machine.
    pub host_name: Option<HostName>,
}

impl Provision {
    /// Makes the files in `folder`, which will be that of `machine`, and adds their disks to `config`.
    pub(crate) fn make(
        &self,
        folder: &Path,
        machine: &Machine,
        config: &mut MachineConfig,
        settings: &mut Settings,
    ) -> Result<(), Error> {
        if let Some(image) = &self.image {
            image.make_overlay(&folder.join(OVERLAY))?;
            config
                .disks
                .insert(0, DiskConfig::new(machine.file(OVERLAY)));
        }
        if let Some(source) = &self.seed {
            let (seed, instance_id) = source.seed(machine.name().as_str(), config)?;
            let path = folder.join(SEED);
            files::replace(&path, seed.to_image()?).map_err(Error::file("write", &path))?;
            let mut disk = DiskConfig::new(machine.file(SEED));
            disk.readonly = true;
            disk.id = SEED_ID.to_owned().try_into().ok();
            config.disks.push(disk);
            settings.instance_id = Some(instance_id);
        }
        config.validate_values()?;
        Ok(())
    }
}

impl BaseImage {
    fn make_overlay(&self, overlay: &Path) -> Result<(), Error> {
        // A link may lead to another image one day.
        let path = fs::canonicalize(&self.path).map_err(Error::file("find", &self.path))?;
        checked_format("use", &path, self.format)?;
        let mut disk = DiskConfig::new(path);
        disk.format = self.format;
        create_overlay_of_size(&disk, overlay, self.size)
    }
}

impl SeedSource {
    /// Returns the seed of a new machine, and its instance id.
    fn seed(&self, name: &str, config: &MachineConfig) -> Result<(Seed, String), Error> {
        let id = random_uuid()?;
        let of_machine = HostName::from_name(name);
        let host_name = self.host_name.as_ref().or(of_machine.as_ref());
        let host_name = host_name.map(HostName::as_str);
        let given = &self.given;
        let meta_data = match given.meta_data.clone() {
            Some(mut meta_data) => {
                meta_data.complete(&id, host_name);
                meta_data
            }
            None => MetaData::new(&id, host_name),
        };
        let id = meta_data.instance_id().unwrap_or(&id).to_owned();
        let macs: Vec<_> = config.nets.iter().filter_map(|net| net.mac).collect();
        let macs: Vec<_> = macs.iter().map(ToString::to_string).collect();
        let dhcp = || (!macs.is_empty()).then(|| NetworkConfig::dhcp(&macs));
        let seed = Seed {
            meta_data,
            user_data: given.user_data.clone(),
            vendor_data: given.vendor_data.clone(),
            network_config: given.network_config.clone().or_else(dhcp),
        };
        Ok((seed, id))
    }
}

/// Makes the disk for cloud-init at `path` that of another instance, as `change` says of its instance id. Returns that.
pub(crate) fn renew_seed(
    path: &Path,
    change: impl FnOnce(&mut Seed, &str),
) -> Result<String, Error> {
    let id = random_uuid()?;
    let image = fs::read(path).map_err(Error::file("read", path))?;
    let mut seed = Seed::of_image(image)?;
    change(&mut seed, &id);
    files::replace(path, seed.to_image()?).map_err(Error::file("write", path))?;
    Ok(id)
}

impl Machine {
    /// Returns the place, among the disks of `config`, of the disk for cloud-init that was made with this machine or with
    /// the one that it is a copy of.
    pub(crate) fn seed_place(&self, config: &MachineConfig) -> Option<usize> {
        config.disks.iter().position(|disk| {
            let is_named = disk.id.as_ref().is_some_and(|id| id.as_str() == SEED_ID);
            is_named && disk.readonly && disk.path.starts_with(self.folder())
        })
    }

    /// Gives the guest another instance id for its next boot, so that cloud-init sets it up anew.
    pub(crate) fn renew_instance(&self) -> Result<(), Error> {
        let config = self.config()?;
        let Some(place) = self.seed_place(&config) else {
            let reason = "it was made without a disk for cloud-init, whose instance could be a new one; see `bantam create --help`";
            return Err(self.refused("start", reason));
        };
        let mut settings = self.settings()?;
        let id = renew_seed(&config.disks[place].path, Seed::set_instance_id)?;
        settings.instance_id = Some(id);
        self.write_settings(&settings)
    }

    /// Has the machine file name the files in the machine's own folder by relative paths, which hold when the folder gets
    /// another name. Returns whether there are any.
    pub(crate) fn make_own_paths_relative(&self) -> Result<bool, Error> {
        let folder = self.folder();
        let text = self.machine_file_text()?;
        if !text.contains(&*folder.to_string_lossy()) {
            return Ok(false);
        }
        let mut config = self.config()?;
        for disk in &mut config.disks {
            if let Ok(rest) = disk.path.strip_prefix(folder) {
                disk.path = rest.to_owned();
            }
        }
        self.write_config(&machine_file(&config))?;
        Ok(true)
    }
}
