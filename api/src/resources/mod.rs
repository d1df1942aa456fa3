//! The resources of the API: at which path each is, what can be asked of it, and what is counted of it.

mod actions;
mod balloon;
mod bantam;
mod drives;
mod instance;
mod machine_config;
mod mmds;
mod network_interfaces;
mod parts;
mod resource;
mod snapshot;
mod version;
mod vm;

use bantam_vmm::Controller;

use crate::fault::Fault;
use crate::instance::{Instance, InstanceOptions};
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::request::{Call, Request, no_such_resource};
use resource::Resource;

/// The resources that clients can do more with than put them. [`parts`] has the others.
static RESOURCES: &[Resource] = &[
    instance::RESOURCE,
    version::RESOURCE,
    vm::RESOURCE,
    actions::RESOURCE,
    machine_config::RESOURCE,
    drives::RESOURCE,
    bantam::RESOURCE,
    network_interfaces::RESOURCE,
    balloon::RESOURCE,
    mmds::RESOURCE,
    snapshot::RESOURCE,
];

/// Resources of Firecracker that are not supported yet, by the first part of their path.
const NOT_SUPPORTED: [(&str, &str); 2] = [
    ("pmem", "Persistent memory devices"),
    ("hotplug", "Memory hotplug"),
];

/// Every resource.
fn resources() -> impl Iterator<Item = &'static Resource> {
    RESOURCES.iter().chain(parts::RESOURCES)
}

/// The groups of metrics that belong to a resource.
fn metrics_groups() -> Vec<Group> {
    let groups = resources().flat_map(|resource| resource.groups);
    groups.copied().collect()
}

/// An instance with nothing configured, whose machine `controller` will own.
pub fn new_instance(controller: Controller, options: InstanceOptions) -> Instance {
    Instance::new(controller, options, metrics_groups())
}

/// Reads a request as HTTP carries it: a method, a path and a body.
///
/// # Errors
/// When there is no such resource, or the resource cannot have such a body.
pub fn parse_request(method: &str, path: &str, body: &[u8]) -> Result<Request, Fault> {
    let segments: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let first = segments.first().copied().unwrap_or_default();
    let is_unknown = |(name, _): &&(&str, &str)| *name == first;
    if let Some((_, what)) = NOT_SUPPORTED.iter().find(is_unknown) {
        let what = (*what).to_string();
        return Err(Fault::NotSupported { what });
    }
    let method = match method {
        "GET" => Method::Get,
        "PUT" => Method::Put,
        "PATCH" => Method::Patch,
        _ => return Err(no_such_resource(method, path)),
    };
    if method == Method::Get && !body.is_empty() {
        return Err(Fault::BodyOfGet);
    }
    let call = Call {
        method,
        path,
        rest: segments.get(1..).unwrap_or_default(),
        body,
    };
    match resources().find(|resource| resource.path == first) {
        Some(resource) => (resource.parse)(&call),
        None => Err(call.unknown()),
    }
}

#[cfg(test)]
mod tests;
