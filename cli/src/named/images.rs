//! `bantam images`: images that machines are made of.

use std::path::PathBuf;

use bantam_manager::{Checksum, MachineName, Manager};
use bantam_vmm::config::DiskFormatOption;
use clap::{Args, Subcommand};

use super::args::Output;
use super::{print, print_json, table};

// A documentation comment would be the help of `bantam images`.
//
// The options of `bantam images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    #[command(subcommand)]
    command: ImagesCommand,
}

#[derive(Debug, Subcommand)]
enum ImagesCommand {
    /// Copies an image into the folder of images
    Add(AddArgs),
    /// Lists the images there
    List {
        /// Form of the output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Removes an image that no machine needs
    Remove {
        /// The image
        #[arg(value_name = "IMAGE")]
        name: MachineName,
    },
}

#[derive(Debug, Args)]
struct AddArgs {
    /// The image, raw or qcow2
    file: PathBuf,
    /// Name of the image; by default that of the file without its extension
    #[arg(long, value_name = "IMAGE")]
    name: Option<MachineName>,
    /// Format of the image; by default qcow2 if its name ends in .qcow2, else raw
    #[arg(long, value_name = "FORMAT")]
    format: Option<DiskFormatOption>,
    /// Checksum that the file must have, as sha256sum prints it
    #[arg(long, value_name = "HEX")]
    sha256: Option<Checksum>,
}

pub fn images(args: ImagesArgs) -> anyhow::Result<()> {
    let manager = Manager::of_user()?;
    match args.command {
        ImagesCommand::Add(args) => {
            manager.add_image(&args.file, args.name, args.format, args.sha256)?;
            Ok(())
        }
        ImagesCommand::List { output } => list(&manager, output),
        ImagesCommand::Remove { name } => Ok(manager.remove_image(&name)?),
    }
}

fn list(manager: &Manager, output: Output) -> anyhow::Result<()> {
    let images = manager.stored_images()?;
    if output == Output::Json {
        return print_json(&images);
    }
    let mut rows = vec![["NAME", "FORMAT", "SIZE"].map(str::to_owned).to_vec()];
    rows.extend(images.into_iter().map(|image| {
        let mib = image.size.div_ceil(1 << 20);
        vec![image.name.to_string(), image.format, format!("{mib} MiB")]
    }));
    print(&table(&rows))
}
