//! What a group may use, and how each version of control groups is told.

use crate::host::Version;

/// The range of the weight of a group of version 2.
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=10_000;
/// The weight of version 2 that is as much as [`DEFAULT_SHARES`].
const DEFAULT_WEIGHT: u64 = 100;
/// The shares that a group has if nothing is said.
const DEFAULT_SHARES: u64 = 1024;

/// What the processes of a group may use together. What is left out is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The share of processor time beside other groups when all processors are busy: 2 to 262144. Other groups have 1024 by
    /// default.
    pub cpu_shares: Option<u64>,
    /// The most processor time.
    pub cpu_quota: Option<CpuQuota>,
    /// The most memory in bytes. If the group needs more and none can be written out to swap, its processes are killed.
    pub memory_max: Option<u64>,
    /// The memory in bytes above which the kernel takes memory away from the group: at once with version 2, and when the host
    /// needs it with version 1.
    pub memory_high: Option<u64>,
}

/// Processor time that a group may use in each period. A processor has as many microseconds as the period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuQuota {
    /// The time in microseconds, from 1000.
    pub quota: u64,
    /// The period in microseconds: 1000 to 1000000.
    pub period: u64,
}

/// A value for a file of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The controller that has the file.
    pub(crate) controller: &'static str,
    /// The name of the file.
    pub(crate) file: &'static str,
    /// What is written into it.
    pub(crate) value: String,
}

impl Limits {
    /// Returns the controllers that are needed.
    pub(crate) fn controllers(&self) -> impl Iterator<Item = &'static str> {
        let cpu = self.cpu_shares.is_some() || self.cpu_quota.is_some();
        let memory = self.memory_max.is_some() || self.memory_high.is_some();
        let needed = [("cpu", cpu), ("memory", memory)].into_iter();
        needed.filter_map(|(controller, is_needed)| is_needed.then_some(controller))
    }

    /// Returns what a controller of this version is told.
    pub(crate) fn settings(&self, controller: &str, version: Version) -> Vec<Setting> {
        let mut settings = Vec::new();
        let mut add = |controller, file, value: Option<String>| {
            settings.extend(value.map(|value| Setting {
                controller,
                file,
                value,
            }));
        };
        let text = |number: u64| number.to_string();
        match (controller, version) {
            ("cpu", Version::One) => {
                add("cpu", "cpu.shares", self.cpu_shares.map(text));
                let period = self.cpu_quota.map(|it| text(it.period));
                add("cpu", "cpu.cfs_period_us", period);
                let quota = self.cpu_quota.map(|it| text(it.quota));
                add("cpu", "cpu.cfs_quota_us", quota);
            }
            ("cpu", Version::Two) => {
                let weight = self.cpu_shares.map(|shares| text(weight_of(shares)));
                add("cpu", "cpu.weight", weight);
                let max = self
                    .cpu_quota
                    .map(|it| format!("{} {}", it.quota, it.period));
                add("cpu", "cpu.max", max);
            }
            (_, Version::One) => {
                let high = self.memory_high.map(text);
                add("memory", "memory.soft_limit_in_bytes", high);
                let max = self.memory_max.map(text);
                add("memory", "memory.limit_in_bytes", max);
            }
            (_, Version::Two) => {
                add("memory", "memory.high", self.memory_high.map(text));
                add("memory", "memory.max", self.memory_max.map(text));
            }
        }
        settings
    }
}

/// Returns the weight of version 2 that stands to the default one as the shares to the default ones, as systemd has it.
fn weight_of(shares: u64) -> u64 {
    let weight = shares.saturating_mul(DEFAULT_WEIGHT) / DEFAULT_SHARES;
    weight.clamp(*WEIGHTS.start(), *WEIGHTS.end())
}
