//! Commands for networks of the host.

use anyhow::{Context, anyhow};
use bantam_network::{Lease, NetworkError, NetworkInfo, NetworkName, Networks};

use super::Session;
use super::args::Arguments;
use crate::local_time::local_time;

/// Returns the name that `--network` gives.
fn network(arguments: &Arguments) -> anyhow::Result<NetworkName> {
    let text = arguments.needed("network")?;
    text.parse()
        .map_err(|_| anyhow!("failed to get network '{text}'"))
}

/// Says of an error, as virsh does, what has failed.
fn failed(what: &str, name: &NetworkName) -> impl FnOnce(NetworkError) -> anyhow::Error {
    let what = format!("Failed to {what} network {name}");
    move |error| match error {
        NetworkError::Unknown { name, .. } => anyhow!("failed to get network '{name}'"),
        error => anyhow!(error).context(what),
    }
}

fn yes(is_so: bool) -> String {
    if is_so { "yes" } else { "no" }.to_owned()
}

pub fn list(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let all = arguments.has("all");
    let inactive = arguments.has("inactive");
    let is_listed = |it: &NetworkInfo| {
        let by_activity = all || it.is_started != inactive;
        let autostart = arguments.has("autostart");
        let no_autostart = arguments.has("no-autostart");
        let by_autostart = autostart == no_autostart || autostart == it.definition.autostart;
        by_activity && by_autostart
    };
    let networks = Networks::of_host().list()?;
    let listed = networks.iter().filter(|it| is_listed(it));
    if arguments.has("name") {
        for it in listed {
            session.print(&format!("{}\n", it.definition.name));
        }
        return Ok(());
    }
    let rows = listed.map(|it| {
        vec![
            it.definition.name.to_string(),
            if it.is_started { "active" } else { "inactive" }.to_owned(),
            yes(it.definition.autostart),
            "yes".to_owned(),
        ]
    });
    let rows: Vec<_> = rows.collect();
    session.table(&["Name", "State", "Autostart", "Persistent"], &rows);
    Ok(())
}

pub fn info(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let name = network(arguments)?;
    let info = Networks::of_host().info(&name);
    let info = info.map_err(failed("examine", &name))?;
    session.facts(&[
        ("Name", name.to_string()),
        // Networks of Bantam are known by their names only.
        ("UUID", "-".to_owned()),
        ("Active", yes(info.is_started)),
        ("Persistent", yes(true)),
        ("Autostart", yes(info.definition.autostart)),
        ("Bridge", info.definition.bridge),
    ]);
    Ok(())
}

pub fn start(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let name = network(arguments)?;
    let started = Networks::of_host().start(&name);
    let started = started.map_err(failed("start", &name))?;
    for warning in &started.warnings {
        crate::message::say(format_args!("warning: {warning}"));
    }
    session.tell(&format!("Network {name} started"));
    Ok(())
}

pub fn destroy(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let name = network(arguments)?;
    let stopped = Networks::of_host().stop(&name);
    stopped.map_err(failed("destroy", &name))?;
    session.tell(&format!("Network {name} destroyed"));
    Ok(())
}

pub fn undefine(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let name = network(arguments)?;
    let undefined = Networks::of_host().undefine(&name);
    undefined.map_err(failed("undefine", &name))?;
    session.tell(&format!("Network {name} has been undefined"));
    Ok(())
}

pub fn autostart(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let name = network(arguments)?;
    let is_on = !arguments.has("disable");
    let un = if is_on { "" } else { "un" };
    let set = Networks::of_host().set_autostart(&name, is_on);
    set.map_err(failed(&format!("{un}mark as autostarted"), &name))?;
    session.tell(&format!("Network {name} {un}marked as autostarted"));
    Ok(())
}

pub fn leases(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let name = network(arguments)?;
    let networks = Networks::of_host();
    let leases = networks.leases(&name);
    let leases = leases.map_err(failed("get leases info for", &name))?;
    let definition = networks.definition(&name)?;
    let addresses = definition.addresses.context("it has no addresses")?;
    let bits = addresses.subnet.bits();
    let mac = arguments.value("mac");
    let is_listed = |lease: &&Lease| {
        let own = lease.mac.to_string();
        mac.is_none_or(|mac| own.eq_ignore_ascii_case(mac))
    };
    let rows = leases.iter().filter(is_listed).map(|lease| {
        vec![
            local_time(lease.expires),
            lease.mac.to_string(),
            "ipv4".to_owned(),
            format!("{}/{bits}", lease.address),
            lease.hostname.clone().unwrap_or_else(|| "-".to_owned()),
            "-".to_owned(),
        ]
    });
    let rows: Vec<_> = rows.collect();
    let heading = [
        "Expiry Time",
        "MAC address",
        "Protocol",
        "IP address",
        "Hostname",
        "Client ID or DUID",
    ];
    session.table(&heading, &rows);
    Ok(())
}
