//! What becomes of each element and attribute of a domain: one table for all that is not understood and still decided.
//!
//! What is not in the table is kept, reported, and without effect.

/// What becomes of an element.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    /// It is understood: it becomes a part of the machine, and is written anew from the machine.
    Known(&'static Spec),
    /// It is kept and not worth a word.
    Quiet,
    /// The machine would not be what the domain says; this is what to do about it.
    Refused(&'static str),
}

/// What becomes of what is in an element.
#[derive(Debug)]
pub(crate) struct Spec {
    /// Attributes that are understood.
    pub(crate) attributes: &'static [&'static str],
    /// Attributes that are kept and not worth a word.
    pub(crate) quiet: &'static [&'static str],
    /// Elements that are decided.
    pub(crate) children: &'static [(&'static str, Fate)],
    /// Whether other elements are not worth a word either.
    pub(crate) is_open: bool,
}

impl Spec {
    /// Returns what becomes of an element called `name`, if it is decided.
    pub(crate) fn fate(&self, name: &str) -> Option<Fate> {
        let found = self.children.iter().find(|(it, _)| *it == name);
        match found {
            Some((_, fate)) => Some(*fate),
            None if self.is_open => Some(Fate::Quiet),
            None => None,
        }
    }
}

const fn spec(
    attributes: &'static [&'static str],
    quiet: &'static [&'static str],
    children: &'static [(&'static str, Fate)],
) -> Spec {
    Spec {
        attributes,
        quiet,
        children,
        is_open: false,
    }
}

use Fate::{Known, Quiet, Refused};

const TEXT: Spec = spec(&[], &[], &[]);
const NO_DEVICE: &str =
    "remove it, as the guest would find no such device, or run the machine by QEMU";
const STORAGE: &str = "use an image in a file or on a block device that is not encrypted";
const USE_NETWORKS: &str =
    "remove it; networks of Bantam filter and separate their guests (docs/networks.md)";

/// The domain.
pub(crate) const DOMAIN: Spec = spec(
    &["type", "id"],
    &[],
    &[
        ("name", Known(&TEXT)),
        ("uuid", Known(&TEXT)),
        ("title", Known(&TEXT)),
        ("description", Quiet),
        (
            "metadata",
            Known(&Spec {
                attributes: &[],
                quiet: &[],
                children: &[],
                is_open: true,
            }),
        ),
        ("memory", Known(&spec(&["unit"], &["dumpCore"], &[]))),
        ("currentMemory", Known(&spec(&["unit"], &[], &[]))),
        (
            "memoryBacking",
            Known(&spec(&[], &[], &[("hugepages", Known(&HUGE_PAGES))])),
        ),
        ("vcpu", Known(&spec(&["current"], &["placement"], &[]))),
        ("memtune", Known(&MEMORY_LIMITS)),
        ("cputune", Known(&PROCESSOR_LIMITS)),
        (
            "vcpus",
            Refused("remove it: the number of vCPUs in <vcpu> is all that there is"),
        ),
        ("os", Known(&OS)),
        (
            "features",
            Known(&spec(
                &[],
                &[],
                &[("acpi", Quiet), ("apic", Quiet), ("pae", Quiet)],
            )),
        ),
        ("cpu", Known(&CPU)),
        (
            "clock",
            Known(&spec(&[], &["offset", "adjustment", "basis"], &[])),
        ),
        ("sysinfo", Known(&SYSTEM_INFORMATION)),
        ("on_poweroff", Known(&TEXT)),
        ("on_reboot", Known(&TEXT)),
        ("on_crash", Known(&TEXT)),
        ("devices", Known(&DEVICES)),
        (
            "launchSecurity",
            Refused("remove it: guest memory is not encrypted"),
        ),
        (
            "bootloader",
            Refused("give the guest's kernel by <kernel> in <os>"),
        ),
        ("idmap", Refused("remove it: it is for containers")),
    ],
);

const HUGE_PAGES: Spec = spec(
    &[],
    &[],
    &[("page", Known(&spec(&["size", "unit"], &[], &[])))],
);

const MEMORY_LIMITS: Spec = spec(
    &[],
    &[],
    &[
        ("hard_limit", Known(&spec(&["unit"], &[], &[]))),
        ("soft_limit", Known(&spec(&["unit"], &[], &[]))),
    ],
);

const PROCESSOR_LIMITS: Spec = spec(
    &[],
    &[],
    &[
        ("shares", Known(&TEXT)),
        ("global_period", Known(&TEXT)),
        ("global_quota", Known(&TEXT)),
    ],
);

const OS: Spec = spec(
    &[],
    &[],
    &[
        ("type", Known(&spec(&["arch"], &["machine"], &[]))),
        ("kernel", Known(&TEXT)),
        ("initrd", Known(&TEXT)),
        ("cmdline", Known(&TEXT)),
        ("smbios", Known(&spec(&["mode"], &[], &[]))),
        ("bootmenu", Quiet),
        (
            "loader",
            Refused("remove it and <nvram>, and give the guest's kernel by <kernel>"),
        ),
        ("acpi", Refused("remove it: Bantam makes the ACPI tables")),
        (
            "dtb",
            Refused("remove it: there is no device tree on x86-64"),
        ),
    ],
);

const CPU: Spec = spec(
    &[],
    &["mode", "match", "check", "migratable"],
    &[
        ("model", Quiet),
        (
            "topology",
            Known(&spec(&["sockets", "dies", "cores", "threads"], &[], &[])),
        ),
        ("numa", Refused("remove it: the guest has one NUMA node")),
    ],
);

const SYSTEM_INFORMATION: Spec = spec(
    &["type"],
    &[],
    &[
        (
            "system",
            Known(&spec(&[], &[], &[("entry", Known(&ENTRY))])),
        ),
        (
            "chassis",
            Known(&spec(&[], &[], &[("entry", Known(&ENTRY))])),
        ),
    ],
);

const ENTRY: Spec = spec(&["name"], &[], &[]);

/// The devices.
pub(crate) const DEVICES: Spec = spec(
    &[],
    &[],
    &[
        ("disk", Known(&DISK)),
        ("interface", Known(&INTERFACE)),
        ("serial", Known(&STREAM)),
        ("console", Known(&STREAM)),
        ("channel", Known(&STREAM)),
        ("rng", Known(&ENTROPY)),
        ("memballoon", Known(&BALLOON)),
        ("vsock", Known(&VSOCK)),
        (
            "hostdev",
            Refused("remove it: devices of the host are not passed on"),
        ),
        (
            "filesystem",
            Refused("remove it, and bring the files to the guest by a disk or a network"),
        ),
        ("tpm", Refused(NO_DEVICE)),
        ("shmem", Refused(NO_DEVICE)),
        (
            "memory",
            Refused("remove it, and give all memory by <memory> of the domain"),
        ),
        (
            "lease",
            Refused("remove it: Bantam locks the images themselves"),
        ),
        ("nvram", Quiet),
    ],
);

const ALIAS: (&str, Fate) = ("alias", Known(&spec(&["name"], &[], &[])));
const ADDRESS: (&str, Fate) = ("address", Quiet);
const BOOT: (&str, Fate) = ("boot", Quiet);

const DISK: Spec = spec(
    &["type", "device"],
    &["snapshot"],
    &[
        (
            "driver",
            Known(&spec(
                &["type", "cache", "queues", "io"],
                &["name", "discard"],
                &[],
            )),
        ),
        (
            "source",
            Known(&spec(
                &["file", "dev"],
                &["index"],
                &[
                    ("encryption", Refused(STORAGE)),
                    ("reservations", Refused(STORAGE)),
                    ("auth", Refused(STORAGE)),
                ],
            )),
        ),
        ("target", Known(&spec(&["dev", "bus"], &[], &[]))),
        ("readonly", Known(&TEXT)),
        ("serial", Known(&TEXT)),
        ("blockio", Known(&spec(&["logical_block_size"], &[], &[]))),
        (
            "iotune",
            Known(&spec(
                &[],
                &[],
                &[
                    ("total_bytes_sec", Known(&TEXT)),
                    ("total_iops_sec", Known(&TEXT)),
                ],
            )),
        ),
        (
            "backingStore",
            Known(&Spec {
                attributes: &["type", "index"],
                quiet: &[],
                children: &[],
                is_open: true,
            }),
        ),
        ("encryption", Refused(STORAGE)),
        ("auth", Refused(STORAGE)),
        (
            "transient",
            Refused("remove it, and give the machine an overlay (bantam image create --backing)"),
        ),
        (
            "shareable",
            Refused(
                "remove it, or make the disk <readonly/>: two machines do not write to one image",
            ),
        ),
        ALIAS,
        ADDRESS,
        BOOT,
    ],
);

const INTERFACE: Spec = spec(
    &["type"],
    &[],
    &[
        ("mac", Known(&spec(&["address"], &["type", "check"], &[]))),
        (
            "source",
            Known(&spec(
                &["network", "bridge", "dev", "mode", "portid"],
                &[],
                &[],
            )),
        ),
        ("model", Known(&spec(&["type"], &[], &[]))),
        ("mtu", Known(&spec(&["size"], &[], &[]))),
        ("driver", Known(&spec(&["queues"], &[], &[]))),
        ("target", Known(&spec(&["dev", "managed"], &[], &[]))),
        ("link", Quiet),
        ("filterref", Refused(USE_NETWORKS)),
        ("vlan", Refused(USE_NETWORKS)),
        ("virtualport", Refused(USE_NETWORKS)),
        ("port", Refused(USE_NETWORKS)),
        (
            "script",
            Refused("remove it, and prepare the tap before the machine is started"),
        ),
        ALIAS,
        ADDRESS,
        BOOT,
    ],
);

const STREAM: Spec = spec(
    &["type", "tty"],
    &[],
    &[
        ("source", Known(&spec(&["path", "mode"], &[], &[]))),
        (
            "target",
            Known(&spec(
                &["type", "port", "name", "state"],
                &[],
                &[("model", Quiet)],
            )),
        ),
        ALIAS,
        ADDRESS,
    ],
);

const ENTROPY: Spec = spec(
    &["model"],
    &[],
    &[
        ("backend", Known(&spec(&["model"], &[], &[]))),
        ("rate", Known(&spec(&["bytes", "period"], &[], &[]))),
        ALIAS,
        ADDRESS,
    ],
);

const BALLOON: Spec = spec(
    &["model", "autodeflate", "freePageReporting"],
    &[],
    &[
        ("stats", Known(&spec(&["period"], &[], &[]))),
        ALIAS,
        ADDRESS,
    ],
);

const VSOCK: Spec = spec(
    &["model"],
    &[],
    &[
        ("cid", Known(&spec(&["auto", "address"], &[], &[]))),
        ALIAS,
        ADDRESS,
    ],
);
