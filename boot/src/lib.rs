//! What a guest starts from: kernel image, initrd, command line, and the structures by which a boot
//! protocol passes them to the kernel.
//!
//! This crate turns files and tables into guest memory and nothing else: it opens no file, runs
//! no vCPU and sets no register. A machine boots in this order:
//!
//! 1. [`load_kernel`] puts the kernel into memory and says where and how to enter it;
//! 2. [`load_initrd`] puts the initial RAM disk above it;
//! 3. [`write_start_information`] writes what the chosen protocol passes to the kernel, the
//!    [`CommandLine`] included, and returns the address that goes into the boot register.
//!
//! Guest memory must be fresh, that is, zero: the zeroes of an image (`.bss`) are not written.

#![forbid(unsafe_code)]

mod command_line;
mod image_file;
mod initrd;
mod kernel;
mod root_partition;
mod start_information;
#[cfg(test)]
mod test_images;

pub use command_line::{CommandLine, CommandLineError};
pub use image_file::ImageFileError;
pub use initrd::{Initrd, InitrdError, load_initrd};
pub use kernel::{
    BootProtocol, Compression, InitOverflow, KernelError, KernelFormat, LoadedKernel, PayloadError,
    load_kernel,
};
pub use root_partition::find_root_partition;
pub use start_information::{
    RANDOM_SEED_SIZE, StartInformation, StartInformationError, write_start_information,
};
