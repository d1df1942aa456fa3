//! What clients ask for: HTTP's method, path and body as one enum.

use serde_json::Value;

use crate::fault::Fault;
use crate::json::{parse_json, parse_value};
use crate::resources::{
    Action, Balloon, BalloonHinting, BalloonStatisticsUpdate, BalloonUpdate, BootSource, CpuConfig,
    Drive, DriveUpdate, Entropy, Logger, MachineConfiguration, MachineConfigurationUpdate,
    MetadataConfig, Metrics, NetworkInterface, NetworkInterfaceUpdate, Serial, Vm, Vsock,
};
use crate::text::printable;

/// What a client asks for.
#[derive(Clone, Debug)]
pub enum Request {
    /// `GET /`
    GetInstance,
    /// `GET /version`
    GetVersion,
    /// `GET /vm/config`
    GetConfiguration,
    /// `GET /machine-config`
    GetMachineConfiguration,
    /// `GET /balloon`
    GetBalloon,
    /// `GET /balloon/statistics`
    GetBalloonStatistics,
    /// `GET /mmds`
    GetMetadata,
    /// `PUT /actions`
    PutAction(Action),
    /// `PATCH /vm`
    PatchVm(Vm),
    /// `PUT /machine-config`
    PutMachineConfiguration(MachineConfiguration),
    /// `PATCH /machine-config`
    PatchMachineConfiguration(MachineConfigurationUpdate),
    /// `PUT /boot-source`
    PutBootSource(BootSource),
    /// `PUT /drives/{drive_id}`
    PutDrive(Drive),
    /// `PATCH /drives/{drive_id}`
    PatchDrive(DriveUpdate),
    /// `PUT /network-interfaces/{iface_id}`
    PutNetworkInterface(NetworkInterface),
    /// `PATCH /network-interfaces/{iface_id}`
    PatchNetworkInterface(NetworkInterfaceUpdate),
    /// `PUT /balloon`
    PutBalloon(Balloon),
    /// `PATCH /balloon`
    PatchBalloon(BalloonUpdate),
    /// `GET /balloon/hinting/status`
    GetBalloonHinting,
    /// `PATCH /balloon/hinting/start`
    StartBalloonHinting(BalloonHinting),
    /// `PATCH /balloon/hinting/stop`
    StopBalloonHinting,
    /// `PATCH /balloon/statistics`
    PatchBalloonStatistics(BalloonStatisticsUpdate),
    /// `PUT /vsock`
    PutVsock(Vsock),
    /// `PUT /entropy`
    PutEntropy(Entropy),
    /// `PUT /serial`
    PutSerial(Serial),
    /// `PUT /logger`
    PutLogger(Logger),
    /// `PUT /metrics`
    PutMetrics(Metrics),
    /// `PUT /mmds`
    PutMetadata(Value),
    /// `PATCH /mmds`
    PatchMetadata(Value),
    /// `PUT /mmds/config`
    PutMetadataConfig(MetadataConfig),
    /// `PUT /cpu-config`
    PutCpuConfig(CpuConfig),
}

/// The methods that resources know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
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

/// Resources of Firecracker that are not there yet, by the first part of their path.
const NOT_SUPPORTED: [(&str, &str); 3] = [
    ("snapshot", "Snapshots"),
    ("pmem", "Persistent memory devices"),
    ("hotplug", "Memory hotplug"),
];

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// When there is no such resource, or the body is not one of it.
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Request, Fault> {
        let no_such_resource = || Fault::NoSuchResource {
            method: printable(method),
            path: printable(path),
        };
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
            _ => return Err(no_such_resource()),
        };
        match method {
            Method::Get if !body.is_empty() => return Err(Fault::BodyOfGet),
            // These are whole without a body.
            Method::Patch if matches!(segments[..], ["balloon", "hinting", "start" | "stop"]) => {}
            Method::Put | Method::Patch if body.is_empty() => {
                let method = method.name();
                return Err(Fault::EmptyBody { method });
            }
            _ => {}
        }
        Ok(match (method, &segments[..]) {
            (Method::Get, []) => Request::GetInstance,
            (Method::Get, ["version"]) => Request::GetVersion,
            (Method::Get, ["vm", "config"]) => Request::GetConfiguration,
            (Method::Get, ["machine-config"]) => Request::GetMachineConfiguration,
            (Method::Get, ["balloon"]) => Request::GetBalloon,
            (Method::Get, ["balloon", "statistics"]) => Request::GetBalloonStatistics,
            (Method::Get, ["balloon", "hinting", "status"]) => Request::GetBalloonHinting,
            (Method::Get, ["mmds"]) => Request::GetMetadata,
            (Method::Put, ["actions"]) => Request::PutAction(parse_json(body)?),
            (Method::Patch, ["vm"]) => Request::PatchVm(parse_json(body)?),
            (Method::Put, ["machine-config"]) => {
                Request::PutMachineConfiguration(parse_json(body)?)
            }
            (Method::Patch, ["machine-config"]) => {
                let update: MachineConfigurationUpdate = parse_json(body)?;
                if update.is_empty() {
                    let method = method.name();
                    return Err(Fault::EmptyBody { method });
                }
                Request::PatchMachineConfiguration(update)
            }
            (Method::Put, ["boot-source"]) => Request::PutBootSource(parse_json(body)?),
            (Method::Put, ["drives", id]) => {
                let drive: Drive = parse_json(body)?;
                check_id(id, &drive.drive_id)?;
                Request::PutDrive(drive)
            }
            (Method::Patch, ["drives", id]) => {
                let update: DriveUpdate = parse_json(body)?;
                check_id(id, &update.drive_id)?;
                Request::PatchDrive(update)
            }
            (Method::Put, ["network-interfaces", id]) => {
                let interface: NetworkInterface = parse_json(body)?;
                check_id(id, &interface.iface_id)?;
                Request::PutNetworkInterface(interface)
            }
            (Method::Patch, ["network-interfaces", id]) => {
                let update: NetworkInterfaceUpdate = parse_json(body)?;
                check_id(id, &update.iface_id)?;
                Request::PatchNetworkInterface(update)
            }
            (Method::Put, ["balloon"]) => Request::PutBalloon(parse_json(body)?),
            (Method::Patch, ["balloon"]) => Request::PatchBalloon(parse_json(body)?),
            (Method::Patch, ["balloon", "statistics"]) => {
                Request::PatchBalloonStatistics(parse_json(body)?)
            }
            (Method::Patch, ["balloon", "hinting", "start"]) => {
                Request::StartBalloonHinting(match body {
                    [] => BalloonHinting::default(),
                    body => parse_json(body)?,
                })
            }
            (Method::Patch, ["balloon", "hinting", "stop"]) => Request::StopBalloonHinting,
            (Method::Put, ["vsock"]) => Request::PutVsock(parse_json(body)?),
            (Method::Put, ["entropy"]) => Request::PutEntropy(parse_json(body)?),
            (Method::Put, ["serial"]) => Request::PutSerial(parse_json(body)?),
            (Method::Put, ["logger"]) => Request::PutLogger(parse_json(body)?),
            (Method::Put, ["metrics"]) => Request::PutMetrics(parse_json(body)?),
            (Method::Put, ["mmds"]) => Request::PutMetadata(parse_value(body)?),
            (Method::Patch, ["mmds"]) => Request::PatchMetadata(parse_value(body)?),
            (Method::Put, ["mmds", "config"]) => Request::PutMetadataConfig(parse_json(body)?),
            (Method::Put, ["cpu-config"]) => Request::PutCpuConfig(parse_json(body)?),
            _ => return Err(no_such_resource()),
        })
    }
}

/// Checks the name of a device, which a request has twice.
fn check_id(path: &str, body: &str) -> Result<(), Fault> {
    if path != body {
        return Err(Fault::OtherId {
            path: printable(path),
            body: printable(body),
        });
    }
    check_name(body)
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fault(method: &str, path: &str, body: &str) -> String {
        let parsed = Request::parse(method, path, body.as_bytes());
        parsed.expect_err("it is refused").to_string()
    }

    #[test]
    fn requests_are_told_apart_by_method_and_path() {
        assert!(matches!(
            Request::parse("GET", "/", b""),
            Ok(Request::GetInstance)
        ));
        assert!(matches!(
            Request::parse("GET", "/balloon/statistics", b""),
            Ok(Request::GetBalloonStatistics)
        ));
        let drive = br#"{"drive_id": "root", "is_root_device": true, "path_on_host": "a"}"#;
        let parsed = Request::parse("PUT", "/drives/root", drive);
        assert!(matches!(parsed, Ok(Request::PutDrive(drive)) if drive.is_root_device));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (method, path, body, message) in [
            (
                "DELETE",
                "/",
                "",
                "Invalid request method and/or path: DELETE /",
            ),
            (
                "GET",
                "/vm",
                "",
                "Invalid request method and/or path: GET /vm",
            ),
            (
                "PUT",
                "/drives",
                "{}",
                "Invalid request method and/or path: PUT /drives",
            ),
            ("GET", "/", "{}", "GET request cannot have a body"),
            (
                "PUT",
                "/vsock",
                "",
                "Empty PUT request: a JSON body is needed",
            ),
            (
                "PATCH",
                "/machine-config",
                "{}",
                "Empty PATCH request: a JSON body is needed",
            ),
            (
                "PUT",
                "/machine-config",
                r#"{"vcpu_count": "two"}"#,
                "Invalid JSON body: vcpu_count: invalid type: string \"two\", expected u8 at line 1 \
                 column 20",
            ),
            (
                "PUT",
                "/entropy",
                r#"{"rate_limiter": {"ops": {"size": 1, "refill": 2}}}"#,
                "Invalid JSON body: rate_limiter.ops.refill: unknown field `refill`, expected one of \
                 `size`, `one_time_burst`, `refill_time` at line 1 column 45",
            ),
            (
                "PUT",
                "/vsock",
                "{} x",
                "Invalid JSON body: missing field `guest_cid` at line 1 column 2",
            ),
            (
                "PUT",
                "/entropy",
                "{} x",
                "Invalid JSON body: trailing characters at line 1 column 4",
            ),
            (
                "PUT",
                "/entropy",
                r#"{"rate_limiter": {"#,
                "Invalid JSON body: rate_limiter: EOF while parsing an object at line 1 column 18",
            ),
            (
                "PUT",
                "/entropy",
                " []",
                "Invalid JSON body: it is an array, but has to be an object",
            ),
            (
                "PUT",
                "/drives/a",
                r#"{"drive_id": "b", "is_root_device": true}"#,
                "The id from the path 'a' does not match the id from the body 'b'",
            ),
            (
                "PUT",
                "/drives/a-b",
                r#"{"drive_id": "a-b", "is_root_device": true}"#,
                "Invalid id 'a-b': only letters, digits and underscores are allowed",
            ),
            (
                "PUT",
                "/snapshot/create",
                "{}",
                "Snapshots: not supported by this version of Bantam",
            ),
            (
                "GET",
                "/hotplug/memory",
                "",
                "Memory hotplug: not supported by this version of Bantam",
            ),
            (
                "PATCH",
                "/balloon/hinting/start",
                r#"{"acknowledge_on_stop": 1}"#,
                "Invalid JSON body: acknowledge_on_stop: invalid type: integer `1`, expected a boolean \
                 at line 1 column 25",
            ),
            (
                "PATCH",
                "/balloon/hinting",
                "{}",
                "Invalid request method and/or path: PATCH /balloon/hinting",
            ),
        ] {
            assert_eq!(fault(method, path, body), message, "{method} {path} {body}");
        }
    }

    proptest! {
        #[test]
        fn any_request_is_read_or_refused_on_one_line(
            method in "GET|PUT|PATCH|[A-Z]{1,5}",
            path in "(/(drives|vm|balloon|mmds|config|statistics|[^/]{0,5})){0,4}",
            body in prop_oneof![
                ".*".prop_map(String::into_bytes),
                proptest::collection::vec(any::<u8>(), 0..100),
                "(\\{|\\}|\"[a-z_]{0,8}\"|:|,|\\[|\\]|[0-9]{1,3}|null){0,20}"
                    .prop_map(String::into_bytes),
            ],
        ) {
            if let Err(fault) = Request::parse(&method, &path, &body) {
                let text = fault.to_string();
                prop_assert!(!text.contains('\n'), "{}", text);
            }
        }
    }
}
