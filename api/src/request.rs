//! Requests of clients, as HTTP carries them: a method, a path and a body.

use std::fmt;

use serde::de::DeserializeOwned;

use crate::fault::Fault;
use crate::instance::Instance;
use crate::json::{parse_json, parse_value};
use crate::reply::Reply;
use crate::resources::{Part, RESOURCES};
use crate::text::printable;
use crate::view::View;

/// A request of a client.
pub struct Request {
    method: Method,
    /// The name that it is counted by.
    name: &'static str,
    pub(crate) action: Action,
}

/// What a request does.
pub(crate) enum Action {
    /// Reads something. This takes no noticeable time, and may happen while another request is executed.
    Read(fn(&View) -> Result<Reply, Fault>),
    /// Changes something. Only one such request is executed at a time.
    Change(Change),
}

type Change = Box<dyn FnOnce(&mut Instance) -> Result<(), Fault> + Send>;

/// The methods that resources know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Method {
    Get,
    Put,
    Patch,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
        }
    }
}

/// Resources of Firecracker that are not supported yet, by the first part of their path.
const NOT_SUPPORTED: [(&str, &str); 3] = [
    ("snapshot", "Snapshots"),
    ("pmem", "Persistent memory devices"),
    ("hotplug", "Memory hotplug"),
];

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// If there is no such resource, or the resource cannot have such a body.
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Request, Fault> {
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
        match RESOURCES.iter().find(|resource| resource.path == first) {
            Some(resource) => (resource.parse)(&call),
            None => Err(call.unknown()),
        }
    }

    /// Creates a request to read.
    pub(crate) fn get(name: &'static str, read: fn(&View) -> Result<Reply, Fault>) -> Request {
        Request {
            method: Method::Get,
            name,
            action: Action::Read(read),
        }
    }

    /// Creates a request to put a part of the configuration.
    pub(crate) fn put(name: &'static str, part: impl Part) -> Request {
        Request::change(Method::Put, name, |instance| {
            instance.change(|configuration| part.put(configuration))
        })
    }

    /// Creates a request to change what is there.
    pub(crate) fn patch(
        name: &'static str,
        change: impl FnOnce(&mut Instance) -> Result<(), Fault> + Send + 'static,
    ) -> Request {
        Request::change(Method::Patch, name, change)
    }

    /// Creates a request that changes something.
    pub(crate) fn change(
        method: Method,
        name: &'static str,
        change: impl FnOnce(&mut Instance) -> Result<(), Fault> + Send + 'static,
    ) -> Request {
        Request {
            method,
            name,
            action: Action::Change(Box::new(change)),
        }
    }

    /// Returns the method and the name by which it is counted.
    pub(crate) fn counted_as(&self) -> (Method, &'static str) {
        (self.method, self.name)
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method.name(), self.name)
    }
}

/// A request whose resource is found.
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    path: &'a str,
    /// What follows the first part of the path.
    pub(crate) rest: &'a [&'a str],
    pub(crate) body: &'a [u8],
}

impl Call<'_> {
    /// Reads the body as an object in JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        match self.body {
            [] => Err(self.without_body()),
            body => parse_json(body),
        }
    }

    /// Reads the body as any value in JSON.
    pub(crate) fn value<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        match self.body {
            [] => Err(self.without_body()),
            body => parse_value(body),
        }
    }

    /// Checks the name of a device, which must be the same in the path and the body.
    pub(crate) fn check_id(&self, path: &str, body: &str) -> Result<(), Fault> {
        if path != body {
            return Err(Fault::OtherId {
                path: printable(path),
                body: printable(body),
            });
        }
        check_name(body)
    }

    /// Returns the fault of a request that needs a body and has none.
    pub(crate) fn without_body(&self) -> Fault {
        let method = self.method.name();
        Fault::EmptyBody { method }
    }

    /// Returns the fault of a request whose method and path the resource does not know.
    pub(crate) fn unknown(&self) -> Fault {
        match (self.method, self.body) {
            (Method::Put | Method::Patch, []) => self.without_body(),
            _ => no_such_resource(self.method.name(), self.path),
        }
    }
}

fn no_such_resource(method: &str, path: &str) -> Fault {
    Fault::NoSuchResource {
        method: printable(method),
        path: printable(path),
    }
}

/// Checks the name of a device.
pub(crate) fn check_name(id: &str) -> Result<(), Fault> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if id.is_empty() || !id.chars().all(valid) {
        return Err(Fault::Id { id: printable(id) });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
