//! Common parts of Bantam's tests on real KVM and its benchmarks: they find and build the monitor
//! and the guests, and start machines that can be waited for and are never left behind.

mod api;
mod api_machine;
mod artefacts;
pub mod conversation;
pub mod counting;
mod huge_pages;
mod images;
mod linux;
mod load;
mod loop_device;
mod machines;
mod network;
mod owner;
pub mod page_server;
mod pattern;
mod process;
mod qemu_img;
mod requirements;
mod stalling_storage;
mod temporary;
mod terminal;
mod traffic;
mod traveller;
pub mod two_hosts;
pub mod virtual_host;
mod watchdog;
mod workload;
pub mod world;

pub use api::{Answer, ApiClient};
pub use api_machine::{ApiMachine, bare_metal_boot_source};
pub use artefacts::{
    Kernel, RootFileSystem, bzimages, debian_kernel, debian_root, monitor, payload, sysprep_initrd,
};
pub use huge_pages::HugePagePool;
pub use images::{BzImage, Compression, elf_kernel};
pub use linux::{BusyLinux, LinuxSlot, answer, linux_slot, partitioned_image, scripted_root};
pub use load::Load;
pub use loop_device::LoopDevice;
pub use machines::{Machines, files_below, read_until};
pub use network::{HostBridge, HostTap, PacketSocket, accept, interface_exists, tap_name};
pub use owner::{balloon_statistics, configured, copy_memory, device, device_metrics};
pub use pattern::{crc32, first_difference, fnv1a, pattern};
pub use process::{
    Bantam, Ended, Running, STATUS_ERROR, STATUS_POWER_CUT, STATUS_REBOOT, unprivileged,
    with_devices, with_file_size_limit, with_mounts,
};
pub use qemu_img::{check_image, qemu_img};
pub use requirements::{
    lacks_fuse, lacks_huge_pages, lacks_kvm, lacks_loop_devices, lacks_namespaces, lacks_taps,
};
pub use stalling_storage::StallingStorage;
pub use temporary::memory_folder;
pub use terminal::Terminal;
pub use traffic::Traffic;
pub use traveller::{Traveller, arrive, gone_on, vsock_of};
pub use workload::after_random_work;

/// Ends a test that cannot run on this host. The test fails with the reason; if the environment
/// variable `BANTAM_SKIP_KVM_TESTS` is 1, it prints that it is skipped instead.
#[macro_export]
macro_rules! require_kvm {
    () => {
        if $crate::lacks_kvm() {
            return;
        }
    };
}

/// Like [`require_kvm`], for tests that also create network interfaces; `BANTAM_SKIP_TAP_TESTS` set
/// to 1 skips them if they cannot.
#[macro_export]
macro_rules! require_taps {
    () => {
        if $crate::lacks_kvm() || $crate::lacks_taps() {
            return;
        }
    };
}

/// Like [`require_kvm`], but for tests that use [`with_devices`] or [`with_mounts`];
/// `BANTAM_SKIP_NAMESPACE_TESTS` set to 1 skips them if they cannot create mount namespaces.
#[macro_export]
macro_rules! require_namespaces {
    () => {
        if $crate::lacks_namespaces() {
            return;
        }
    };
}

/// Like [`require_kvm`], for tests that also use a [`LoopDevice`]; `BANTAM_SKIP_LOOP_TESTS` set to
/// 1 skips them if they cannot make one.
#[macro_export]
macro_rules! require_loop_devices {
    () => {
        if $crate::lacks_kvm() || $crate::lacks_loop_devices() {
            return;
        }
    };
}

/// Like [`require_kvm`], for tests that also use a [`StallingStorage`]; `BANTAM_SKIP_FUSE_TESTS` set
/// to 1 skips them if they cannot mount one.
#[macro_export]
macro_rules! require_fuse {
    () => {
        if $crate::lacks_kvm() || $crate::lacks_fuse() {
            return;
        }
    };
}

/// Like [`require_kvm`], for tests that also use a [`HugePagePool`], which are skipped if the host
/// provides none.
#[macro_export]
macro_rules! require_huge_pages {
    () => {
        if $crate::lacks_kvm() || $crate::lacks_huge_pages() {
            return;
        }
    };
}
