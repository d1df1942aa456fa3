//! CPUID leaves: the features of KVM and the host's processor, adapted to one vCPU of this machine.
//!
//! The machine is one package of cores with one thread each, or two with simultaneous
//! multithreading (SMT). The local APIC id of a vCPU is its index, so that vCPUs with neighbouring
//! ids are the threads of a core.

mod features;
mod modifier;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{Error, Result, check_vcpu_count};

pub use features::missing_features;
pub use modifier::{CpuidModifier, CpuidRegister, modify_cpuid};

const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const KVM_FEATURES: u32 = 0x4000_0001;
const HIGHEST_EXTENDED: u32 = 0x8000_0000;
const FEATURES_AMD: u32 = 0x8000_0001;
const SIZES_AMD: u32 = 0x8000_0008;
const CACHES_AMD: u32 = 0x8000_001d;
const IDS_AMD: u32 = 0x8000_001e;
const TOPOLOGY_AMD: u32 = 0x8000_0026;

/// Bits of [`FEATURES`].
const ECX_TSC_DEADLINE_TIMER: u32 = 24;
const ECX_HYPERVISOR: u32 = 31;
const EDX_HYPER_THREADING: u32 = 28;

/// Bits of [`KVM_FEATURES`] (Linux Documentation/virt/kvm/x86/cpuid.rst).
const EAX_PV_UNHALT: u32 = 7;
const EAX_PV_SEND_IPI: u32 = 11;
const EAX_PV_SCHED_YIELD: u32 = 13;

/// Bits of [`FEATURES_AMD`].
const ECX_CORE_MULTIPROCESSING_LEGACY: u32 = 1;
const ECX_TOPOLOGY_EXTENSIONS: u32 = 22;

/// Level types of [`TOPOLOGY`] and [`TOPOLOGY_V2`].
const LEVEL_INVALID: u32 = 0;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Which vCPUs a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Whether each pair of them are the threads of one core. A single vCPU has a core of its own.
    pub smt: bool,
}

/// Builds the CPUID table of the vCPU with index `vcpu_index` in `topology`, from the leaves that
/// `KVM_GET_SUPPORTED_CPUID` returned.
///
/// Features stay as KVM returned them. Values that describe the host's processors rather than the
/// guest's are replaced: ids and counts (leaf 1), topology (leaves 0xb, 0x1f, AMD 0x8000_0008,
/// 0x8000_001e and 0x8000_0026) and which processors share a cache (Intel leaf 4, AMD 0x8000_001d):
/// first and second levels are a core's own, further ones the package's. The sections implemented
/// are CPUID in Intel SDM volume 2 and appendix E.3 and E.4 of AMD APM volume 3.
///
/// `tsc_deadline_timer` says whether KVM has `KVM_CAP_TSC_DEADLINE_TIMER`, which most versions
/// leave out of the leaves they return (KVM API, `KVM_GET_SUPPORTED_CPUID`).
///
/// # Errors
/// If the number of vCPUs is zero, above [`MAX_VCPUS`](crate::layout::MAX_VCPUS), or odd although
/// two share a core; if `vcpu_index` is not below it; or if the table is longer than KVM accepts.
pub fn vcpu_cpuid(
    supported: &[kvm_cpuid_entry2],
    vcpu_index: u8,
    topology: Topology,
    tsc_deadline_timer: bool,
) -> Result<CpuId> {
    let Topology { vcpu_count, smt } = topology;
    check_vcpu_count(vcpu_count)?;
    let threads_per_core = if smt && vcpu_count > 1 { 2 } else { 1 };
    if !vcpu_count.is_multiple_of(threads_per_core) {
        return Err(Error::UnpairedVcpu { count: vcpu_count });
    }
    if vcpu_index >= vcpu_count {
        return Err(Error::VcpuIndex {
            index: vcpu_index,
            count: vcpu_count,
        });
    }
    let vcpu = Vcpu {
        id: u32::from(vcpu_index),
        count: u32::from(vcpu_count),
        threads_per_core: u32::from(threads_per_core),
        tsc_deadline_timer,
    };
    let host = Host::new(supported);

    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|entry| ![TOPOLOGY, TOPOLOGY_V2, TOPOLOGY_AMD].contains(&entry.function))
        .filter(|entry| !(host.has_amd_ids() && entry.function == IDS_AMD))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            FEATURES => vcpu.describe_features(entry),
            CACHES_INTEL => vcpu.describe_intel_cache(entry),
            FEATURES_AMD if host.is_amd => {
                set_bit(
                    &mut entry.ecx,
                    ECX_CORE_MULTIPROCESSING_LEGACY,
                    vcpu.count > 1,
                );
            }
            SIZES_AMD if host.is_amd => {
                set_field(&mut entry.ecx, 0, 8, vcpu.count - 1);
                set_field(&mut entry.ecx, 12, 4, vcpu.id_width());
            }
            CACHES_AMD if host.is_amd => vcpu.describe_amd_cache(entry),
            _ => {}
        }
    }
    for function in [TOPOLOGY, TOPOLOGY_V2] {
        if host.highest_basic >= function {
            entries.extend(vcpu.topology(function));
        }
    }
    if host.has_amd_ids() {
        entries.push(vcpu.amd_ids());
    }

    CpuId::from_entries(&entries).map_err(|_| Error::CpuidTooLong {
        vcpu_index,
        count: entries.len(),
    })
}

/// Removes from `supported`, the leaves that `KVM_GET_SUPPORTED_CPUID` returned, the features that
/// make a guest with several vCPUs issue hypercalls.
///
/// `vmcall` and `vmmcall` differ between processors, and KVM patches one to the other in the
/// guest's code. If KVM emulates the guest's kernel, that is a write to read-only memory, which
/// crashes the kernel.
pub fn hide_hypercalls(supported: &mut [kvm_cpuid_entry2]) {
    for entry in supported {
        if entry.function == KVM_FEATURES {
            for bit in [EAX_PV_UNHALT, EAX_PV_SEND_IPI, EAX_PV_SCHED_YIELD] {
                set_bit(&mut entry.eax, bit, false);
            }
        }
    }
}

/// The vendor, which decides which leaves the guest reads.
struct Host {
    /// AMD, or Hygon, whose processors are AMD's design: the same leaves mean the same.
    is_amd: bool,
    has_topology_extensions: bool,
    highest_basic: u32,
    highest_extended: u32,
}

impl Host {
    fn new(supported: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |function| {
            supported
                .iter()
                .find(|entry| entry.function == function)
                .copied()
                .unwrap_or_default()
        };
        let first = leaf(0);
        let vendor = [first.ebx, first.edx, first.ecx].map(u32::to_le_bytes);
        Self {
            is_amd: [b"AuthenticAMD", b"HygonGenuine"]
                .iter()
                .any(|name| vendor.as_flattened() == *name),
            has_topology_extensions: leaf(FEATURES_AMD).ecx & (1 << ECX_TOPOLOGY_EXTENSIONS) != 0,
            highest_basic: first.eax,
            highest_extended: leaf(HIGHEST_EXTENDED).eax,
        }
    }

    /// Returns whether the guest reads a vCPU's ids from [`IDS_AMD`].
    fn has_amd_ids(&self) -> bool {
        self.is_amd && self.has_topology_extensions && self.highest_extended >= IDS_AMD
    }
}

/// One vCPU and its place among those of its machine.
struct Vcpu {
    id: u32,
    count: u32,
    threads_per_core: u32,
    tsc_deadline_timer: bool,
}

impl Vcpu {
    /// Returns how many low bits of a local APIC id distinguish the vCPUs.
    fn id_width(&self) -> u32 {
        self.count.next_power_of_two().ilog2()
    }

    /// Returns how many of these distinguish the threads of a core.
    fn thread_id_width(&self) -> u32 {
        self.threads_per_core.ilog2()
    }

    fn describe_features(&self, entry: &mut kvm_cpuid_entry2) {
        set_field(&mut entry.ebx, 16, 8, self.count);
        set_field(&mut entry.ebx, 24, 8, self.id);
        set_bit(
            &mut entry.ecx,
            ECX_TSC_DEADLINE_TIMER,
            self.tsc_deadline_timer,
        );
        set_bit(&mut entry.ecx, ECX_HYPERVISOR, true);
        set_bit(&mut entry.edx, EDX_HYPER_THREADING, self.count > 1);
    }

    /// Intel counts the ids that could exist, which is the next power of two.
    fn describe_intel_cache(&self, entry: &mut kvm_cpuid_entry2) {
        if let Some(cache) = Cache::of(entry) {
            let ids = 1 << self.id_width();
            let sharers = if cache.is_shared() {
                ids
            } else {
                self.threads_per_core
            };
            set_field(&mut entry.eax, 14, 12, sharers - 1);
            set_field(&mut entry.eax, 26, 6, ids / self.threads_per_core - 1);
        }
    }

    /// AMD counts the processors that exist.
    fn describe_amd_cache(&self, entry: &mut kvm_cpuid_entry2) {
        if let Some(cache) = Cache::of(entry) {
            let sharers = if cache.is_shared() {
                self.count
            } else {
                self.threads_per_core
            };
            set_field(&mut entry.eax, 14, 12, sharers - 1);
        }
    }

    /// Returns the levels of the topology; the last one marks the end.
    fn topology(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index, kind, shift, processors| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: self.id,
            ..Default::default()
        };
        [
            level(
                0,
                LEVEL_THREAD,
                self.thread_id_width(),
                self.threads_per_core,
            ),
            level(1, LEVEL_CORE, self.id_width(), self.count),
            level(2, LEVEL_INVALID, 0, 0),
        ]
    }

    /// Returns the ids of the vCPU and its core, in the one node of the package.
    fn amd_ids(&self) -> kvm_cpuid_entry2 {
        let core = self.id >> self.thread_id_width();
        kvm_cpuid_entry2 {
            function: IDS_AMD,
            eax: self.id,
            ebx: core | (self.threads_per_core - 1) << 8,
            ..Default::default()
        }
    }
}

/// A cache as described by [`CACHES_INTEL`] and, with the same bits, [`CACHES_AMD`].
struct Cache {
    level: u32,
}

impl Cache {
    /// Returns the cache that an entry describes, unless the entry only ends the list.
    fn of(entry: &kvm_cpuid_entry2) -> Option<Self> {
        let kind = entry.eax & 0x1f;
        (kind != 0).then_some(Self {
            level: entry.eax >> 5 & 0x7,
        })
    }

    fn is_shared(&self) -> bool {
        self.level > 2
    }
}

fn set_bit(register: &mut u32, bit: u32, value: bool) {
    set_field(register, bit, 1, u32::from(value));
}

fn set_field(register: &mut u32, shift: u32, width: u32, value: u32) {
    let mask = ((1 << width) - 1) << shift;
    *register = *register & !mask | value << shift & mask;
}

#[cfg(test)]
mod tests;
