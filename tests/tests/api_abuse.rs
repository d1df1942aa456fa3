//! Misbehaving clients of the API, beside a machine and a client that must not notice.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{ApiClient, Bantam, payload, require_kvm};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;

/// How long a well-behaved client may wait for an answer, on a host with few processors.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long the guest's output may stop.
const OUTPUT_LIMIT: Duration = Duration::from_secs(2);
/// How much memory the monitor may take for clients, in bytes.
const MEMORY_LIMIT: u64 = 24 << 20;
/// A request that is answered.
const GET: &[u8] = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[test]
fn bad_clients_harm_neither_the_guest_nor_other_clients() {
    require_kvm!();
    allow_many_connections();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.socket");
    let output = folder.path().join("serial");
    let monitor = Bantam::api(&socket)
        .option("--level", "Error")
        .limit(Duration::from_secs(120))
        .start();
    let api = ApiClient::new(&socket);
    api.put("/serial", &json!({"serial_out_path": output}));
    let boot_source = json!({
        "kernel_image_path": payload("serial"),
        "boot_args": "print-kib=10000000",
    });
    api.put("/boot-source", &boot_source);
    api.act("InstanceStart");
    let before = api.get("/vm/config");
    let descriptors = open_descriptors(monitor.pid());
    let memory = resident_memory(monitor.pid());

    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let finished = SetOnDrop(&done);
        let good = scope.spawn(|| ask_until(&done, &api));
        let guest = scope.spawn(|| watch_output_until(&done, &output));
        let slow = [
            scope.spawn(|| send_slowly(&api, b"GET /version HTTP/1.1\r\nHost: l", &done)),
            scope.spawn(|| send_slowly_a_body(&api)),
            scope.spawn(|| never_read(&api)),
        ];
        half_sent_requests(&api);
        large_heads_and_bodies(&api);
        pipelined_requests(&api);
        what_is_no_request(&api);
        let [head, body, answers] = slow;
        body.join().expect("a slow body is answered");
        answers.join().expect("who does not read is cut off");
        a_thousand_connections(&api);
        drop(finished);
        head.join().expect("a slow head harms nobody");
        let (count, slowest) = good.join().expect("a client is answered");
        assert!(count > 100, "{count} answers only");
        assert!(slowest < ANSWER_LIMIT, "an answer took {slowest:?}");
        guest.join().expect("the guest runs");
    });

    assert_eq!(api.get("/vm/config"), before);
    assert_eq!(api.get("/")["state"], "Running");
    let deadline = Instant::now() + Duration::from_secs(20);
    while open_descriptors(monitor.pid()) > descriptors {
        assert!(Instant::now() < deadline, "connections stay open");
        thread::sleep(Duration::from_millis(20));
    }
    let grown = resident_memory(monitor.pid()).saturating_sub(memory);
    assert!(grown < MEMORY_LIMIT, "{grown} bytes more");
    monitor.signal(Signal::SIGTERM);
    monitor.wait().succeeded();
}

/// Signals the end, whether the test goes on or fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends requests without end. Returns their number, and the longest time to an answer.
fn ask_until(done: &AtomicBool, api: &ApiClient) -> (usize, Duration) {
    let mut slowest = Duration::ZERO;
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        let asked = Instant::now();
        assert_eq!(api.get("/")["state"], "Running");
        slowest = slowest.max(asked.elapsed());
        count += 1;
    }
    (count, slowest)
}

fn watch_output_until(done: &AtomicBool, output: &Path) {
    let mut size = 0;
    let mut grown = Instant::now();
    while !done.load(Ordering::Relaxed) {
        let now = fs::metadata(output).map_or(0, |metadata| metadata.len());
        if now > size {
            (size, grown) = (now, Instant::now());
        }
        assert!(grown.elapsed() < OUTPUT_LIMIT, "the guest stands still");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(size > 0);
}

/// Sends a byte from time to time.
fn send_slowly(api: &ApiClient, bytes: &[u8], done: &AtomicBool) {
    let mut stream = api.connect();
    for byte in bytes.iter().cycle() {
        // Another client may take its place.
        if done.load(Ordering::Relaxed) || stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Sends a body so slowly that the server gives up.
fn send_slowly_a_body(api: &ApiClient) {
    let mut stream = api.connect();
    let head = b"PUT /logger HTTP/1.1\r\nHost: l\r\nContent-Length: 1000\r\n\r\n";
    stream.write_all(head).expect("it is taken");
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) && stream.write_all(b" ").is_ok() {
        thread::sleep(Duration::from_millis(100));
    }
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "it is not given up"
    );
    let answer = rest_of(stream);
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

/// Sends requests without reading answers, until the connection is closed.
fn never_read(api: &ApiClient) {
    let mut stream = api.connect();
    let started = Instant::now();
    while stream.write_all(GET).is_ok() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "it is not given up"
        );
    }
}

fn half_sent_requests(api: &ApiClient) {
    let body = br#"{"vcpu_count": 2, "mem_size_mib": 512}"#;
    let head = format!(
        "PUT /machine-config HTTP/1.1\r\nHost: l\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let whole = [head.as_bytes(), body].concat();
    for size in 0..whole.len() {
        let mut stream = api.connect();
        stream.write_all(&whole[..size]).expect("it is taken");
        if size % 2 == 0 {
            stream.shutdown(Shutdown::Write).expect("it is open");
            let answer = rest_of(stream);
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
                "{answer}"
            );
        }
    }
}

fn large_heads_and_bodies(api: &ApiClient) {
    let filler = "x".repeat(1 << 20);
    for (request, status) in [
        (format!("GET /{filler} HTTP/1.1\r\n\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\nX: {filler}\r\n\r\n"), "431"),
        (
            format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(10_000)),
            "431",
        ),
        (format!("GET / HTTP/1.1\r\n{filler}"), "4"),
        (filler.clone(), "4"),
        (
            format!("PUT /logger HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\n{filler}"),
            "400",
        ),
        (
            format!(
                "PUT /logger HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                "9".repeat(30)
            ),
            "400",
        ),
        (
            // It is longer than what the server skips.
            format!(
                "PUT /logger HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n800000\r\n{}",
                filler.repeat(8)
            ),
            "400",
        ),
        (
            // A chunk's extension counts as well.
            format!("PUT /logger HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;{filler}"),
            "4",
        ),
    ] {
        let answer = api.raw(request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{}...: {answer}",
            &request[..40]
        );
    }
}

fn pipelined_requests(api: &ApiClient) {
    const COUNT: usize = 200;
    let mut stream = api.connect();
    let mut requests = GET.repeat(COUNT - 1);
    requests.extend(b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n");
    let mut reader = stream.try_clone().expect("there are descriptors");
    let answers = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text)
    });
    stream.write_all(&requests).expect("they are taken");
    let text = answers
        .join()
        .expect("it does not panic")
        .expect("it is text");
    assert_eq!(text.matches("HTTP/1.1 200 OK\r\n").count(), COUNT);
    assert_eq!(text.matches(r#"{"firecracker_version":"#).count(), COUNT);
}

fn what_is_no_request(api: &ApiClient) {
    let put = |body: &[u8]| {
        let head = format!(
            "PUT /logger HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    };
    let everything: Vec<u8> = (0..=255).cycle().take(4096).collect();
    let requests: &[&[u8]] = &[
        b"GET /\xff\xfe HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"G\xc3\xa9T / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"get / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"DELETE / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"PUT /logger HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /logger HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"PUT /logger HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT 52\n",
        b"{\"action_type\": \"InstanceStart\"}",
        &everything,
        &put(b"{\"level\": \"\xff\"}"),
        &put(b"{\"module\": \"\\ud800\"}"),
        &put(&everything),
    ];
    for request in requests {
        let mut stream = api.connect();
        // The server may refuse it before all of it is sent.
        let _ = stream.write_all(request);
        let _ = stream.shutdown(Shutdown::Write);
        let answer = rest_of(stream);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{}: {answer}",
            request.escape_ascii()
        );
    }
}

fn a_thousand_connections(api: &ApiClient) {
    let mut connections: Vec<UnixStream> = (0..1000).map(|_| api.connect()).collect();
    // The last of them are served.
    let last = connections.last_mut().expect("there are some");
    last.write_all(GET).expect("it has a place");
    let mut answer = [0; 15];
    last.read_exact(&mut answer).expect("it is answered");
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    thread::sleep(Duration::from_secs(1));
}

/// Reads the rest. The server may close a connection before it has read everything.
fn rest_of(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn allow_many_connections() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("it can be read");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("it may be raised so far");
}

fn open_descriptors(process: Pid) -> usize {
    fs::read_dir(format!("/proc/{process}/fd"))
        .expect("it runs")
        .count()
}

/// Returns the resident memory in bytes.
fn resident_memory(process: Pid) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .expect("there is such a line")
        .trim()
        .trim_end_matches(" kB");
    kib.parse::<u64>().expect("it is a number") << 10
}
