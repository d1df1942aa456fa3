//! The commands: their options, and what executes them.

use super::Session;
use super::args::{Arguments, Kind, Opt};
use super::{domains, help, host, information, migrate, networks, snapshots};

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it does, in a few words.
    pub summary: &'static str,
    /// Whether it changes anything, so that `--readonly` forbids it.
    pub changes: bool,
    /// Its options, values in the order of their places.
    pub options: &'static [Opt],
    /// Executes it.
    pub run: fn(&mut Session, &Arguments) -> anyhow::Result<()>,
}

const fn flag(name: &'static str) -> Opt {
    Opt {
        name,
        kind: Kind::Flag,
    }
}

const fn needed(name: &'static str) -> Opt {
    Opt {
        name,
        kind: Kind::Needed,
    }
}

const fn value(name: &'static str) -> Opt {
    Opt {
        name,
        kind: Kind::Value,
    }
}

const fn named(name: &'static str) -> Opt {
    Opt {
        name,
        kind: Kind::Named,
    }
}

const fn rest(name: &'static str) -> Opt {
    Opt {
        name,
        kind: Kind::Rest,
    }
}

const DOMAIN: Opt = needed("domain");
const NETWORK: Opt = needed("network");

type Run = fn(&mut Session, &Arguments) -> anyhow::Result<()>;

const fn reads(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: Run,
) -> Command {
    Command {
        name,
        summary,
        changes: false,
        options,
        run,
    }
}

const fn changes(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: Run,
) -> Command {
    Command {
        name,
        summary,
        changes: true,
        options,
        run,
    }
}

/// All commands, in the order of the help.
pub const COMMANDS: &[Command] = &[
    changes(
        "autostart",
        "start a domain with the host",
        &[DOMAIN, flag("disable")],
        domains::autostart,
    ),
    changes(
        "blockresize",
        "make a disk of a domain larger",
        &[DOMAIN, needed("path"), needed("size")],
        domains::resize_disk,
    ),
    changes(
        "console",
        "connect to the guest console",
        &[DOMAIN, flag("force"), flag("safe")],
        domains::console,
    ),
    changes(
        "create",
        "start a domain by XML that vanishes when it has ended",
        &[needed("file"), flag("console")],
        domains::create,
    ),
    changes(
        "define",
        "define a domain by XML or a machine file",
        &[needed("file")],
        domains::define,
    ),
    changes(
        "destroy",
        "cut the power of a domain",
        &[DOMAIN, flag("graceful")],
        domains::destroy,
    ),
    reads(
        "domblklist",
        "list the disks of a domain",
        &[DOMAIN, flag("inactive"), flag("details")],
        information::disks,
    ),
    reads(
        "domid",
        "convert a domain name or UUID to domain id",
        &[DOMAIN],
        information::id,
    ),
    reads(
        "domiflist",
        "list the network devices of a domain",
        &[DOMAIN, flag("inactive")],
        information::interfaces,
    ),
    reads(
        "dominfo",
        "domain information",
        &[DOMAIN],
        information::info,
    ),
    reads(
        "domname",
        "convert a domain id or UUID to domain name",
        &[DOMAIN],
        information::name,
    ),
    changes(
        "domrename",
        "rename a domain",
        &[DOMAIN, needed("new-name")],
        domains::rename,
    ),
    reads(
        "domstate",
        "domain state",
        &[DOMAIN, flag("reason")],
        information::state,
    ),
    reads(
        "domstats",
        "get statistics about one or multiple domains",
        &[
            flag("state"),
            flag("cpu-total"),
            flag("balloon"),
            flag("vcpu"),
            flag("interface"),
            flag("block"),
            rest("domain"),
        ],
        information::stats,
    ),
    reads(
        "domuuid",
        "convert a domain name or id to domain UUID",
        &[DOMAIN],
        information::uuid,
    ),
    reads(
        "dumpxml",
        "domain information in XML",
        &[
            DOMAIN,
            flag("inactive"),
            flag("security-info"),
            flag("migratable"),
        ],
        domains::dump,
    ),
    changes(
        "edit",
        "edit the XML configuration of a domain",
        &[DOMAIN],
        domains::edit,
    ),
    reads("help", "print help", &[value("command")], help::run),
    reads(
        "hostname",
        "print the hypervisor hostname",
        &[],
        host::hostname,
    ),
    reads(
        "list",
        "list domains",
        &[
            flag("inactive"),
            flag("all"),
            flag("state-running"),
            flag("state-paused"),
            flag("state-shutoff"),
            flag("state-other"),
            flag("autostart"),
            flag("no-autostart"),
            flag("with-managed-save"),
            flag("without-managed-save"),
            flag("persistent"),
            flag("transient"),
            flag("uuid"),
            flag("name"),
            flag("id"),
            flag("table"),
            flag("managed-save"),
            flag("title"),
        ],
        information::list,
    ),
    changes(
        "managedsave",
        "save the state of a domain for its next start",
        &[DOMAIN, flag("verbose")],
        domains::managed_save,
    ),
    changes(
        "managedsave-remove",
        "remove the managed save of a domain",
        &[DOMAIN],
        domains::remove_managed_save,
    ),
    changes(
        "migrate",
        "migrate domain to another host",
        &[
            DOMAIN,
            needed("desturi"),
            flag("live"),
            flag("persistent"),
            flag("undefinesource"),
            flag("auto-converge"),
            flag("verbose"),
            named("dname"),
            named("timeout"),
            flag("timeout-suspend"),
        ],
        migrate::migrate,
    ),
    changes(
        "net-autostart",
        "start a network with the host",
        &[NETWORK, flag("disable")],
        networks::autostart,
    ),
    changes(
        "net-destroy",
        "stop a network",
        &[NETWORK],
        networks::destroy,
    ),
    reads(
        "net-dhcp-leases",
        "print the leases of a network",
        &[NETWORK, value("mac")],
        networks::leases,
    ),
    reads(
        "net-info",
        "network information",
        &[NETWORK],
        networks::info,
    ),
    reads(
        "net-list",
        "list networks",
        &[
            flag("inactive"),
            flag("all"),
            flag("persistent"),
            flag("autostart"),
            flag("no-autostart"),
            flag("name"),
            flag("table"),
        ],
        networks::list,
    ),
    changes("net-start", "start a network", &[NETWORK], networks::start),
    changes(
        "net-undefine",
        "undefine a network",
        &[NETWORK],
        networks::undefine,
    ),
    reads("nodeinfo", "node information", &[], host::node_information),
    changes(
        "reboot",
        "ask the guest to reboot",
        &[DOMAIN, named("mode")],
        domains::reboot,
    ),
    changes(
        "reset",
        "cut the power of a domain, and start it again",
        &[DOMAIN],
        domains::reset,
    ),
    changes(
        "restore",
        "restore a domain from a saved state in a directory",
        &[needed("file")],
        domains::restore,
    ),
    changes(
        "resume",
        "let a suspended domain go on",
        &[DOMAIN],
        domains::resume,
    ),
    changes(
        "save",
        "save the state of a domain to a directory, and end it",
        &[DOMAIN, needed("file"), flag("verbose")],
        domains::save,
    ),
    changes(
        "setmem",
        "change the memory of a running domain by its balloon",
        &[DOMAIN, needed("size"), flag("live"), flag("current")],
        domains::set_memory,
    ),
    changes(
        "setvcpus",
        "change the number of virtual CPUs",
        &[
            DOMAIN,
            needed("count"),
            flag("maximum"),
            flag("config"),
            flag("current"),
        ],
        domains::set_vcpus,
    ),
    changes(
        "shutdown",
        "ask the guest to shut down",
        &[DOMAIN, named("mode")],
        domains::shutdown,
    ),
    changes(
        "snapshot-create-as",
        "create a snapshot",
        &[
            DOMAIN,
            value("name"),
            value("description"),
            flag("disk-only"),
            flag("atomic"),
        ],
        snapshots::create,
    ),
    reads(
        "snapshot-current",
        "get the name of the current snapshot",
        &[DOMAIN, flag("name")],
        snapshots::current,
    ),
    changes(
        "snapshot-delete",
        "delete a snapshot",
        &[DOMAIN, value("snapshotname"), flag("current")],
        snapshots::delete,
    ),
    reads(
        "snapshot-info",
        "snapshot information",
        &[DOMAIN, value("snapshotname"), flag("current")],
        snapshots::info,
    ),
    reads(
        "snapshot-list",
        "list the snapshots of a domain",
        &[DOMAIN, flag("parent"), flag("name")],
        snapshots::list,
    ),
    changes(
        "snapshot-revert",
        "revert a domain to a snapshot",
        &[DOMAIN, value("snapshotname"), flag("current")],
        snapshots::revert,
    ),
    changes(
        "start",
        "start a domain",
        &[DOMAIN, flag("console"), flag("force-boot")],
        domains::start,
    ),
    changes(
        "suspend",
        "have a domain stand still",
        &[DOMAIN],
        domains::suspend,
    ),
    changes(
        "undefine",
        "undefine a domain",
        &[
            DOMAIN,
            flag("managed-save"),
            flag("remove-all-storage"),
            flag("snapshots-metadata"),
            flag("checkpoints-metadata"),
            flag("nvram"),
            flag("keep-nvram"),
            flag("tpm"),
            flag("keep-tpm"),
        ],
        domains::undefine,
    ),
    reads("uri", "print the connection", &[], host::uri),
    reads("version", "show versions", &[flag("daemon")], host::version),
];

/// Returns the command called `name`.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_in_the_order_of_their_names() {
        assert!(COMMANDS.is_sorted_by_key(|command| command.name));
    }
}
