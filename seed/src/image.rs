//! The disk on which cloud-init finds a seed.

use std::io::{self, Cursor, Read, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};

use crate::error::Error;
use crate::{HostName, MAX_FILE_SIZE, MetaData, NetworkConfig, Seed, UserData};

/// The label of the file system, by which cloud-init finds it.
pub const LABEL: &str = "CIDATA";

/// A label in a file system has this length.
const PADDED_LABEL: [u8; 11] = *b"CIDATA     ";

/// The unit of the size of the disk in bytes.
const UNIT: usize = 1 << 20;

impl Seed {
    /// Returns the disk: a FAT file system with a file for each part. It is the same for the same seed.
    ///
    /// # Errors
    /// If one of the files is too large.
    pub fn to_image(&self) -> Result<Vec<u8>, Error> {
        let meta_data = self.meta_data.to_text();
        let mut files = vec![
            ("meta-data", meta_data.as_bytes()),
            ("user-data", self.user_data.as_bytes()),
        ];
        files.extend(
            self.vendor_data
                .iter()
                .map(|data| ("vendor-data", data.as_bytes())),
        );
        let network = self.network_config.iter();
        files.extend(network.map(|config| ("network-config", config.as_text().as_bytes())));
        write(&files).map_err(Error::Image)
    }

    /// Reads a disk that [`Seed::to_image`] has made.
    ///
    /// # Errors
    /// If it is not such a disk.
    pub fn of_image(image: Vec<u8>) -> Result<Seed, Error> {
        let system = FileSystem::new(Cursor::new(image), FsOptions::new()).map_err(Error::Image)?;
        let root = system.root_dir();
        let read = |name: &str| {
            let mut file = match root.open_file(name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file.map_err(Error::Image)?.take(MAX_FILE_SIZE as u64),
            };
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(Error::Image)?;
            Ok(Some(bytes))
        };
        let text = |name: &str| {
            let bytes: Option<Vec<u8>> = read(name)?;
            let text = bytes.map(String::from_utf8).transpose();
            text.map_err(|_| Error::NotText {
                what: name.to_owned(),
            })
        };
        let data = |name: &str| {
            let bytes = read(name)?;
            bytes.map(|bytes| UserData::new(name, bytes)).transpose()
        };
        let network = text("network-config")?;
        let network = network.map(|text| NetworkConfig::parse("network-config", text));
        Ok(Seed {
            meta_data: MetaData::parse("meta-data", &text("meta-data")?.unwrap_or_default())?,
            user_data: data("user-data")?
                .ok_or_else(|| Error::Image(io::ErrorKind::NotFound.into()))?,
            vendor_data: data("vendor-data")?,
            network_config: network.transpose()?,
        })
    }

    /// Gives the guest another instance id, so that cloud-init sets it up anew.
    pub fn set_instance_id(&mut self, instance_id: &str) {
        self.meta_data.set_instance_id(instance_id);
    }

    /// Makes the seed that of another instance with this id and host name, whose network devices have other MAC addresses:
    /// each of the pairs is an address and what takes its place.
    pub fn renew(
        &mut self,
        instance_id: &str,
        host_name: Option<&HostName>,
        mac_addresses: &[(String, String)],
    ) {
        self.meta_data.replace(instance_id, host_name);
        if let Some(config) = &mut self.network_config {
            config.replace_mac_addresses(mac_addresses);
        }
    }
}

fn write(files: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    // FAT itself takes less than one hundredth of the disk; the rest is for ends of clusters and the root directory.
    let size = (content + content / 64 + UNIT / 2).next_multiple_of(UNIT);
    let mut image = Cursor::new(vec![0; size]);
    let options = FormatVolumeOptions::new().volume_label(PADDED_LABEL);
    format_volume(&mut image, options)?;
    {
        let system = FileSystem::new(&mut image, FsOptions::new())?;
        let root = system.root_dir();
        for (name, bytes) in files {
            root.create_file(name)?.write_all(bytes)?;
        }
        drop(root);
        system.unmount()?;
    }
    Ok(image.into_inner())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;
    use crate::FirstBoot;

    fn seed() -> Seed {
        Seed {
            meta_data: MetaData::new("i-1", Some("web")),
            user_data: FirstBoot::default().to_user_data().unwrap(),
            vendor_data: None,
            network_config: Some(NetworkConfig::dhcp(&["02:00:00:00:00:01"])),
        }
    }

    fn files_of(image: &[u8]) -> Vec<(String, Vec<u8>)> {
        let system = FileSystem::new(Cursor::new(image.to_vec()), FsOptions::new()).unwrap();
        assert_eq!(system.volume_label(), LABEL);
        let mut files: Vec<_> = system
            .root_dir()
            .iter()
            .map(|entry| {
                let entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.to_file().read_to_end(&mut bytes).unwrap();
                (entry.file_name(), bytes)
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn the_disk_has_the_files_of_the_seed() {
        let image = seed().to_image().unwrap();
        assert_eq!(image.len(), UNIT);
        let files = files_of(&image);
        let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["meta-data", "network-config", "user-data"]);
        assert_eq!(
            files[0].1,
            b"{\"instance-id\":\"i-1\",\"local-hostname\":\"web\"}\n"
        );
        assert_eq!(seed().to_image().unwrap(), image);
    }

    #[test]
    fn a_disk_is_read_and_made_that_of_another_instance() {
        let mut seed = seed();
        let read = Seed::of_image(seed.to_image().unwrap()).unwrap();
        assert_eq!(read, seed);
        let name: HostName = "copy".parse().unwrap();
        let pair = ("02:00:00:00:00:01", "02:00:00:00:00:FF");
        seed.renew(
            "i-2",
            Some(&name),
            &[(pair.0.to_owned(), pair.1.to_owned())],
        );
        assert_eq!(seed.meta_data, MetaData::new("i-2", Some("copy")));
        assert_eq!(seed.network_config, Some(NetworkConfig::dhcp(&[pair.1])));
        assert_eq!(seed.user_data, read.user_data);
        assert!(Seed::of_image(vec![0; 1 << 20]).is_err());
    }

    #[test]
    fn the_largest_files_fit() {
        let large = |first: &str| {
            let mut data = first.as_bytes().to_vec();
            data.resize(MAX_FILE_SIZE, b'x');
            UserData::new("it", data).unwrap()
        };
        let mut seed = seed();
        for length in [0, 1, UNIT / 2, UNIT - 1, UNIT, 5 * UNIT + 7] {
            let data = [b"#!".as_slice(), &vec![b'x'; length]].concat();
            seed.user_data = UserData::new("it", data.clone()).unwrap();
            assert_eq!(files_of(&seed.to_image().unwrap())[2].1, data);
        }
        seed.user_data = large("#!");
        seed.vendor_data = Some(large("#include"));
        let files = files_of(&seed.to_image().unwrap());
        assert_eq!(files[2].1, seed.user_data.as_bytes());
        assert_eq!(files[3].1.len(), MAX_FILE_SIZE);
    }

    /// Runs a program of the host, if it has it, and returns what it prints.
    fn ask(program: &str, arguments: &[&str]) -> Option<String> {
        let output = match Command::new(program).args(arguments).output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            output => output.unwrap(),
        };
        assert!(output.status.success(), "{program}: {output:?}");
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn tools_of_the_host_read_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed.img");
        fs::write(&path, seed().to_image().unwrap()).unwrap();
        let path = path.to_str().unwrap();
        if let Some(label) = ask(
            "/usr/sbin/blkid",
            &["-p", "-s", "LABEL", "-o", "value", path],
        ) {
            assert_eq!(label.trim(), LABEL);
        }
        if let Some(kind) = ask(
            "/usr/sbin/blkid",
            &["-p", "-s", "TYPE", "-o", "value", path],
        ) {
            assert_eq!(kind.trim(), "vfat");
        }
        ask("/usr/sbin/fsck.fat", &["-n", path]);
        if let Some(text) = ask("mtype", &["-i", path, "::user-data"]) {
            assert_eq!(text, "#cloud-config\n{}\n");
        }
    }
}
