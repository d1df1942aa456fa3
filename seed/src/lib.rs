//! What cloud-init in a guest is told at its first boot, and the disk on which it finds that.
//!
//! A [`Seed`] holds the four files of cloud-init's NoCloud data source: [`MetaData`] says which instance this is,
//! [`UserData`] what to set up, vendor data the same on behalf of those who offer the machine, and [`NetworkConfig`] how its network
//! devices get their addresses. [`Seed::to_image`] makes a disk of them, with the label that cloud-init looks for.
//!
//! User data is made of typed input ([`FirstBoot`]), or is a file that was written for cloud-init and is taken as it is.
//! Either is checked: what cloud-init would ignore without a word, because nobody sees the log of a guest that does not
//! come up, is an error here.
//!
//! ```
//! use bantam_seed::{FirstBoot, MetaData, NetworkConfig, PublicKey, Seed, UserData};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB5MFlRbGeGhoBxV6H7u0ND0PVLPfWA4nYgEZTlxwWtG me@host";
//! let boot = FirstBoot {
//!     ssh_keys: PublicKey::parse_file(key)?,
//!     packages: vec!["nginx".to_owned()],
//!     ..FirstBoot::default()
//! };
//! let seed = Seed {
//!     meta_data: MetaData::new("5b0f3d6e", Some("web")),
//!     user_data: boot.to_user_data()?,
//!     vendor_data: None,
//!     network_config: Some(NetworkConfig::dhcp(&["02:00:00:12:34:56"])),
//! };
//! let image: Vec<u8> = seed.to_image()?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod error;
mod first_boot;
mod image;
mod key;
mod meta_data;
mod network_config;
mod schema;
mod source;
mod user_data;
mod yaml;

pub use error::Error;
pub use first_boot::{FirstBoot, Password, UserName};
pub use image::LABEL;
pub use key::PublicKey;
pub use meta_data::{HostName, MetaData};
pub use network_config::NetworkConfig;
pub use schema::check_with_cloud_init;
pub use source::{Given, read_file};
pub use user_data::UserData;

/// The largest file of a seed in bytes.
pub const MAX_FILE_SIZE: usize = 16 << 20;

/// What is on a disk for cloud-init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Which instance the guest is.
    pub meta_data: MetaData,
    /// What its user wants set up.
    pub user_data: UserData,
    /// What is set up unless user data says otherwise.
    pub vendor_data: Option<UserData>,
    /// How its network devices get addresses; without it, cloud-init has the first one use DHCP.
    pub network_config: Option<NetworkConfig>,
}
