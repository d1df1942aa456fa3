//! What a client asks for, and the answer to it.

use std::fmt;

use serde::de::DeserializeOwned;

use crate::configuration::Put;
use crate::device_ids::check_id;
use crate::fault::Fault;
use crate::instance::Instance;
use crate::json::{parse_json, parse_value};
use crate::method::Method;
use crate::reply::Reply;
use crate::text::printable;
use crate::view::View;

/// A request of a client.
pub struct Request {
    method: Method,
    /// The name that it is counted by.
    name: &'static str,
    action: Action,
}

/// What a request does.
enum Action {
    /// It reads. This takes no time that others would notice, and may be while another request is executed.
    Read(Read),
    /// It changes something. There is one such request at a time.
    Change(Change),
}

type Read = Box<dyn Fn(&View) -> Result<Reply, Fault> + Send>;
type Change = Box<dyn FnOnce(&mut Instance) -> Result<(), Fault> + Send>;

impl Request {
    /// A request to read.
    pub(crate) fn get(
        name: &'static str,
        read: impl Fn(&View) -> Result<Reply, Fault> + Send + 'static,
    ) -> Request {
        Request {
            method: Method::Get,
            name,
            action: Action::Read(Box::new(read)),
        }
    }

    /// A request to put a part of the configuration.
    pub(crate) fn put<T: Send + 'static>(name: &'static str, part: T, put: Put<T>) -> Request {
        Request::change(Method::Put, name, move |instance| {
            instance.change(|configuration| put(configuration, part))
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

    /// Answers it if it only reads, for which a view is enough. None if it changes something.
    pub(crate) fn answer(&self, view: &View) -> Option<Result<Reply, Fault>> {
        let Action::Read(read) = &self.action else {
            return None;
        };
        let result = read(view);
        view.count(self.counted_as(), result.is_err());
        Some(result)
    }

    /// Does what it asks for.
    ///
    /// # Errors
    /// When it is refused.
    pub fn execute(self, instance: &mut Instance) -> Result<Reply, Fault> {
        let counted_as = self.counted_as();
        let result = match self.action {
            Action::Read(read) => read(instance.view()),
            Action::Change(change) => change(instance).map(|()| Reply::Done),
        };
        instance.view().count(counted_as, result.is_err());
        result
    }

    /// The method and the name by which it is counted.
    pub(crate) fn counted_as(&self) -> (Method, &'static str) {
        (self.method, self.name)
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method.name(), self.name)
    }
}

/// A request as HTTP carries it, to a resource that is found.
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    pub(crate) path: &'a str,
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

    /// Checks the id of a device, which the path and the body have.
    pub(crate) fn check_id(&self, path: &str, body: &str) -> Result<(), Fault> {
        if path != body {
            return Err(Fault::OtherId {
                path: printable(path),
                body: printable(body),
            });
        }
        check_id(body)
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

/// Why a request is refused if there is nothing for this method at this path.
pub(crate) fn no_such_resource(method: &str, path: &str) -> Fault {
    Fault::NoSuchResource {
        method: printable(method),
        path: printable(path),
    }
}
