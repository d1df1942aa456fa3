//! Limits of the resources of a process (setrlimit(2)).

use std::str::FromStr;

use nix::sys::resource::{Resource, setrlimit};

use crate::Error;

/// How many descriptors a monitor can have if nothing is said.
const DEFAULT_DESCRIPTORS: u64 = 2048;

/// What a monitor may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceLimits {
    file_size: Option<u64>,
    descriptors: u64,
}

impl ResourceLimits {
    /// Sets the limits for this process and those that it starts.
    pub(crate) fn apply(self) -> Result<(), Error> {
        let set = |resource, name, value| {
            setrlimit(resource, value, value).map_err(|source| Error::Limit {
                resource: name,
                value,
                source,
            })
        };
        if let Some(size) = self.file_size {
            set(Resource::RLIMIT_FSIZE, "fsize", size)?;
        }
        set(Resource::RLIMIT_NOFILE, "no-file", self.descriptors)
    }
}

/// One limit, written `RESOURCE=VALUE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceLimit {
    /// `fsize`: the most bytes of a file that the process writes.
    FileSize(u64),
    /// `no-file`: a number above those of all descriptors that the process can open.
    Descriptors(u64),
}

impl FromStr for ResourceLimit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<ResourceLimit, &'static str> {
        const USAGE: &str = "it must be fsize=BYTES or no-file=NUMBER";
        let (name, value) = text.split_once('=').ok_or(USAGE)?;
        let value = value.parse().map_err(|_| USAGE)?;
        match name {
            "fsize" => Ok(ResourceLimit::FileSize(value)),
            "no-file" => Ok(ResourceLimit::Descriptors(value)),
            _ => Err(USAGE),
        }
    }
}

impl FromIterator<ResourceLimit> for ResourceLimits {
    /// Takes the last limit of each resource. Without one, a monitor can have 2048 descriptors, and files of any size.
    fn from_iter<I: IntoIterator<Item = ResourceLimit>>(limits: I) -> ResourceLimits {
        let mut all = ResourceLimits {
            file_size: None,
            descriptors: DEFAULT_DESCRIPTORS,
        };
        for limit in limits {
            match limit {
                ResourceLimit::FileSize(size) => all.file_size = Some(size),
                ResourceLimit::Descriptors(count) => all.descriptors = count,
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_the_last_one_counts() {
        let limits = ["fsize=250000000", "no-file=64", "no-file=1024"];
        let limits: ResourceLimits = limits.iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(limits.file_size, Some(250_000_000));
        assert_eq!(limits.descriptors, 1024);
        let none: ResourceLimits = [].into_iter().collect();
        assert_eq!((none.file_size, none.descriptors), (None, 2048));
        for text in ["", "fsize", "fsize=", "fsize=-1", "cpu=1", "no-file=1k"] {
            assert!(text.parse::<ResourceLimit>().is_err(), "{text}");
        }
    }
}
