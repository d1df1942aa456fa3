//! What the host offers to machines.

use std::arch::x86_64::__cpuid;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::Path;
use std::sync::OnceLock;

use bantam_devices::opener::Opener;
use bantam_storage::{FileAccess, HostOpener};
use kvm_ioctls::{Cap, Kvm};

use crate::device_access;

pub use bantam_memory::open_page_map;
pub use bantam_network::can_administer_network;

const KVM_DEVICE: &str = "/dev/kvm";
/// The device by which tap interfaces are attached.
pub const TUN_DEVICE: &str = "/dev/net/tun";

/// The stable version of the KVM API; no program should run on another (KVM API, section 4.1).
const KVM_API_VERSION: i32 = 12;

/// What lets the host's processor run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
    /// Nothing in the processor: `kvm_pvm` switches page tables and emulates a guest's privileged
    /// instructions.
    Pvm,
    /// Nothing.
    None,
}

/// Finds out what lets the host's processor run guests. Later calls return the first answer.
pub fn virtualization() -> Virtualization {
    static FOUND: OnceLock<Virtualization> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // KVM has one way of running guests at a time, so a loaded module is the one in use.
        if Path::new("/sys/module/kvm_pvm").exists() {
            return Virtualization::Pvm;
        }
        // In a virtual machine, a CPUID instruction takes tens of microseconds.
        processor_virtualization(|leaf| __cpuid(leaf).ecx)
    })
}

/// Reads the processor's support from CPUID; `ecx_of` returns register ECX of a leaf. Bit 5 of leaf 1 is
/// VMX (Intel SDM, volume 2A, CPUID), bit 2 of leaf 0x8000_0001 is SVM (AMD APM, volume 3, appendix E). Both
/// leaves exist on every 64-bit processor.
fn processor_virtualization(ecx_of: impl Fn(u32) -> u32) -> Virtualization {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    if ecx_of(1) & VMX != 0 {
        Virtualization::Vmx
    } else if ecx_of(0x8000_0001) & SVM != 0 {
        Virtualization::Svm
    } else {
        Virtualization::None
    }
}

/// Why the host cannot run machines.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// `/dev/kvm` cannot be opened for reading and writing.
    #[error("cannot open /dev/kvm: {source}: {remedy}")]
    OpenKvm {
        /// Why.
        source: io::Error,
        /// What helps.
        remedy: String,
    },
    /// `/dev/kvm` is not KVM, or has another API version.
    #[error(
        "KVM has API version {found}, but version {KVM_API_VERSION} is needed: update the kernel"
    )]
    KvmApiVersion {
        /// The version found; negative if there was no answer.
        found: i32,
    },
    /// KVM lacks a capability that every machine needs.
    #[error("KVM lacks {name} ({purpose}): update the kernel")]
    KvmCapability {
        /// Name in the KVM API.
        name: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// KVM lacks a capability that the machine's configuration requires.
    #[error(
        "KVM lacks capability {number}, which the machine requires: update the kernel, or do not \
         require it"
    )]
    RequiredCapability {
        /// Number in the KVM API.
        number: u32,
    },
    /// The configuration changes CPUID, but guests see the host's own on this host.
    #[error(
        "cannot change CPUID: this host has no hardware virtualization, so that guests see the \
         host's own; leave out what changes it, or use a host with vmx or svm"
    )]
    FixedCpuid,
}

/// Says in one line what a user who may not open the device at `path` can do about it.
pub fn access_remedy(path: &Path) -> String {
    device_access::remedy(path)
}

fn open_remedy(error: &io::Error, virtualization: Virtualization) -> String {
    let remedy = match (error.kind(), virtualization) {
        (io::ErrorKind::PermissionDenied, _) => return access_remedy(Path::new(KVM_DEVICE)),
        (io::ErrorKind::NotFound, Virtualization::Vmx) => {
            "load the module: sudo modprobe kvm_intel"
        }
        (io::ErrorKind::NotFound, Virtualization::Svm) => "load the module: sudo modprobe kvm_amd",
        (io::ErrorKind::NotFound, _) => {
            "enable virtualization in the firmware, or nested virtualization if the host is itself \
             a virtual machine; in a container, pass the device in"
        }
        _ => "see that the device can be used here, and that nothing else blocks it",
    };
    remedy.to_owned()
}

/// Opens KVM, whatever capabilities it has.
///
/// # Errors
///
/// [`HostError::OpenKvm`] and [`HostError::KvmApiVersion`].
pub fn open_kvm_device() -> Result<Kvm, HostError> {
    open_kvm_device_by(&HostOpener)
}

fn open_kvm_device_by(opener: &dyn Opener) -> Result<Kvm, HostError> {
    let file = opener.file(Path::new(KVM_DEVICE), FileAccess::ReadWrite);
    let file = file.map_err(|source| HostError::OpenKvm {
        remedy: open_remedy(&source, virtualization()),
        source,
    })?;
    // SAFETY: the descriptor is open, and nothing else owns it. KVM's requests fail on any other file.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        found => Err(HostError::KvmApiVersion { found }),
    }
}

/// Opens KVM and checks that it has all capabilities that every machine needs.
///
/// # Errors
///
/// Those of [`open_kvm_device`], and [`HostError::KvmCapability`].
pub fn open_kvm() -> Result<Kvm, HostError> {
    open_kvm_by(&HostOpener)
}

/// Opens KVM by `opener`, and checks it like [`open_kvm`].
pub(crate) fn open_kvm_by(opener: &dyn Opener) -> Result<Kvm, HostError> {
    let kvm = open_kvm_device_by(opener)?;
    let missing = kvm_capabilities(&kvm).find(|found| found.required && !found.present);
    match missing {
        Some(KvmCapability { name, purpose, .. }) => {
            Err(HostError::KvmCapability { name, purpose })
        }
        None => Ok(kvm),
    }
}

/// Checks that KVM has the capabilities with these numbers.
pub(crate) fn require_capabilities(kvm: &Kvm, numbers: &[u32]) -> Result<(), HostError> {
    let missing = |number: &&u32| kvm.check_extension_raw(u64::from(**number)) <= 0;
    match numbers.iter().find(missing) {
        Some(&number) => Err(HostError::RequiredCapability { number }),
        None => Ok(()),
    }
}

/// A capability that KVM may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmCapability {
    /// Name in the KVM API.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether every machine needs it.
    pub required: bool,
    /// Whether this host's KVM has it.
    pub present: bool,
}

/// Asks KVM about each capability that machines need or make use of.
pub fn kvm_capabilities(kvm: &Kvm) -> impl Iterator<Item = KvmCapability> {
    const REQUIRED: bool = true;
    const USEFUL: bool = false;
    [
        (
            Cap::UserMemory,
            "KVM_CAP_USER_MEMORY",
            REQUIRED,
            "guest memory",
        ),
        (
            Cap::ExtCpuid,
            "KVM_CAP_EXT_CPUID",
            REQUIRED,
            "CPUID of the guest",
        ),
        (
            Cap::SetTssAddr,
            "KVM_CAP_SET_TSS_ADDR",
            REQUIRED,
            "real mode on Intel processors",
        ),
        (
            Cap::Irqchip,
            "KVM_CAP_IRQCHIP",
            REQUIRED,
            "interrupt controllers in the kernel",
        ),
        (
            Cap::Irqfd,
            "KVM_CAP_IRQFD",
            REQUIRED,
            "interrupts from devices",
        ),
        (
            Cap::Ioeventfd,
            "KVM_CAP_IOEVENTFD",
            REQUIRED,
            "notifications to devices",
        ),
        (
            Cap::TscDeadlineTimer,
            "KVM_CAP_TSC_DEADLINE_TIMER",
            USEFUL,
            "precise guest timers",
        ),
    ]
    .into_iter()
    .map(|(capability, name, required, purpose)| KvmCapability {
        name,
        purpose,
        required,
        present: kvm.check_extension(capability),
    })
}

/// Opens `/dev/net/tun`, through which tap interfaces are attached.
///
/// # Errors
///
/// If it cannot be opened for reading and writing.
pub fn open_tun() -> io::Result<File> {
    File::options().read(true).write(true).open(TUN_DEVICE)
}

/// Checks that this process may use io_uring.
///
/// # Errors
///
/// `ENOSYS` if the kernel does not have it or a filter hides it, `EPERM` if it is turned off.
pub fn check_io_uring() -> io::Result<()> {
    // SAFETY: without room for its parameters the call creates nothing, and neither reads nor
    // writes memory of this process.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_setup,
            0,
            std::ptr::null_mut::<libc::c_void>(),
        )
    };
    debug_assert_eq!(result, -1);
    match io::Error::last_os_error() {
        // The call got as far as the missing parameters.
        error if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL)) => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_say_how_they_virtualize() {
        let processor = |standard: u32, extended: u32| {
            processor_virtualization(|leaf| match leaf {
                1 => standard,
                0x8000_0001 => extended,
                _ => panic!("leaf {leaf:#x} says nothing of it"),
            })
        };
        assert_eq!(processor(1 << 5, !(1 << 2)), Virtualization::Vmx);
        assert_eq!(processor(!(1 << 5), 1 << 2), Virtualization::Svm);
        assert_eq!(processor(!(1 << 5), !(1 << 2)), Virtualization::None);
    }

    #[test]
    fn the_processor_agrees_with_the_kernel() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has = |flag| cpuinfo.split_whitespace().any(|word| word == flag);
        // The flags are missing there if the firmware has switched the feature off.
        let found = processor_virtualization(|leaf| __cpuid(leaf).ecx);
        if has("vmx") {
            assert_eq!(found, Virtualization::Vmx);
        } else if has("svm") {
            assert_eq!(found, Virtualization::Svm);
        }
    }

    #[test]
    fn an_unusable_kvm_device_comes_with_a_remedy() {
        for (virtualization, part) in [
            (Virtualization::Vmx, "modprobe kvm_intel"),
            (Virtualization::Svm, "modprobe kvm_amd"),
            (Virtualization::None, "firmware"),
        ] {
            let remedy = open_remedy(&io::ErrorKind::NotFound.into(), virtualization);
            assert!(remedy.contains(part), "{remedy}");
        }
    }

    #[test]
    fn io_uring_answers_without_creating_a_ring() {
        if let Err(error) = check_io_uring() {
            assert!(
                matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)),
                "{error}"
            );
        }
    }
}
