//! Requests to the API that are stuck, because a thread of the monitor is, and those that must not wait for
//! them.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{ApiMachine, require_kvm};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::json;

/// How long what comes at once may take on a busy host.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long something may take that comes in the end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A thread that stands still until this is dropped.
struct StoppedThread(Pid);

impl StoppedThread {
    /// Stops the thread of `process` that is called `name`.
    fn new(process: Pid, name: &str) -> StoppedThread {
        let threads = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
        let mut folders = threads.map(|thread| thread.expect("it runs").path());
        let is_it = |folder: &Path| {
            let text = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            text.trim_end() == name
        };
        let folder = folders
            .find(|folder| is_it(folder))
            .unwrap_or_else(|| panic!("there is no thread '{name}'"));
        let id = folder.file_name().and_then(|name| name.to_str());
        let thread = Pid::from_raw(id.expect("it is a number").parse().expect("it is a number"));
        ptrace::seize(thread, ptrace::Options::empty()).expect("it is of a child of this process");
        ptrace::interrupt(thread).expect("it is traced");
        waitpid(thread, Some(WaitPidFlag::__WALL)).expect("it is traced");
        StoppedThread(thread)
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // It fails if the process has been killed.
        let _ = ptrace::detach(self.0, None);
    }
}

/// Waits until `is_so`.
#[track_caller]
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_only_reads_is_answered_while_the_machine_takes_its_time_to_pause() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    api.put(
        "/balloon",
        &json!({"amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 1}),
    );
    api.put("/mmds", &json!({"a": 1}));
    machine.start_hello();
    let stopped = StoppedThread::new(machine.running.pid(), "bantam-vcpu0");
    thread::scope(|scope| {
        let pausing = scope.spawn(|| api.request("PATCH", "/vm", r#"{"state": "Paused"}"#));
        // Its answer comes after five seconds.
        thread::sleep(Duration::from_millis(100));
        for path in [
            "/",
            "/version",
            "/vm/config",
            "/machine-config",
            "/mmds",
            "/balloon",
            "/balloon/statistics",
            "/balloon/hinting/status",
        ] {
            let asked = Instant::now();
            // That of the driver is refused, as there is none.
            let answer = api.request("GET", path, "");
            assert_eq!(
                answer.status == 400,
                path.ends_with("/status"),
                "{answer:?}"
            );
            let time = asked.elapsed();
            assert!(time < ANSWER_LIMIT, "{path} took {time:?}");
        }
        assert!(!pausing.is_finished());
        drop(stopped);
        pausing.join().expect("it is answered");
    });
    machine.stop();
}

#[test]
fn what_only_reads_is_answered_while_metrics_are_written_to_a_slow_file() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let file = machine.path("metrics");
    api.put("/metrics", &json!({"metrics_path": file}));
    machine.start_hello();
    let stopped = StoppedThread::new(machine.running.pid(), "bantam-metrics");
    thread::scope(|scope| {
        let flush = r#"{"action_type": "FlushMetrics"}"#;
        let flushing = scope.spawn(move || api.request("PUT", "/actions", flush));
        thread::sleep(Duration::from_millis(100));
        // Its answer comes after a second.
        api.get("/vm/config");
        api.get("/machine-config");
        assert!(!flushing.is_finished());
        let answer = flushing.join().expect("it is answered");
        assert_eq!(answer.status, 400);
    });
    drop(stopped);
    machine.stop();
}

#[test]
fn the_last_metrics_are_written_while_a_request_is_stuck() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let file = machine.path("metrics");
    api.put("/metrics", &json!({"metrics_path": file}));
    machine.add_drive("a", &json!({}));
    machine.boot("devices", "expect-devices=2 finish=hang");
    api.act("InstanceStart");
    machine.running.wait_for_output("PASS\n");
    let other = machine.image("other", 8192);
    let swap = json!({"drive_id": "a", "path_on_host": other}).to_string();
    let stopped = StoppedThread::new(machine.running.pid(), "bantam-devices");
    thread::scope(|scope| {
        let swapping = scope.spawn(|| api.raw(&put_swap(&swap)));
        let is_open = || {
            let files = fs::read_dir(format!("/proc/{}/fd", machine.running.pid()));
            let mut files = files.expect("it runs").flatten();
            files.any(|file| fs::read_link(file.path()).is_ok_and(|path| path == other))
        };
        wait_until("the other image is not opened", is_open);
        machine.running.signal(Signal::SIGTERM);
        let is_written = || fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'));
        wait_until("no metrics are written", is_written);
        drop(stopped);
        let answer = swapping.join().expect("it ends with the process");
        assert_eq!(answer, "", "it was stuck until the end");
    });
    machine.ended_well();
}

/// A request to exchange the image of the drive `a`, which may not be answered.
fn put_swap(body: &str) -> Vec<u8> {
    let size = body.len();
    format!("PATCH /drives/a HTTP/1.1\r\nHost: l\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n{body}")
        .into_bytes()
}
