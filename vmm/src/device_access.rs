//! Explains why a user may not open a device of the host, and what helps.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Gid, getegid, geteuid, getgroups};

use bantam_network::accounts::{self, Group, User};

/// Group and user ID that the kernel shows in place of those that a user namespace does not have
/// (`/proc/sys/kernel/overflowgid`).
const OVERFLOW_ID: u32 = 65534;

/// Permission to read and write, in one of the three digits of a file's mode.
const READ_WRITE: u32 = 0o6;

/// The ownership and mode of a device, and the identity of the process that may not open it.
#[derive(Clone, Debug)]
struct Access {
    path: String,
    mode: u32,
    owner: u32,
    group: u32,
    /// `None` if the group has no name here.
    group_name: Option<String>,
    user: u32,
    /// `None` if the user has no name here.
    user_name: Option<String>,
    /// Whether the process has the device's group.
    in_group: bool,
    /// Whether the group database lists the user as a member, so that the next login brings the group.
    is_member: bool,
}

/// Says in one line what helps a user who may not open the device at `path`.
pub(crate) fn remedy(path: &Path) -> String {
    match Access::of(path) {
        Some(access) => access.remedy(),
        None => format!("let the user open '{}'", path.display()),
    }
}

impl Access {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        let gid = Gid::from_raw(metadata.gid());
        let user = accounts::user(geteuid().as_raw());
        let group = accounts::group(gid.as_raw());
        let is_member = |user: &User| {
            let is_listed = |group: &Group| group.members.contains(&user.name);
            user.group == gid.as_raw() || group.as_ref().is_some_and(is_listed)
        };
        Some(Self {
            path: path.display().to_string(),
            mode: metadata.mode(),
            owner: metadata.uid(),
            group: metadata.gid(),
            in_group: getegid() == gid || getgroups().is_ok_and(|groups| groups.contains(&gid)),
            is_member: user.as_ref().is_some_and(is_member),
            group_name: group.map(|group| group.name),
            user: geteuid().as_raw(),
            user_name: user.map(|user| user.name),
        })
    }

    fn remedy(&self) -> String {
        let path = &self.path;
        let allows = |shift| self.mode >> shift & READ_WRITE == READ_WRITE;
        // The kernel applies only the first of the three that matches.
        let is_allowed = if self.user == self.owner {
            allows(6)
        } else if self.in_group {
            allows(3)
        } else {
            allows(0)
        };
        if is_allowed {
            return format!(
                "the mode of {path} allows it, so something else forbids it: an access control \
                 list, a security module or, in a container, its rules for devices"
            );
        }
        if allows(3) && !self.in_group && self.group != 0 {
            let Some(group) = &self.group_name else {
                return self.remedy_for_unnamed_group();
            };
            let Some(user_name) = &self.user_name else {
                return format!(
                    "only the device's group {group} may use it, and user {} has no name here by which \
                     to join it: {}",
                    self.user,
                    self.access_control_entry()
                );
            };
            if self.is_member {
                return format!(
                    "user {user_name} is a member of the device's group {group}, but was not yet \
                     when this session began: log in again, or run it by 'sg {group} COMMAND'"
                );
            }
            return format!(
                "add the user to the device's group: sudo usermod -aG {group} {user_name}, then \
                 log in again"
            );
        }
        format!(
            "its mode is {:04o}, and no group that this user could join may read and write it: {}, or \
             for good a udev rule that gives it a group and MODE=\"0660\"",
            self.mode & 0o7777,
            self.access_control_entry()
        )
    }

    /// The command that gives the device to this user alone.
    fn access_control_entry(&self) -> String {
        let Self {
            path,
            user,
            user_name,
            ..
        } = self;
        let user = user_name.clone().unwrap_or_else(|| user.to_string());
        format!("sudo setfacl -m u:{user}:rw {path} until the host restarts")
    }

    fn remedy_for_unnamed_group(&self) -> String {
        let Self { path, group, .. } = self;
        if *group == OVERFLOW_ID {
            return format!(
                "in a container, keep the groups of the user outside, such as by \
                 'podman run --group-add keep-groups --device {path}'"
            );
        }
        format!(
            "the device's group {group} has no name here: in a container, add it by \
             '--group-add {group}'"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `/dev/kvm` as most distributions set it up, and a user who is not in its group.
    fn usual() -> Access {
        Access {
            path: "/dev/kvm".into(),
            mode: 0o20660,
            owner: 0,
            group: 108,
            group_name: Some("virt".into()),
            user: 1000,
            user_name: Some("alice".into()),
            in_group: false,
            is_member: false,
        }
    }

    fn assert_helps(access: &Access, part: &str) {
        let remedy = access.remedy();
        assert!(remedy.contains(part), "{remedy}");
        assert!(!remedy.contains('\n'));
    }

    #[test]
    fn a_user_joins_the_group_that_the_device_has() {
        assert_helps(&usual(), "sudo usermod -aG virt alice, then log in again");
        let member = Access {
            is_member: true,
            ..usual()
        };
        assert_helps(&member, "log in again, or run it by 'sg virt COMMAND'");
    }

    #[test]
    fn nobody_joins_a_group_that_does_not_help() {
        let root_only = Access {
            mode: 0o20600,
            group: 0,
            group_name: Some("root".into()),
            ..usual()
        };
        assert_helps(&root_only, "its mode is 0600");
        for access in [
            &root_only,
            &Access {
                mode: 0o20660,
                ..root_only.clone()
            },
            &Access {
                mode: 0o20640,
                ..usual()
            },
            &Access {
                mode: 0o20600,
                in_group: true,
                ..usual()
            },
        ] {
            assert_helps(access, "sudo setfacl -m u:alice:rw /dev/kvm");
        }
    }

    #[test]
    fn a_user_without_a_name_is_told_what_takes_a_number() {
        let nameless = Access {
            user_name: None,
            ..usual()
        };
        assert_helps(&nameless, "sudo setfacl -m u:1000:rw /dev/kvm");
        assert!(!nameless.remedy().contains("usermod"));
    }

    #[test]
    fn a_container_is_given_the_group() {
        let unnamed = Access {
            group_name: None,
            ..usual()
        };
        assert_helps(&unnamed, "--group-add 108");
        let hidden = Access {
            group: OVERFLOW_ID,
            group_name: None,
            ..usual()
        };
        assert_helps(&hidden, "--group-add keep-groups");
    }

    #[test]
    fn what_the_mode_allows_is_forbidden_by_something_else() {
        for access in [
            Access {
                mode: 0o20666,
                ..usual()
            },
            Access {
                in_group: true,
                ..usual()
            },
            Access {
                owner: 1000,
                ..usual()
            },
        ] {
            assert_helps(&access, "something else forbids it");
        }
    }

    #[test]
    fn facts_come_from_the_device() {
        let access = Access::of(Path::new("/dev/null")).unwrap();
        assert_eq!(access.mode & 0o777, 0o666);
        assert_eq!(access.user, geteuid().as_raw());
        assert!(remedy(Path::new("/dev/nothing")).contains("'/dev/nothing'"));
    }
}
