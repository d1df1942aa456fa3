//! Moving machines to other hosts.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bantam_vmm::{AtTimeout, MigrationOptions};

use super::Session;
use super::args::{Arguments, scaled};
use super::domains::domain;
use crate::migrate::{Destination, Relocation, SshHost};

/// The longest downtime, as libvirt has it by default.
const DOWNTIME: Duration = Duration::from_millis(300);

pub fn migrate(_session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    if !machine.is_active()? {
        bail!("Requested operation is not valid: domain is not running");
    }
    let destination = destination(arguments.needed("desturi")?)?;
    let name = arguments.value("dname").map(str::parse).transpose()?;
    let timeout = arguments.value("timeout");
    let timeout = timeout.map(|text| scaled(text, 1, "timeout")).transpose()?;
    let is_live = arguments.has("live");
    let relocation = Relocation {
        machine: Path::new(machine.name().as_str()),
        destination: &destination,
        name: name.as_ref(),
        tls_folder: None,
        insecure: false,
        dry_run: false,
        undefine_source: arguments.has("undefinesource"),
        options: MigrationOptions {
            downtime: DOWNTIME,
            timeout: match (is_live, timeout) {
                // It stands still from the end of the first round on.
                (false, _) => Duration::ZERO,
                (true, Some(seconds)) => Duration::from_secs(seconds),
                (true, None) => Duration::MAX,
            },
            // That is what virsh does after its timeout, with or without `--timeout-suspend`.
            at_timeout: AtTimeout::Stop,
            max_throttle: match arguments.has("auto-converge") {
                true => 99,
                false => 0,
            },
            ..MigrationOptions::default()
        },
    };
    relocation
        .execute()
        .with_context(|| format!("Failed to migrate domain '{}'", machine.name()))?;
    Ok(())
}

/// Reads a URI of libvirt that leads to another host by ssh.
fn destination(uri: &str) -> anyhow::Result<Destination> {
    let host = uri.strip_prefix("qemu+ssh://").and_then(|rest| {
        let (host, path) = rest.split_once('/')?;
        matches!(path, "system" | "session").then_some(host)
    });
    let host = host.with_context(|| {
        format!(
            "'{uri}' is not qemu+ssh://[USER@]HOST[:PORT]/system, the only URI that Bantam takes"
        )
    })?;
    let host = SshHost::parse(host).map_err(|reason| anyhow!(reason))?;
    Ok(Destination::Ssh(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_that_ssh_reaches_are_destinations() {
        let Ok(Destination::Ssh(host)) = destination("qemu+ssh://root@host:22/system") else {
            panic!("it is a destination");
        };
        assert_eq!((host.host.as_str(), host.port), ("root@host", Some(22)));
        for uri in [
            "qemu+ssh://host",
            "qemu+ssh:///system",
            "qemu+ssh://host/other",
            "qemu+tls://host/system",
            "tcp://host",
        ] {
            assert!(destination(uri).is_err(), "{uri}");
        }
    }
}
