//! The command line of `bantam image`, which is that of qemu-img.

use std::path::PathBuf;

use bantam_storage::qcow2::Preallocation;
use bantam_storage::tools::{Format, PREALLOCATIONS};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::size::SizeChange;
use bantam_storage::parse_size;

#[derive(Debug, Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// The options under the name qemu-img.
#[derive(Debug, Parser)]
#[command(
    name = "qemu-img",
    // Programs look for the version of qemu-img whose command lines they can give.
    version = concat!("version 7.2.0 (Bantam ", env!("CARGO_PKG_VERSION"), ")"),
    max_term_width = 100,
    about = "Bantam in place of qemu-img: creates, converts and examines disk images"
)]
pub struct QemuImgArgs {
    #[command(flatten)]
    pub image: ImageArgs,
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    Create(CreateArgs),
    Info(InfoArgs),
    Check(CheckArgs),
    Convert(ConvertArgs),
    Resize(ResizeArgs),
    Compare(CompareArgs),
    Map(MapArgs),
    Measure(MeasureArgs),
    Dd(DdArgs),
    Snapshot(SnapshotArgs),
    Commit(CommitArgs),
    Rebase(RebaseArgs),
    Amend(AmendArgs),
}

/// Creates an image of an empty disk
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Print nothing
    #[arg(short)]
    pub quiet: bool,

    /// Format of the image
    #[arg(short, value_name = "FORMAT", default_value = "raw")]
    pub format: Format,

    /// Options of the format: KEY=VALUE,..., or help, which lists them
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Backing file, which has what is not written to the image; relative to the image's folder
    #[arg(short, value_name = "FILE", requires = "backing_format")]
    pub backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<Format>,

    /// Do not look for the backing file
    #[arg(short)]
    pub unchecked: bool,

    /// The image; a file of this name is replaced
    #[arg(value_name = "FILE", required_unless_present = "options")]
    pub file: Option<PathBuf>,

    /// Size of the disk, such as 512M or 1.5G
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
}

/// Shows what an image is
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// How the answer is printed
    #[arg(long, value_enum, value_name = "HOW", default_value = "human")]
    pub output: Output,

    /// Show the backing files too
    #[arg(long)]
    pub backing_chain: bool,

    /// Read the image even if another program writes to it
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Looks for damage in an image
///
/// The exit status is 0 if the image is whole, 2 if it is damaged, 3 if it has clusters that nothing uses, 1 if it could not be checked and
/// 63 if there is nothing to check in this format.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// How the answer is printed
    #[arg(long, value_enum, value_name = "HOW", default_value = "human")]
    pub output: Output,

    /// Repair what is found, in qcow2
    #[arg(short, value_enum, value_name = "WHAT", conflicts_with = "force_share")]
    pub repair: Option<Repairs>,

    /// Cache mode of the image; has no effect
    #[arg(short = 'T', value_name = "MODE")]
    pub source_cache: Option<CacheMode>,

    /// Read the image even if another program writes to it
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Copies a disk to an image of another format
///
/// Several sources become one disk, one after the other. Zeroes take no storage in the target.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Show the progress
    #[arg(short)]
    pub progress: bool,

    /// Format of the sources [default: by their content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Format of the target
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    pub target_format: Format,

    /// Options of the target's format: KEY=VALUE,..., or help, which lists them
    #[arg(short, value_name = "OPTIONS", conflicts_with = "no_create")]
    pub options: Vec<String>,

    /// Compress what is written, in qcow2
    #[arg(short, conflicts_with = "no_create")]
    pub compress: bool,

    /// Backing file of the target; what the backing files of the source have is not copied
    #[arg(
        short = 'B',
        value_name = "FILE",
        requires = "backing_format",
        conflicts_with = "no_create"
    )]
    pub backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<Format>,

    /// Write to an image or device that is there already
    #[arg(short)]
    pub no_create: bool,

    /// With -n: the target reads as zeroes already
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,

    /// Copy the disk as it was at a snapshot: its name or number, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,

    /// How many zeroes in a row are not written; 0 writes all of them
    #[arg(short = 'S', value_name = "SIZE", default_value = "4k", value_parser = parse_size)]
    pub sparse: u64,

    /// Cache mode of the target: all but unsafe bring it to stable storage in the end
    #[arg(short = 't', value_name = "MODE", default_value = "unsafe")]
    pub cache: CacheMode,

    /// Cache mode of the sources; has no effect
    #[arg(short = 'T', value_name = "MODE")]
    pub source_cache: Option<CacheMode>,

    /// Number of requests at a time; has no effect
    #[arg(short = 'm', value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub coroutines: Option<u8>,

    /// Allow writes in any order; has no effect
    #[arg(short = 'W')]
    pub out_of_order: bool,

    /// Let the host copy; has no effect
    #[arg(short = 'C')]
    pub offload: bool,

    /// Read the sources even if another program writes to them
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The sources, and last the target
    #[arg(value_name = "FILE", num_args = 2.., required_unless_present = "options")]
    pub files: Vec<PathBuf>,
}

/// Changes the size of a disk
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Allow the disk to become smaller, and what it has at its end to be lost
    #[arg(long)]
    pub shrink: bool,

    /// What is allocated in advance of what is added: off, metadata (in qcow2), falloc or full
    #[arg(long, value_name = "HOW", default_value = "off", value_parser = preallocation)]
    pub preallocation: Preallocation,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// The size, or with a sign how much larger or smaller
    #[arg(value_name = "[+|-]SIZE")]
    pub size: SizeChange,
}

/// Compares two disks
///
/// The exit status is 0 if they are the same, 1 if they differ and 2 or more if that cannot be told.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Show the progress
    #[arg(short)]
    pub progress: bool,

    /// Format of the first image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Format of the second image [default: by its content]
    #[arg(short = 'F', value_name = "FORMAT")]
    pub second_format: Option<Format>,

    /// Also compare their sizes, and what is allocated
    #[arg(short)]
    pub strict: bool,

    /// Cache mode of the images; has no effect
    #[arg(short = 'T', value_name = "MODE")]
    pub source_cache: Option<CacheMode>,

    /// Read the images even if another program writes to them
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The first image
    #[arg(value_name = "FIRST")]
    pub first: PathBuf,

    /// The second image
    #[arg(value_name = "SECOND")]
    pub second: PathBuf,
}

/// Lists which parts of a disk are allocated, and where
#[derive(Debug, Args)]
pub struct MapArgs {
    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// How the answer is printed
    #[arg(long, value_enum, value_name = "HOW", default_value = "human")]
    pub output: Output,

    /// Begin at this offset of the disk
    #[arg(short, long, value_name = "OFFSET", value_parser = parse_size, default_value = "0")]
    pub start_offset: u64,

    /// End after this length
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = parse_size)]
    pub max_length: Option<u64>,

    /// Read the image even if another program writes to it
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Tells how large an image will be
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// How the answer is printed
    #[arg(long, value_enum, value_name = "HOW", default_value = "human")]
    pub output: Output,

    /// Format of the image that is to be made
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    pub target_format: Format,

    /// Options of that format: KEY=VALUE,...
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Size of the disk, in place of FILE
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["file", "format"])]
    pub size: Option<u64>,

    /// Format of FILE [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Read the image even if another program writes to it
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// Measure the disk as it was at a snapshot of FILE, as for convert
    #[arg(short = 'l', value_name = "SNAPSHOT", requires = "file")]
    pub snapshot: Option<String>,

    /// The image that is to be converted
    #[arg(value_name = "FILE", required_unless_present = "size")]
    pub file: Option<PathBuf>,
}

/// Copies a part of a disk
#[derive(Debug, Args)]
pub struct DdArgs {
    /// Format of the source [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Format of the target
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    pub target_format: Format,

    /// Read the source even if another program writes to it
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// if=FILE of=FILE, and bs=SIZE (512 without), count=BLOCKS, skip=BLOCKS
    ///
    /// As in qemu-img, count includes the blocks that skip leaves out.
    #[arg(value_name = "OPERAND", required = true)]
    pub operands: Vec<String>,
}

/// Lists, creates, applies or deletes the internal snapshots of a qcow2 image
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// List the snapshots, which is the default
    #[arg(short, group = "action")]
    pub list: bool,

    /// Create a snapshot of this name
    #[arg(short, value_name = "NAME", group = "action")]
    pub create: Option<String>,

    /// Make the disk what it was at the snapshot
    #[arg(short, value_name = "NAME", group = "action")]
    pub apply: Option<String>,

    /// Delete the snapshot
    #[arg(short, value_name = "NAME", group = "action")]
    pub delete: Option<String>,

    /// List them even if another program writes to the image
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Copies what a qcow2 image holds into its backing file, and empties the image
#[derive(Debug, Args)]
pub struct CommitArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Show the progress
    #[arg(short)]
    pub progress: bool,

    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Cache mode of the images; has no effect
    #[arg(short = 't', value_name = "MODE")]
    pub cache: Option<CacheMode>,

    /// Copy into this one of the backing files, and do not empty the image
    #[arg(short, value_name = "FILE")]
    pub base: Option<PathBuf>,

    /// Do not empty the image
    #[arg(short = 'd')]
    pub keep: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Gives a qcow2 image another backing file, or none
///
/// What differs between the two backing files is copied into the image, so that the disk stays the same.
#[derive(Debug, Args)]
pub struct RebaseArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Show the progress
    #[arg(short)]
    pub progress: bool,

    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Cache mode of the image; has no effect
    #[arg(short = 't', value_name = "MODE")]
    pub cache: Option<CacheMode>,

    /// Cache mode of the backing files; has no effect
    #[arg(short = 'T', value_name = "MODE")]
    pub source_cache: Option<CacheMode>,

    /// Only change the name: you know that both backing files have the same content, or none is to be read
    #[arg(short)]
    pub unsafe_mode: bool,

    /// The backing file, relative to the image's folder; "" for none
    #[arg(short, value_name = "FILE")]
    pub backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', value_name = "FORMAT")]
    pub backing_format: Option<Format>,

    /// Read backing files even if another program writes to them
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Changes options of a qcow2 image: compat, lazy_refcounts, size
#[derive(Debug, Args)]
pub struct AmendArgs {
    /// Print nothing but errors
    #[arg(short)]
    pub quiet: bool,

    /// Show the progress
    #[arg(short)]
    pub progress: bool,

    /// Format of the image [default: by its content]
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Cache mode of the image; has no effect
    #[arg(short = 't', value_name = "MODE")]
    pub cache: Option<CacheMode>,

    /// Options of the format: KEY=VALUE,..., or help, which lists them
    #[arg(short, value_name = "OPTIONS", required = true)]
    pub options: Vec<String>,

    /// The image
    #[arg(value_name = "FILE", required_unless_present = "options")]
    pub file: Option<PathBuf>,
}

/// What a check repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Repairs {
    /// Clusters that nothing uses become free.
    Leaks,
    /// All that can be repaired.
    All,
}

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// As text.
    Human,
    /// As JSON.
    Json,
}

/// The cache modes of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Past the host's cache in QEMU.
    None,
    /// Through the host's cache.
    Writeback,
    /// Each write to stable storage in QEMU.
    Writethrough,
    /// Both in QEMU.
    Directsync,
    /// Never brought to stable storage.
    Unsafe,
}

fn preallocation(name: &str) -> Result<Preallocation, String> {
    let found = PREALLOCATIONS.iter().find(|(known, _)| *known == name);
    found
        .map(|&(_, value)| value)
        .ok_or_else(|| "expected off, metadata, falloc or full".to_owned())
}
