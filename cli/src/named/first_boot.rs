//! The options of `bantam create` for the image that a machine is made of, and for its first boot.

use std::path::{Path, PathBuf};

use anyhow::Context;
use bantam_manager::{BaseImage, Manager, Provision, SeedSource};
use bantam_seed::{
    FirstBoot, Given, HostName, Password, PublicKey, UserName, check_with_cloud_init, read_file,
};
use bantam_storage::parse_size;
use bantam_vmm::config::DiskFormatOption;
use clap::Args;

/// The heading of these options in the help.
const HEADING: &str = "Image and first boot";

/// What takes the place of the options from which user data is made.
const MADE: [&str; 5] = ["user", "ssh_key", "password_file", "package", "run"];

// A documentation comment would be the help of `bantam create`.
//
// What a machine is made of, and how it is set up at its first boot.
#[derive(Debug, Args)]
pub struct FirstBootArgs {
    /// Image whose overlay is the first disk: a file, or a name of bantam images
    ///
    /// The image is only read, and must stay as it is. The overlay is in the folder of the machine. The machine also gets a
    /// disk that tells cloud-init in the guest its name, and what the options below say. See docs/cloud-init.md.
    #[arg(long, value_name = "FILE|NAME", help_heading = HEADING)]
    image: Option<PathBuf>,

    /// Format of the image, raw or qcow2; by default qcow2 if its name ends in .qcow2, else raw
    #[arg(long, value_name = "FORMAT", help_heading = HEADING, hide_short_help = true, requires = "image")]
    image_format: Option<DiskFormatOption>,

    /// Size of the first disk, such as 20G; by default that of the image
    #[arg(long, value_name = "SIZE", help_heading = HEADING, requires = "image", value_parser = parse_size)]
    size: Option<u64>,

    /// File with SSH public keys that let you log in; can be given more than once
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    ssh_key: Vec<PathBuf>,

    /// Name of the user in the guest; by default the one that the image has for this
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    user: Option<UserName>,

    /// File with the password of the user, or its hash as openssl passwd -6 prints it
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    password_file: Option<PathBuf>,

    /// Name of the guest in networks; by default that of the machine
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    hostname: Option<HostName>,

    /// Package to install; can be given more than once
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    package: Vec<String>,

    /// Command to execute as root at the end of the first boot; can be given more than once
    #[arg(long, value_name = "COMMAND", help_heading = HEADING, allow_hyphen_values = true)]
    run: Vec<String>,

    /// User data for cloud-init, or a directory with user-data and perhaps meta-data, vendor-data and network-config
    ///
    /// It is taken as it is. What the directory does not have is made, and so is an instance id that meta-data does not have.
    #[arg(long, value_name = "FILE|DIR", help_heading = HEADING, conflicts_with_all = MADE)]
    cloud_init: Option<PathBuf>,
}

impl FirstBootArgs {
    /// Whether the machine is made of an image.
    pub fn has_image(&self) -> bool {
        self.image.is_some()
    }

    /// Reads the files that are named, and returns what the machine is made of.
    pub fn into_provision(self, manager: &Manager) -> anyhow::Result<Provision> {
        let has_seed = self.image.is_some()
            || self.hostname.is_some()
            || self.cloud_init.is_some()
            || self.is_made();
        let image = match self.image {
            Some(ref image) => Some(BaseImage {
                path: manager.find_image(image)?,
                format: self.image_format,
                size: self.size,
            }),
            None => None,
        };
        let seed = match has_seed {
            true => Some(self.into_seed()?),
            false => None,
        };
        Ok(Provision { image, seed })
    }

    /// Whether there are options from which user data is made.
    fn is_made(&self) -> bool {
        self.user.is_some()
            || self.password_file.is_some()
            || [&self.package, &self.run].iter().any(|it| !it.is_empty())
            || !self.ssh_key.is_empty()
    }

    fn into_seed(self) -> anyhow::Result<SeedSource> {
        let host_name = self.hostname.clone();
        let given = match &self.cloud_init {
            Some(path) => Given::read(path)?,
            None => Given {
                user_data: self.first_boot()?.to_user_data()?,
                meta_data: None,
                vendor_data: None,
                network_config: None,
            },
        };
        check_with_cloud_init("the user data", &given.user_data)?;
        if let Some(data) = &given.vendor_data {
            check_with_cloud_init("the vendor data", data)?;
        }
        Ok(SeedSource { given, host_name })
    }

    fn first_boot(self) -> anyhow::Result<FirstBoot> {
        let mut ssh_keys = Vec::new();
        for path in &self.ssh_key {
            let keys = PublicKey::parse_file(&read_text(path)?);
            ssh_keys.extend(keys.with_context(|| cannot_use(path))?);
        }
        let password = self.password_file.as_deref().map(|path| {
            let password = Password::parse_file(&read_text(path)?);
            password.with_context(|| cannot_use(path))
        });
        Ok(FirstBoot {
            user: self.user,
            ssh_keys,
            password: password.transpose()?,
            packages: self.package,
            commands: self.run,
        })
    }
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let text = String::from_utf8(read_file(path)?);
    text.with_context(|| cannot_use(path))
}

fn cannot_use(path: &Path) -> String {
    format!("cannot use '{}'", path.display())
}
