//! Names of the host's users and groups.
//!
//! The C library would look for them in all sources that `/etc/nsswitch.conf` lists, which it loads as
//! shared libraries. A static program cannot load any: it would crash.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

/// The users of the host, one on each line.
pub const USERS: &str = "/etc/passwd";

/// The groups of the host, one on each line.
pub const GROUPS: &str = "/etc/group";

/// How much of a file is read.
const MAX_SIZE: u64 = 4 << 20;

/// A user of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// The group of the user's files, which need not list the user as a member.
    pub group: u32,
}

/// A group of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Names of the users who are members beside those whose own group it is.
    pub members: Vec<String>,
}

/// Finds the user with the number `id` in [`USERS`]. Users of a directory service are not there.
pub fn user(id: u32) -> Option<User> {
    find_user(&read(USERS).ok()?, id)
}

/// Finds the group with the number `id` in [`GROUPS`]. Groups of a directory service are not there.
pub fn group(id: u32) -> Option<Group> {
    find_group(&read(GROUPS).ok()?, |_, number| number == id)
}

/// Finds the group called `name` in [`GROUPS`]. Groups of a directory service are not there.
pub fn group_called(name: &str) -> Option<Group> {
    find_group(&read(GROUPS).ok()?, |found, _| found == name)
}

fn read(path: impl AsRef<Path>) -> io::Result<String> {
    // A pipe in place of the file must not keep the reader waiting.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The format of a line is `name:password:uid:gid:comment:home:shell` (passwd(5)).
fn find_user(users: &str, id: u32) -> Option<User> {
    users.lines().find_map(|line| {
        let mut fields = entry_of(line, |_, number| number == id)?;
        Some(User {
            name: fields.name.to_owned(),
            group: number(fields.rest.next()?)?,
        })
    })
}

/// The format of a line is `name:password:gid:member,member...` (group(5)).
fn find_group(groups: &str, is_it: impl Fn(&str, u32) -> bool) -> Option<Group> {
    groups.lines().find_map(|line| {
        let mut fields = entry_of(line, &is_it)?;
        let members = fields.rest.next().unwrap_or_default().split(',');
        Some(Group {
            id: fields.id,
            name: fields.name.to_owned(),
            members: members.map(|name| name.trim().to_owned()).collect(),
        })
    })
}

/// A line of one of the files: the name, and the fields after the number.
struct Entry<'a> {
    name: &'a str,
    id: u32,
    rest: std::str::Split<'a, char>,
}

/// Splits `line` into its fields if it describes the user or group whose name and number `is_it` accepts.
fn entry_of(line: &str, is_it: impl Fn(&str, u32) -> bool) -> Option<Entry<'_>> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let _password = fields.next()?;
    let id = number(fields.next()?)?;
    // Lines that begin with a sign refer to a directory service.
    let is_entry = !name.is_empty() && !name.starts_with(['+', '-', '#']);
    (is_entry && is_it(name, id)).then_some(Entry {
        name,
        id,
        rest: fields,
    })
}

fn number<T: FromStr>(field: &str) -> Option<T> {
    field.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME_USERS: &str = "root:x:0:0:root:/root:/bin/sh\n\
         # a comment:x:5:5\n\
         +::7:7:::\n\
         short:x:8\n\
         :x:9:9:::\n\
         alice:x:1000:100:Alice:/home/alice:/bin/sh\n\
         second:x:1000:101:::";

    #[test]
    fn users_are_found_by_number() {
        let alice = User {
            name: "alice".into(),
            group: 100,
        };
        assert_eq!(find_user(SOME_USERS, 1000), Some(alice));
        for id in [5, 7, 8, 9, 100, 12345] {
            assert_eq!(find_user(SOME_USERS, id), None);
        }
        assert_eq!(user(0).unwrap().name, "root");
        assert_eq!(user(u32::MAX - 7), None);
    }

    #[test]
    fn groups_are_found_with_their_members() {
        let groups = "root:x:0:\nkvm:x:108:alice,bob\nvideo:x:44";
        let kvm = find_group(groups, |_, id| id == 108).unwrap();
        assert_eq!((kvm.name.as_str(), kvm.members.len()), ("kvm", 2));
        assert!(kvm.members.contains(&"bob".to_owned()));
        let video = find_group(groups, |name, _| name == "video").unwrap();
        assert!(!video.members.contains(&"alice".to_owned()));
        assert_eq!(video.id, 44);
        assert_eq!(find_group(groups, |_, id| id == 1), None);
    }

    #[test]
    fn a_file_without_an_end_is_read_in_part() {
        assert_eq!(read("/dev/zero").unwrap().len() as u64, MAX_SIZE);
    }
}
