//! What virsh has and Bantam does not, and what to use in its place.

/// The commands of virsh 9.0 that Bantam does not have.
const LACKING: &str = "allocpages attach-device attach-disk attach-interface backup-begin backup-dumpxml blkdeviotune \
    blkiotune blockcommit blockcopy blockjob blockpull capabilities cd change-media checkpoint-create \
    checkpoint-create-as checkpoint-delete checkpoint-dumpxml checkpoint-edit checkpoint-info checkpoint-list \
    checkpoint-parent connect cpu-baseline cpu-compare cpu-models cpu-stats desc detach-device \
    detach-device-alias detach-disk detach-interface dom-fd-associate domblkerror domblkinfo domblkstat \
    domblkthreshold domcapabilities domcontrol domdirtyrate-calc domdisplay domfsfreeze domfsinfo domfsthaw \
    domfstrim domhostname domif-getlink domif-setlink domifaddr domifstat domiftune domjobabort domjobinfo \
    domlaunchsecinfo dommemstat dompmsuspend dompmwakeup domsetlaunchsecstate domtime domxml-from-native \
    domxml-to-native dump echo emulatorpin event exit find-storage-pool-sources \
    find-storage-pool-sources-as freecell freepages get-user-sshkeys guest-agent-timeout guestinfo guestvcpus \
    hypervisor-cpu-baseline hypervisor-cpu-compare iface-begin iface-bridge iface-commit iface-define \
    iface-destroy iface-dumpxml iface-edit iface-list iface-mac iface-name iface-rollback iface-start \
    iface-unbridge iface-undefine inject-nmi iothreadadd iothreaddel iothreadinfo iothreadpin iothreadset \
    lxc-enter-namespace managedsave-define managedsave-dumpxml managedsave-edit maxvcpus memtune metadata \
    migrate-compcache migrate-getmaxdowntime migrate-getspeed migrate-postcopy migrate-setmaxdowntime \
    migrate-setspeed net-create net-define net-dumpxml net-edit net-event net-name net-port-create \
    net-port-delete net-port-dumpxml net-port-list net-update net-uuid node-memory-tune nodecpumap nodecpustats \
    nodedev-autostart nodedev-create nodedev-define nodedev-destroy nodedev-detach nodedev-dumpxml nodedev-event \
    nodedev-info nodedev-list nodedev-reattach nodedev-reset nodedev-start nodedev-undefine nodememstats \
    nodesevinfo nodesuspend numatune nwfilter-binding-create nwfilter-binding-delete nwfilter-binding-dumpxml \
    nwfilter-binding-list nwfilter-define nwfilter-dumpxml nwfilter-edit nwfilter-list nwfilter-undefine perf \
    pool-autostart pool-build pool-capabilities pool-create pool-create-as pool-define pool-define-as pool-delete \
    pool-destroy pool-dumpxml pool-edit pool-event pool-info pool-list pool-name pool-refresh pool-start \
    pool-undefine pool-uuid pwd qemu-agent-command qemu-attach qemu-monitor-command qemu-monitor-event quit \
    save-image-define save-image-dumpxml save-image-edit schedinfo screenshot secret-define secret-dumpxml \
    secret-event secret-get-value secret-list secret-set-value secret-undefine send-key send-process-signal \
    set-lifecycle-action set-user-password set-user-sshkeys setmaxmem setvcpu snapshot-create snapshot-dumpxml \
    snapshot-edit snapshot-parent sysinfo ttyconsole update-device update-memory-device vcpucount vcpuinfo vcpupin \
    vncdisplay vol-clone vol-create vol-create-as vol-create-from vol-delete vol-download vol-dumpxml vol-info \
    vol-key vol-list vol-name vol-path vol-pool vol-resize vol-upload vol-wipe";

/// Says why there is no command `name`, in one line.
pub fn refusal(name: &str) -> String {
    if !LACKING.split(' ').any(|it| it == name) {
        return format!("unknown command: '{name}'");
    }
    let refusal = format!("command '{name}' is not supported by Bantam");
    match substitute(name) {
        Some(substitute) => format!("{refusal}; use {substitute}"),
        None => refusal,
    }
}

/// Returns what does the work of a command that Bantam does not have.
fn substitute(name: &str) -> Option<&'static str> {
    Some(match name {
        "setmaxmem" | "attach-disk" | "attach-interface" | "detach-disk" | "detach-interface" => {
            "'edit': changes count from the next start on"
        }
        "event" => "'bantam events'",
        "domblkstat" | "domifstat" | "dommemstat" | "cpu-stats" => "'domstats'",
        "domifaddr" => "'net-dhcp-leases' of the network that it is on",
        "vcpucount" | "vcpuinfo" => "'dominfo'",
        "net-define" | "net-create" => "'bantam network define'",
        "net-dumpxml" => "'net-info', or 'bantam network info'",
        "snapshot-create" => "'snapshot-create-as'",
        "snapshot-parent" | "snapshot-dumpxml" => "'snapshot-info'",
        "vol-create" | "vol-create-as" => "'bantam image create'",
        "vol-info" => "'bantam image info'",
        "vol-resize" => "'bantam image resize'",
        "vol-clone" => "'bantam image convert'",
        "capabilities" => "'bantam check'",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::commands::COMMANDS;
    use super::*;

    #[test]
    fn no_command_is_both_there_and_lacking() {
        for command in COMMANDS {
            let is_lacking = LACKING.split(' ').any(|it| it == command.name);
            assert!(!is_lacking, "{}", command.name);
        }
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        assert_eq!(refusal("xyz"), "unknown command: 'xyz'");
        assert_eq!(
            refusal("event"),
            "command 'event' is not supported by Bantam; use 'bantam events'"
        );
        assert_eq!(
            refusal("screenshot"),
            "command 'screenshot' is not supported by Bantam"
        );
        assert_eq!(refusal(""), "unknown command: ''");
    }
}
