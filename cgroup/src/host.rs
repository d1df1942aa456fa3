//! Which control groups the host has, and in which this process is.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use crate::Error;
use crate::limits::{Limits, Setting};

/// Where the kernel says what is mounted (proc_pid_mountinfo(5)).
const MOUNTS: &str = "/proc/self/mountinfo";
/// Where the kernel says in which groups this process is (cgroups(7)).
const GROUPS: &str = "/proc/self/cgroup";

/// A version of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller.
    One,
    /// One hierarchy for all.
    Two,
}

/// A hierarchy of groups that is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) version: Version,
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
    /// The controllers of version 1.
    controllers: Vec<Vec<u8>>,
    /// The group of this process, below `mount`.
    own: PathBuf,
}

impl Hierarchy {
    /// Returns the folder of the group that this process is in.
    pub(crate) fn own(&self) -> PathBuf {
        match self.own.as_os_str().is_empty() {
            true => self.mount.clone(),
            false => self.mount.join(&self.own),
        }
    }

    pub(crate) fn has(&self, controller: &str) -> bool {
        match self.version {
            Version::One => self
                .controllers
                .iter()
                .any(|it| it == controller.as_bytes()),
            Version::Two => {
                let path = self.mount.join("cgroup.controllers");
                let there = fs::read_to_string(path).unwrap_or_default();
                there.split_whitespace().any(|it| it == controller)
            }
        }
    }
}

/// The hierarchies of a host.
#[derive(Debug)]
pub(crate) struct Host(Vec<Hierarchy>);

impl Host {
    /// Finds the hierarchies of this host that this process can see.
    pub(crate) fn read() -> Result<Host, Error> {
        let read = |path: &str| {
            fs::read(path).map_err(|source| Error::Read {
                path: path.into(),
                source,
            })
        };
        Ok(Host::parse(&read(MOUNTS)?, &read(GROUPS)?))
    }

    /// Reads what the kernel says of mounts and of the groups of a process.
    pub(crate) fn parse(mounts: &[u8], groups: &[u8]) -> Host {
        let groups: Vec<_> = groups.split(|&byte| byte == b'\n').collect();
        let mounts = mounts.split(|&byte| byte == b'\n');
        Host(mounts.filter_map(|line| hierarchy(line, &groups)).collect())
    }

    pub(crate) fn hierarchies(&self) -> impl Iterator<Item = &Hierarchy> {
        self.0.iter()
    }

    /// Returns where each limit is set: hierarchies, and what to write into a group there.
    pub(crate) fn plan(&self, limits: &Limits) -> Result<Vec<(Hierarchy, Vec<Setting>)>, Error> {
        let mut plan: Vec<(Hierarchy, Vec<Setting>)> = Vec::new();
        for controller in limits.controllers() {
            // A host may have mounted both versions. A controller is in one of them.
            let found = self.0.iter().find(|it| it.has(controller));
            let hierarchy = found.ok_or_else(|| Error::NoController {
                controller: controller.into(),
            })?;
            let settings = limits.settings(controller, hierarchy.version);
            match plan.iter_mut().find(|(it, _)| it == hierarchy) {
                Some((_, planned)) => planned.extend(settings),
                None => plan.push((hierarchy.clone(), settings)),
            }
        }
        Ok(plan)
    }
}

/// Reads a line about a mount: `ID PARENT DEVICE ROOT MOUNTPOINT OPTIONS [FIELD]... - TYPE SOURCE OPTIONS`.
fn hierarchy(line: &[u8], groups: &[&[u8]]) -> Option<Hierarchy> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = path(fields.nth(3)?);
    let mount = path(fields.next()?);
    let mut kind = fields.skip_while(|field| *field != b"-").skip(1);
    let version = match kind.next()? {
        b"cgroup" => Version::One,
        b"cgroup2" => Version::Two,
        _ => return None,
    };
    let options = kind.nth(1)?;
    let controllers: Vec<_> = match version {
        Version::One => options
            .split(|&byte| byte == b',')
            .map(<[u8]>::to_vec)
            .collect(),
        Version::Two => Vec::new(),
    };
    let own = groups
        .iter()
        .find_map(|line| own_group(line, version, &controllers))?;
    // The mount may show a part of the hierarchy only.
    let own = path(own).strip_prefix(root).ok()?.to_owned();
    let is_visible = own
        .components()
        .all(|it| matches!(it, Component::Normal(_)));
    is_visible.then_some(Hierarchy {
        version,
        mount,
        controllers,
        own,
    })
}

/// Returns the group in a line `ID:CONTROLLERS:GROUP`, if it is about the hierarchy.
fn own_group<'a>(line: &'a [u8], version: Version, controllers: &[Vec<u8>]) -> Option<&'a [u8]> {
    let mut parts = line.splitn(3, |&byte| byte == b':');
    let number = parts.next()?;
    let names = parts.next()?;
    let group = parts.next()?;
    let is_it = match version {
        Version::One => {
            let mut names = names
                .split(|&byte| byte == b',')
                .filter(|name| !name.is_empty());
            names.any(|name| controllers.iter().any(|it| it == name))
        }
        Version::Two => number == b"0" && names.is_empty(),
    };
    is_it.then_some(group)
}

/// Reads a path of the kernel, in which spaces and the like are `\` and three octal digits.
fn path(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| {
            byte == b'\\' && digits.iter().all(|digit| (b'0'..b'8').contains(digit))
        });
        match digits {
            Some(digits) => {
                let number = digits
                    .iter()
                    .fold(0_u32, |number, digit| number * 8 + u32::from(digit - b'0'));
                bytes.push(number as u8);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    Path::new(&OsString::from_vec(bytes)).to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::CpuQuota;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /pod /sys/fs/cgroup/a\\040memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const HYBRID_GROUPS: &str = "\
9:name=systemd:/
4:memory:/pod/one
1:cpu,cpuacct:/
0::/user.slice
";

    fn limits() -> Limits {
        Limits {
            cpu_shares: Some(2048),
            cpu_quota: Some(CpuQuota {
                quota: 50_000,
                period: 100_000,
            }),
            memory_max: Some(1 << 30),
            memory_high: Some(1 << 29),
        }
    }

    #[test]
    fn each_controller_is_used_where_it_is_mounted() {
        let host = Host::parse(HYBRID.as_bytes(), HYBRID_GROUPS.as_bytes());
        let plan = host.plan(&limits()).unwrap();
        let own: Vec<_> = plan.iter().map(|(it, _)| it.own()).collect();
        assert_eq!(
            own,
            [
                Path::new("/sys/fs/cgroup/cpu,cpuacct"),
                Path::new("/sys/fs/cgroup/a memory/one")
            ]
        );
        let written = |settings: &[Setting]| -> Vec<String> {
            let lines = settings.iter();
            lines
                .map(|it| format!("{}={}", it.file, it.value))
                .collect()
        };
        assert_eq!(
            written(&plan[0].1),
            [
                "cpu.shares=2048",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000"
            ]
        );
        assert_eq!(
            written(&plan[1].1),
            [
                "memory.soft_limit_in_bytes=536870912",
                "memory.limit_in_bytes=1073741824"
            ]
        );
        assert_eq!(
            written(&limits().settings("cpu", Version::Two)),
            ["cpu.weight=200", "cpu.max=50000 100000"]
        );
        assert_eq!(
            written(&limits().settings("memory", Version::Two)),
            ["memory.high=536870912", "memory.max=1073741824"]
        );
    }

    #[test]
    fn a_group_that_cannot_be_seen_and_a_controller_that_is_not_there_are_no_use() {
        let groups = HYBRID_GROUPS.replace("/pod/one", "/other");
        let host = Host::parse(HYBRID.as_bytes(), groups.as_bytes());
        let error = host.plan(&limits()).unwrap_err().to_string();
        assert!(error.contains("the controller 'memory'"), "{error}");
        let groups = HYBRID_GROUPS.replace("/pod/one", "/pod/../x");
        let host = Host::parse(HYBRID.as_bytes(), groups.as_bytes());
        assert!(host.plan(&limits()).is_err());
        assert!(Host::parse(b"", b"").plan(&limits()).is_err());
        assert!(
            Host::parse(b"", b"")
                .plan(&Limits::default())
                .unwrap()
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn any_lines_are_read(mounts: Vec<u8>, groups: Vec<u8>, line in "[0-9 ]{0,8} / /[\\\\0-9a-z]{0,9} rw - cgroup2? x .*") {
            Host::parse(&mounts, &groups);
            for it in Host::parse(line.as_bytes(), HYBRID_GROUPS.as_bytes()).hierarchies() {
                prop_assert!(it.own().starts_with(&it.mount));
            }
        }
    }
}
