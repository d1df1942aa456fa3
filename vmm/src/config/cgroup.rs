//! What the process of a machine may use of the host.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::forms::Single;
use super::{ConfigError, Quantity};

/// Shares of processor time (cgroups(7), `cpu.shares`).
const SHARES: RangeInclusive<u64> = 2..=262_144;
/// Periods in microseconds, as the kernel accepts them.
const PERIODS: RangeInclusive<u64> = 1000..=1_000_000;
/// Times in a period in microseconds, as the kernel accepts them (`max_cfs_runtime` and `min_cfs_quota_period`).
const QUOTAS: RangeInclusive<u64> = 1000..=203_128_464_146;
/// Numbers of bytes; less than this runs no process.
const MEMORY: RangeInclusive<u64> = 1 << 20..=i64::MAX as u64;

/// Limits what the process of a machine may use of the host, by a control group (cgroups(7)). The program that owns the
/// machine makes the group.
///
/// In a machine file a `[cgroup]` table with these keys. What is left out is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "limits of the machine: a table with cpu-shares, cpu-quota, cpu-period, memory-max and memory-high"
)]
pub struct CgroupConfig {
    /// Share of processor time beside other groups, which have 1024 by default: 2 to 262144.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<Quantity>,
    /// Processor time in each period, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_quota: Option<Quantity>,
    /// That period in microseconds; 100000 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_period: Option<Quantity>,
    /// Memory in bytes at which the process is killed if the kernel can take none away from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<Quantity>,
    /// Memory in bytes from which the kernel takes memory away from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_high: Option<Quantity>,
}

impl CgroupConfig {
    /// Checks that the values are ones that control groups accept.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (key, value, range) in [
            ("cpu-shares", self.cpu_shares, SHARES),
            ("cpu-quota", self.cpu_quota, QUOTAS),
            ("cpu-period", self.cpu_period, PERIODS),
            ("memory-max", self.memory_max, MEMORY),
            ("memory-high", self.memory_high, MEMORY),
        ] {
            if let Some(value) = value.map(Quantity::get)
                && !range.contains(&value)
            {
                let (least, most) = range.into_inner();
                return Err(ConfigError::CgroupRange {
                    key,
                    value,
                    least,
                    most,
                });
            }
        }
        match (self.cpu_period, self.cpu_quota) {
            (Some(_), None) => Err(ConfigError::CgroupPeriod),
            _ => Ok(()),
        }
    }
}

impl Single for CgroupConfig {
    const NAME: &'static str = "cgroup";
}

#[cfg(test)]
mod tests {
    use crate::config::MachineConfig;

    fn read(keys: &str) -> Result<MachineConfig, String> {
        MachineConfig::from_toml(&format!("kernel = '/k'\n[cgroup]\n{keys}"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn limits_that_the_kernel_would_refuse_are_refused() {
        let config = read("cpu-shares = 512\nmemory-max = '1G'").unwrap();
        assert_eq!(config.cgroup.unwrap().memory_max.unwrap().get(), 1 << 30);
        for (keys, expected) in [
            (
                "cpu-shares = 1",
                "cpu-shares of [cgroup] is 1: expected 2 to 262144",
            ),
            (
                "cpu-quota = 999",
                "cpu-quota of [cgroup] is 999: expected 1000 to ",
            ),
            (
                "cpu-quota = 1000\ncpu-period = 1000001",
                "cpu-period of [cgroup] is 1000001: expected 1000 to 1000000",
            ),
            (
                "cpu-period = 1000",
                "cpu-period of [cgroup] needs a cpu-quota",
            ),
            (
                "memory-max = 1000",
                "memory-max of [cgroup] is 1000: expected 1048576 to ",
            ),
        ] {
            let error = read(keys).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
