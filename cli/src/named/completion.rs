//! Names of machines in the completions of shells.

use clap_complete::Shell;

/// Commands whose first argument is a machine.
const COMMANDS: &[&str] = &[
    "attach-disk",
    "attach-interface",
    "autostart",
    "blockresize",
    "change-media",
    "clone",
    "console",
    "destroy",
    "detach-disk",
    "detach-interface",
    "domblklist",
    "domifaddr",
    "domiflist",
    "dominfo",
    "domstate",
    "domstats",
    "dumpcfg",
    "dumpxml",
    "edit",
    "events",
    "managedsave",
    "migrate",
    "reboot",
    "rename",
    "reset",
    "resume",
    "save",
    "setmem",
    "setvcpus",
    "shutdown",
    "ssh",
    "start",
    "suspend",
    "template",
    "undefine",
];

/// The same for those of `bantam snapshot`.
const SNAPSHOT_COMMANDS: &[&str] = &["create", "delete", "list", "revert", "tree"];

/// What prints the names.
const NAMES: &str = "bantam list --all --name 2>/dev/null";

/// Has a script that completes the command line complete the names of machines too.
pub fn with_machine_names(shell: Shell, script: String) -> String {
    let commands = COMMANDS.join("|");
    let snapshot_commands = SNAPSHOT_COMMANDS.join("|");
    match shell {
        Shell::Bash => format!(
            r#"{script}
_bantam_with_machines() {{
    _bantam "$@"
    local place
    case "${{COMP_WORDS[1]}}" in
        snapshot)
            case "${{COMP_WORDS[2]}}" in
                {snapshot_commands}) place=3 ;;
                *) return ;;
            esac
            ;;
        {commands}) place=2 ;;
        *) return ;;
    esac
    if [[ $COMP_CWORD -eq $place && "${{COMP_WORDS[COMP_CWORD]}}" != -* ]]; then
        COMPREPLY=($(compgen -W "$({NAMES})" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    fi
}}

complete -F _bantam_with_machines -o nosort -o bashdefault -o default bantam
"#
        ),
        Shell::Zsh => {
            let function = format!(
                "_bantam_machines() {{\n    local -a machines\n    machines=(${{(f)\"$({NAMES})\"}})\n    \
                 compadd -a machines\n}}\n\n_bantam() {{"
            );
            let mut script = script.replacen("_bantam() {", &function, 1);
            for description in [
                "The machine",
                "The machine; all machines by default",
                "The machine, with the name of a user before it if that is another\\: admin@web",
            ] {
                let found = format!(" -- {description}:_default'");
                script = script.replace(&found, &format!(" -- {description}:_bantam_machines'"));
            }
            let found = " -- The machines; those that run by default:_default'";
            script.replace(found, &found.replace("_default", "_bantam_machines"))
        }
        Shell::Fish => {
            let mut script = script;
            for command in COMMANDS {
                script.push_str(&format!(
                    "complete -c bantam -n \"__fish_bantam_using_subcommand {command}\" -f -a \"({NAMES})\"\n"
                ));
            }
            for command in SNAPSHOT_COMMANDS {
                script.push_str(&format!(
                    "complete -c bantam -n \"__fish_bantam_using_subcommand snapshot; and \
                     __fish_seen_subcommand_from {command}\" -f -a \"({NAMES})\"\n"
                ));
            }
            script
        }
        _ => script,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Args;

    fn takes_machine(command: &clap::Command) -> bool {
        let first = command.get_positionals().next();
        let names = first
            .and_then(clap::Arg::get_value_names)
            .unwrap_or_default();
        names
            .first()
            .is_some_and(|name| ["MACHINE", "[USER@]MACHINE"].contains(&name.as_str()))
    }

    fn names<'a>(commands: impl Iterator<Item = &'a clap::Command>) -> Vec<&'a str> {
        let mut names: Vec<_> = commands
            .filter(|command| takes_machine(command))
            .map(clap::Command::get_name)
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn each_command_that_takes_a_machine_completes_it() {
        let mut command = Args::command();
        command.build();
        assert_eq!(names(command.get_subcommands()), COMMANDS);
        let snapshot = command.find_subcommand("snapshot").unwrap();
        assert_eq!(names(snapshot.get_subcommands()), SNAPSHOT_COMMANDS);
    }
}
