//! `/entropy`: random numbers of the host for the guest.

use bantam_vmm::config::LimitedDevice;
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::rate_limiter::RateLimiter;
use super::{Part, Resource, put_all};
use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::request::{Method, Request};

pub(crate) const RESOURCE: Resource = Resource {
    path: "entropy",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, []) => Ok(Request::put("entropy", call.json::<Entropy>()?)),
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.entropy.take(), checked),
    configure: |configuration, machine| {
        machine.rng = configuration.entropy.map(|entropy| LimitedDevice {
            limits: RateLimiter::limits(entropy.rate_limiter.as_ref()).into(),
        });
        Ok(())
    },
    groups: &[Group::new(
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
         entropy_rate_limiter_throttled rate_limiter_event_count",
    )],
};

/// Body of `PUT /entropy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits of the random bytes that the guest takes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl Part for Entropy {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        configuration.entropy = Some(self);
        Ok(())
    }
}
