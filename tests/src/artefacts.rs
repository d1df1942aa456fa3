//! The monitor and the guests, which are built if they do not exist yet.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The target of the payloads, which separates their build from the host's build settings.
const PAYLOAD_TARGET: &str = "x86_64-unknown-linux-gnu";

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this package is in a workspace")
}

/// Returns Cargo's target folder.
pub(crate) fn target_folder() -> PathBuf {
    // Relative to the workspace, as for a cargo that runs there.
    let folder = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(folder)
}

/// Returns the path of the program: that in `BANTAM_BIN`, or else that of a debug build of this
/// workspace.
///
/// # Panics
///
/// If it cannot be built.
pub fn monitor() -> &'static Path {
    static MONITOR: OnceLock<PathBuf> = OnceLock::new();
    MONITOR.get_or_init(|| {
        if let Some(path) = env::var_os("BANTAM_BIN") {
            return path.into();
        }
        let mut cargo = cargo("build");
        cargo.args(["--package", "bantam", "--manifest-path"]);
        cargo.arg(workspace().join("Cargo.toml"));
        cargo.arg("--target-dir").arg(target_folder());
        output_of(cargo);
        target_folder().join("debug/bantam")
    })
}

/// Returns the path of a bare-metal guest of `tests/payloads`.
///
/// # Panics
///
/// If they cannot be built, or there is none of that name.
pub fn payload(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let target_folder = target_folder().join("payloads");
        let mut cargo = cargo("build");
        cargo.args(["--release", "--target", PAYLOAD_TARGET, "--manifest-path"]);
        cargo.arg(workspace().join("tests/payloads/Cargo.toml"));
        cargo.arg("--target-dir").arg(&target_folder);
        output_of(cargo);
        target_folder.join(PAYLOAD_TARGET).join("release")
    });
    let path = folder.join(name);
    assert!(path.is_file(), "there is no payload '{name}'");
    path
}

fn cargo(command: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([command, "--quiet"]);
    cargo
}

/// A Linux kernel made for tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// One processor, and devices found by the command line only.
    Small,
    /// With SMP, ACPI and PCI.
    Full,
    /// The kernel that is installed with Bantam.
    Distribution,
}

impl Kernel {
    /// Returns the path of its ELF image.
    ///
    /// # Panics
    ///
    /// If it cannot be built.
    pub fn vmlinux(self) -> PathBuf {
        let flavour = match self {
            Self::Small => "small",
            Self::Full => "full",
            Self::Distribution => "distribution",
        };
        let paths = guest_script("build.sh", &["kernel", flavour]);
        // Its name may end in its version.
        let is_kernel = |path: &&PathBuf| name_of(path).starts_with("vmlinux");
        let kernel = paths.iter().find(is_kernel);
        kernel.expect("the script prints its path").clone()
    }
}

/// Returns the paths of the small kernel's bzImage in every compression format.
///
/// # Panics
///
/// If they cannot be built.
pub fn bzimages() -> Vec<PathBuf> {
    guest_script("build.sh", &["bzimages"])
}

/// Returns the path of the bzImage that Debian ships for virtual machines.
///
/// # Panics
///
/// If it cannot be fetched.
pub fn debian_kernel() -> PathBuf {
    file_named("bzImage", &guest_script("debian-kernel.sh", &[]))
}

/// A root file system whose first process is the test agent.
pub struct RootFileSystem {
    /// An ext4 image. Tests boot from copies of it.
    pub ext4: PathBuf,
    /// An initial RAM disk with only the agent.
    pub initrd: PathBuf,
    /// The agent by itself.
    pub agent: PathBuf,
}

impl RootFileSystem {
    /// Finds or builds the images.
    ///
    /// # Panics
    ///
    /// If it cannot be built.
    pub fn new() -> Self {
        let paths = guest_script("build.sh", &["rootfs"]);
        Self {
            ext4: file_named("rootfs.ext4", &paths),
            initrd: file_named("initrd.cpio", &paths),
            agent: file_named("bantam-agent", &paths),
        }
    }
}

impl Default for RootFileSystem {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns the path of the initrd of the helper machine that resets identities.
///
/// # Panics
///
/// If it cannot be built.
pub fn sysprep_initrd() -> PathBuf {
    file_named("sysprep.cpio", &guest_script("build.sh", &["sysprep"]))
}

/// Returns the root file system of Debian with cloud-init, which takes root to make and to copy.
///
/// # Panics
///
/// If it cannot be made.
pub fn debian_root() -> PathBuf {
    let paths = guest_script("debian-root.sh", &[]);
    paths
        .into_iter()
        .next()
        .expect("the script prints its path")
}

/// Runs a script of `resources/guest`, which prints the paths of its results.
fn guest_script(name: &str, arguments: &[&str]) -> Vec<PathBuf> {
    let mut script = Command::new(workspace().join("resources/guest").join(name));
    script.args(arguments);
    output_of(script).lines().map(PathBuf::from).collect()
}

fn file_named(name: &str, paths: &[PathBuf]) -> PathBuf {
    paths
        .iter()
        .find(|path| name_of(path) == name)
        .unwrap_or_else(|| panic!("there is no '{name}' among {paths:?}"))
        .clone()
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(OsStr::to_str).unwrap_or_default()
}

/// Runs a program, whose messages go to the output of the tests.
fn output_of(mut command: Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed: {}",
        output.status
    );
    String::from_utf8(output.stdout).expect("paths are text")
}
