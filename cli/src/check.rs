//! `bantam check`: a table of the host's features.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, bail};
use bantam_jail::{Files, Filter};
use bantam_vmm::host::{self, KvmCapability, Virtualization};
use bantam_vmm::text::without_error_numbers;

use crate::default_kernel;

/// The state of one feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    /// It is present.
    Ok,
    /// It is missing; machines run without it, but not all of them or not as well.
    Limited,
    /// It is missing, and no machine runs without it.
    Missing,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        })
    }
}

/// A line of the table, and the line below it with the remedy.
#[derive(Debug)]
struct Row {
    subject: &'static str,
    status: Status,
    found: String,
    remedy: Option<String>,
}

impl Row {
    fn ok(subject: &'static str, found: impl Into<String>) -> Self {
        Self {
            subject,
            status: Status::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn limited(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            subject,
            status: Status::Limited,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// Prints the table.
///
/// # Errors
///
/// If no machine can run on this host.
pub fn check(out: &mut impl Write) -> anyhow::Result<()> {
    let mut rows = vec![virtualization_row(host::virtualization())];
    rows.extend(kvm_rows());
    rows.push(tun_row(host::open_tun().map(drop)));
    rows.push(network_administration_row(host::can_administer_network()));
    rows.push(io_uring_row(host::check_io_uring()));
    rows.push(filters_row(Filter::are_available()));
    rows.push(landlock_row(Files::kernel_version()));
    rows.push(kernel_row(default_kernel::find().as_deref()));
    print_table(&rows, out).context("cannot print the table")?;
    if rows.iter().any(|row| row.status == Status::Missing) {
        bail!("machines cannot run on this host: see what is missing above");
    }
    Ok(())
}

fn print_table(rows: &[Row], out: &mut impl Write) -> io::Result<()> {
    for Row {
        subject,
        status,
        found,
        remedy,
    } in rows
    {
        let found = without_error_numbers(found.clone());
        writeln!(out, "{subject:<27} {status:<8} {found}")?;
        if let Some(remedy) = remedy {
            writeln!(out, "{:<27} {:<8} -> {remedy}", "", "")?;
        }
    }
    Ok(())
}

fn virtualization_row(virtualization: Virtualization) -> Row {
    const SUBJECT: &str = "processor virtualization";
    match virtualization {
        Virtualization::Vmx => Row::ok(SUBJECT, "Intel VT-x (vmx)"),
        Virtualization::Svm => Row::ok(SUBJECT, "AMD-V (svm)"),
        Virtualization::Pvm => Row::limited(
            SUBJECT,
            "none, but KVM runs guests without it (kvm_pvm): guest kernels are slow, and \
             some cannot run",
            "use a guest kernel made for such hosts; bantam run adds words to its command line \
             (see --host-workarounds)",
        ),
        Virtualization::None => Row::limited(
            SUBJECT,
            "none found (CPUID reports neither VMX nor SVM)",
            "enable virtualization in the firmware, or nested virtualization if the host is itself \
             a virtual machine",
        ),
    }
}

fn kernel_row(kernel: Option<&Path>) -> Row {
    const SUBJECT: &str = "default kernel";
    match kernel {
        Some(path) => Row::ok(SUBJECT, path.display().to_string()),
        None => Row::limited(
            SUBJECT,
            "none is installed",
            "give each machine a kernel (--kernel FILE), or install Bantam's (make install)",
        ),
    }
}

fn kvm_rows() -> Vec<Row> {
    const SUBJECT: &str = "/dev/kvm";
    let kvm = match host::open_kvm_device() {
        Ok(kvm) => kvm,
        Err(error) => {
            return vec![Row {
                subject: SUBJECT,
                status: Status::Missing,
                found: error.to_string(),
                remedy: None,
            }];
        }
    };
    let mut rows = vec![
        Row::ok(SUBJECT, format!("API version {}", kvm.get_api_version())),
        Row::ok(
            "vCPUs of one machine",
            format!("KVM allows {}", kvm.get_max_vcpus()),
        ),
    ];
    rows.extend(host::kvm_capabilities(&kvm).map(capability_row));
    rows
}

fn capability_row(capability: KvmCapability) -> Row {
    let KvmCapability {
        name,
        purpose,
        required,
        present,
    } = capability;
    let status = match (present, required) {
        (true, _) => Status::Ok,
        (false, false) => Status::Limited,
        (false, true) => Status::Missing,
    };
    let remedy = (!present).then(|| "update the host's kernel".to_owned());
    Row {
        subject: name,
        status,
        found: purpose.to_owned(),
        remedy,
    }
}

fn tun_row(opened: io::Result<()>) -> Row {
    const SUBJECT: &str = "/dev/net/tun";
    let Err(error) = opened else {
        return Row::ok(SUBJECT, "tap interfaces can be opened (--net)");
    };
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "load the module: sudo modprobe tun".to_owned(),
        io::ErrorKind::PermissionDenied => host::access_remedy(Path::new(host::TUN_DEVICE)),
        _ => "see that the device can be used here".to_owned(),
    };
    Row::limited(SUBJECT, error.to_string(), format!("for --net: {remedy}"))
}

fn network_administration_row(allowed: bool) -> Row {
    const SUBJECT: &str = "CAP_NET_ADMIN";
    if allowed {
        Row::ok(SUBJECT, "any tap interface can be used, or created")
    } else {
        Row::limited(
            SUBJECT,
            "only tap interfaces that belong to this user can be used",
            "create one: sudo ip tuntap add tap0 mode tap user $USER",
        )
    }
}

fn io_uring_row(checked: io::Result<()>) -> Row {
    const SUBJECT: &str = "io_uring";
    let Err(error) = checked else {
        return Row::ok(SUBJECT, "available");
    };
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "machines run without it; to allow it: sudo sysctl kernel.io_uring_disabled=0, \
             and in a container a seccomp profile that allows it"
        }
        _ => {
            "machines run without it; to have it: a kernel with CONFIG_IO_URING, and in a \
             container a seccomp profile that allows it"
        }
    };
    Row::limited(SUBJECT, error.to_string(), remedy)
}

fn filters_row(available: bool) -> Row {
    const SUBJECT: &str = "filters of system calls";
    match available {
        true => Row::ok(
            SUBJECT,
            "each thread makes only the calls of its role (--seccomp)",
        ),
        false => Row::limited(
            SUBJECT,
            "the kernel has none",
            "machines run without them; to have them: a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

fn landlock_row(version: Option<u32>) -> Row {
    const SUBJECT: &str = "Landlock";
    // Since then it has rules for signals and abstract sockets, the last that are used.
    const COMPLETE: u32 = 6;
    match version {
        Some(COMPLETE..) => Row::ok(
            SUBJECT,
            "a machine's process opens only the machine's files (--landlock)",
        ),
        Some(version) => Row::limited(
            SUBJECT,
            format!("version {version}: it does not cover all that it should"),
            "machines run with what there is; to have all: Linux 6.12 or newer",
        ),
        None => Row::limited(
            SUBJECT,
            "the kernel has none, or it is switched off",
            "machines run without it; to have it: Linux 5.13 or newer with landlock in lsm= on its command line",
        ),
    }
}

#[cfg(test)]
mod tests {
    use nix::libc;

    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_thing_and_one_for_each_remedy() {
        let rows = [
            Row::ok("one", "here"),
            Row::limited("two", "not here (os error 13)", "get it"),
        ];
        let mut table = Vec::new();
        print_table(&rows, &mut table).unwrap();
        assert_eq!(
            String::from_utf8(table).unwrap(),
            format!(
                "{:27} {:8} here\n{:27} {:8} not here\n{:36} -> get it\n",
                "one", "ok", "two", "limited", ""
            )
        );
    }

    #[test]
    fn only_what_every_machine_needs_is_missing() {
        let capability = |required, present| KvmCapability {
            name: "KVM_CAP_X",
            purpose: "x",
            required,
            present,
        };
        assert_eq!(capability_row(capability(true, true)).status, Status::Ok);
        assert_eq!(
            capability_row(capability(true, false)).status,
            Status::Missing
        );
        assert_eq!(
            capability_row(capability(false, false)).status,
            Status::Limited
        );
        assert_eq!(network_administration_row(false).status, Status::Limited);
    }

    #[test]
    fn remedies_fit_the_error() {
        let remedy = |row: Row| row.remedy.unwrap();
        let error = |code| Err(io::Error::from_raw_os_error(code));
        assert!(remedy(tun_row(error(libc::ENOENT))).contains("modprobe tun"));
        assert!(remedy(tun_row(error(libc::EACCES))).starts_with("for --net: "));
        assert!(remedy(io_uring_row(error(libc::EPERM))).contains("kernel.io_uring_disabled"));
        assert!(remedy(io_uring_row(error(libc::ENOSYS))).contains("CONFIG_IO_URING"));
    }
}
