//! What this process may do to the host's networks.

use std::fs;

use crate::NetworkError;

/// Bit of `CAP_NET_ADMIN` in a set of Linux capabilities (`linux/capability.h`).
const CAP_NET_ADMIN: u32 = 12;

/// Returns whether this process may create interfaces and change what the host does with packets (`CAP_NET_ADMIN`).
pub fn can_administer_network() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective_capabilities(&status) & (1 << CAP_NET_ADMIN) != 0
}

/// Checks that this process may change networks of the host, which `nft` and `dnsmasq` report in words of their own.
///
/// # Errors
/// [`NetworkError::NotPermitted`], with `action` as what cannot be done.
pub(crate) fn check(action: &str) -> Result<(), NetworkError> {
    match can_administer_network() {
        true => Ok(()),
        false => Err(NetworkError::NotPermitted {
            action: action.to_owned(),
        }),
    }
}

fn effective_capabilities(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_capabilities_are_hexadecimal() {
        let status = "CapPrm:\t0000000000000001\nCapEff:\t0000000000001000\nCapBnd:\tf\n";
        assert_eq!(effective_capabilities(status), 1 << CAP_NET_ADMIN);
        assert_eq!(effective_capabilities("Name:\tbantam\n"), 0);
        assert_eq!(effective_capabilities("CapEff:\tx\n"), 0);
    }
}
