//! Tests of the command line.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use bantam_vmm::config::{
    BootProtocolOption, DiskConfig, ExitStatus, HugePages, MachineConfig, OnHalt, OnReboot,
    Seccomp, SerialConfig,
};
use clap::CommandFactory;

use super::*;

fn run_args(arguments: &[&str]) -> RunArgs {
    let arguments = ["bantam", "run"].iter().chain(arguments);
    match Args::try_parse_from(arguments).unwrap().command {
        Command::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn config(arguments: &[&str]) -> MachineConfig {
    let table = run_args(arguments).into_table().unwrap();
    table.into_config().unwrap()
}

#[test]
fn the_command_line_is_consistent() {
    Args::command().debug_assert();
}

#[test]
fn each_command_says_what_it_does() {
    let mut command = Args::command();
    command.build();
    for command in command.get_subcommands() {
        if command.is_hide_set() || command.get_name() == "help" {
            continue;
        }
        let about = command.get_about().map(ToString::to_string);
        let about = about.unwrap_or_default();
        let verb = about.split([' ', ',']).next().unwrap_or_default();
        assert!(verb.ends_with('s'), "{}: {about}", command.get_name());
    }
}

#[test]
fn a_kernel_is_enough() {
    assert_eq!(
        config(&["--kernel", "vmlinux"]),
        MachineConfig::new("vmlinux")
    );
    assert_eq!(run_args(&["--kernel", "vmlinux"]).log, LevelFilter::WARN);
}

#[test]
fn every_option_reaches_the_machine() {
    let args = run_args(&[
        "--kernel=k",
        "--initrd=i",
        "--cmdline=-x",
        "--append",
        "-y z -- 1",
        "--append=x -- 2",
        "--cpus=3",
        "--memory=1G",
        "--huge-pages=transparent",
        "--disk=a.img,ro,id=root",
        "--disk=b.img",
        "--net=tap=t0,mtu=9000",
        "--vsock=cid=3,socket=v.sock",
        "--serial=socket=s.sock",
        "--console=pty",
        "--channel=name=a,socket=a.sock",
        "--channel=name=b,pty",
        "--rng=off",
        "--balloon=size=64M,reporting=on",
        "--boot-protocol=pvh",
        "--on-reboot=restart",
        "--restart-limit=5",
        "--on-halt=exit",
        "--shutdown-timeout=2m",
        "--exit-status=monitor",
        "--host-workarounds=off",
        "--seccomp=log",
        "--landlock=off",
        "--coredump=on",
        "--gdb=unix:g.sock",
        "--log=off",
    ]);
    assert_eq!(args.log, LevelFilter::OFF);
    let expected = MachineConfig {
        initrd: Some("i".into()),
        cmdline: Some("-x".into()),
        append: Some("-y z x -- 1 2".into()),
        cpus: "3".parse().unwrap(),
        memory: "1G".parse().unwrap(),
        huge_pages: HugePages::Transparent,
        disks: vec![
            "a.img,ro,id=root".parse().unwrap(),
            DiskConfig::new("b.img"),
        ],
        nets: vec!["tap=t0,mtu=9000".parse().unwrap()],
        vsock: Some("cid=3,socket=v.sock".parse().unwrap()),
        serial: SerialConfig::Socket("s.sock".into()),
        console: SerialConfig::Pty,
        channels: vec![
            "name=a,socket=a.sock".parse().unwrap(),
            "name=b,pty".parse().unwrap(),
        ],
        rng: None,
        balloon: Some("size=64M,reporting=on".parse().unwrap()),
        boot_protocol: BootProtocolOption::Pvh,
        on_reboot: OnReboot::Restart,
        restart_limit: Some(5),
        on_halt: OnHalt::Exit,
        shutdown_timeout: "120s".parse().unwrap(),
        exit_status: ExitStatus::Monitor,
        host_workarounds: false,
        seccomp: Seccomp::Log,
        landlock: false,
        coredump: true,
        gdb: Some("unix:g.sock".parse().unwrap()),
        ..MachineConfig::new("k")
    };
    let config = args.into_table().unwrap().into_config();
    assert_eq!(config.unwrap(), expected);
}

#[test]
fn the_command_line_wins_over_the_machine_file() {
    let folder = std::env::temp_dir().join(format!("bantam-args-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("machine.toml");
    fs::write(
        &file,
        "kernel = 'k'\ncpus = 4\nmemory = '1G'\n[[disk]]\npath = 'a.img'\n",
    )
    .unwrap();
    let config = config(&[
        "--config",
        file.to_str().unwrap(),
        "--cpus=2",
        "--disk=b.img",
    ]);
    fs::remove_dir_all(&folder).unwrap();
    let expected = MachineConfig {
        cpus: "2".parse().unwrap(),
        memory: "1G".parse().unwrap(),
        disks: vec![DiskConfig::new("b.img")],
        ..MachineConfig::new(folder.join("k"))
    };
    assert_eq!(config, expected);
}

#[test]
fn every_name_of_a_choice_is_read() {
    let command = Args::command();
    let run = command.find_subcommand("run").unwrap();
    let options = run.get_arguments();
    for argument in options.filter(|argument| argument.get_action().takes_values()) {
        for value in argument.get_possible_values() {
            let option = format!("--{}={}", argument.get_long().unwrap(), value.get_name());
            run_args(&[&option]);
        }
    }
}

#[test]
fn wrong_values_are_refused() {
    for arguments in [
        ["--cpus", "1000"],
        ["--cpus", "-1"],
        ["--memory", "1M"],
        ["--memory", "lots"],
        ["--net", "tap0"],
        ["--vsock", "cid=2,socket=v"],
        ["--serial", "tty"],
        ["--console", "hvc0"],
        ["--channel", "socket=a.sock"],
        ["--rng", "yes"],
        ["--balloon", "64M"],
        ["--log", "loud"],
        ["--restart-limit", "-1"],
        ["--shutdown-timeout", "soon"],
        ["--seccomp", "on"],
    ] {
        let arguments = ["bantam", "run"].into_iter().chain(arguments);
        assert!(
            Args::try_parse_from(arguments.clone()).is_err(),
            "{arguments:?}"
        );
    }
}

#[test]
fn every_option_has_help_and_the_long_help_has_examples() {
    let mut command = Args::command();
    for subcommand in command.get_subcommands() {
        assert!(
            subcommand.get_about().is_some(),
            "{}",
            subcommand.get_name()
        );
        for argument in subcommand.get_arguments() {
            assert!(argument.get_help().is_some(), "{}", argument.get_id());
        }
    }
    let run = command.find_subcommand_mut("run").unwrap();
    let help = run.render_long_help().to_string();
    for text in ["Examples:", "Ctrl-A x", "Exit status:"] {
        assert!(help.contains(text), "{text}");
    }
}

#[test]
fn the_short_help_fits_a_screen_and_the_long_one_has_every_option() {
    let mut command = Args::command().term_width(100);
    command.build();
    let run = command.find_subcommand_mut("run").unwrap();
    let short = run.render_help().to_string();
    assert!(short.lines().count() <= 40, "{short}");
    assert!(short.lines().all(|line| line.len() <= 100), "{short}");
    let long = run.render_long_help().to_string();
    for argument in run.get_arguments() {
        let option = format!("--{}", argument.get_long().unwrap());
        assert!(long.contains(&option), "{option}");
    }
}

#[test]
fn every_option_of_a_run_is_below_a_heading() {
    let mut command = Args::command();
    let run = command.find_subcommand_mut("run").unwrap();
    for argument in run.get_arguments() {
        let heading = argument.get_help_heading();
        assert!(heading.is_some(), "{}", argument.get_id());
    }
    let help = run.render_help().to_string();
    let places = [
        heading::BOOT,
        heading::CPU,
        heading::DISKS,
        heading::NETWORKS,
        heading::CONSOLE,
        heading::OTHER,
    ]
    .map(|heading| help.find(&format!("\n{heading}:\n")).unwrap());
    assert!(places.is_sorted(), "{help}");
}

#[test]
fn lists_fit_beside_the_indentation_of_a_narrow_terminal() {
    for subcommand in Args::command().get_subcommands() {
        for argument in subcommand.get_arguments() {
            let help = argument.get_long_help().unwrap_or_default().to_string();
            let (_, rest) = help.split_once("\n\n").unwrap_or_default();
            if rest.lines().any(|line| line.starts_with("- ")) {
                let fits = |line: &str| line.len() <= 70;
                assert!(rest.lines().all(fits), "{}", argument.get_id());
            }
        }
    }
}

#[test]
fn the_help_states_the_real_defaults_and_limits() {
    let defaults = MachineConfig::new("k");
    let mut command = Args::command();
    let help = command
        .find_subcommand_mut("run")
        .unwrap()
        .render_long_help()
        .to_string();
    for default in [
        defaults.cpus.to_string(),
        defaults.memory.to_string(),
        defaults.serial.to_string(),
        defaults.console.to_string(),
        defaults.boot_protocol.to_string(),
        defaults.on_reboot.to_string(),
        defaults.on_halt.to_string(),
        defaults.shutdown_timeout.to_string(),
        defaults.exit_status.to_string(),
        defaults.seccomp.to_string(),
    ] {
        assert!(help.contains(&format!("[default: {default}]")), "{default}");
    }
    assert!(defaults.rng.is_some() && defaults.host_workarounds);
}

#[test]
fn paths_of_any_bytes_reach_the_machine() {
    let path = OsStr::from_bytes(b"k\xe9");
    let option = |name: &str| OsString::from_vec([name.as_bytes(), b"k\xe9"].concat());
    let arguments = ["bantam", "run", "--kernel"].map(OsString::from);
    let arguments = arguments.into_iter().chain([
        path.into(),
        option("--disk=d"),
        option("--serial=file=s"),
        option("--channel=name=c,socket=c"),
    ]);
    let Command::Run(args) = Args::try_parse_from(arguments).unwrap().command else {
        panic!("not a run");
    };
    let config = args.into_table().unwrap().into_config().unwrap();
    assert_eq!(config.kernel, path);
    assert_eq!(config.disks[0].path.as_os_str().as_bytes(), b"dk\xe9");
    let file = |name: &[u8]| OsStr::from_bytes(&[name, b"k\xe9"].concat()).into();
    assert_eq!(config.serial, SerialConfig::File(file(b"s")));
    assert_eq!(config.channels[0].end, SerialConfig::Socket(file(b"c")));
}
