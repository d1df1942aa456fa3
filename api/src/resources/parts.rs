//! The resources that clients can only put: the kernel, devices and files that stay as they are.

use serde::de::DeserializeOwned;

use crate::bodies::logger::Logger;
use crate::bodies::metrics::Metrics;
use crate::configuration::{Configuration, Put};
use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::request::{Call, Request};
use crate::resources::resource::Resource;

pub(super) static RESOURCES: &[Resource] = &[
    Resource {
        path: "logger",
        parse: |call| Ok(set_logger(whole(call)?)),
        groups: &[Group::new(
            "logger",
            "missed_metrics_count metrics_fails missed_log_count",
        )],
    },
    Resource {
        path: "metrics",
        parse: |call| Ok(Request::from(whole::<Metrics>(call)?)),
        groups: &[],
    },
    Resource {
        path: "boot-source",
        parse: |call| put(call, "boot_source", Configuration::put_boot_source),
        groups: &[],
    },
    Resource {
        path: "vsock",
        parse: |call| {
            put(call, "vsock", |configuration, vsock| {
                configuration.vsock = Some(vsock);
                Ok(())
            })
        },
        groups: &[Group::new(
            "vsock",
            "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails \
             ev_queue_event_fails muxer_event_fails conn_event_fails rx_queue_event_count \
             tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count tx_packets_count \
             conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails \
             rx_read_fails",
        )],
    },
    Resource {
        path: "entropy",
        parse: |call| {
            put(call, "entropy", |configuration, entropy| {
                configuration.entropy = Some(entropy);
                Ok(())
            })
        },
        groups: &[Group::new(
            "entropy",
            "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
             entropy_rate_limiter_throttled rate_limiter_event_count",
        )],
    },
    Resource {
        path: "serial",
        parse: |call| {
            put_beside_snapshot(call, "serial", |configuration, serial| {
                configuration.serial = Some(serial);
                Ok(())
            })
        },
        groups: &[Group::new(
            "uart",
            "error_count flush_count missed_read_count missed_write_count read_count write_count",
        )],
    },
    Resource {
        path: "cpu-config",
        parse: |call| put_beside_snapshot(call, "cpu_cfg", Configuration::put_cpu_config),
        groups: &[],
    },
];

/// The body of a request to put a resource, which is all that can be asked of it.
fn whole<T: DeserializeOwned>(call: &Call<'_>) -> Result<T, Fault> {
    match (call.method, call.rest) {
        (Method::Put, []) => call.json(),
        _ => Err(call.unknown()),
    }
}

/// Reads a request to put a part of the configuration.
fn put<T>(call: &Call<'_>, name: &'static str, put: Put<T>) -> Result<Request, Fault>
where
    T: DeserializeOwned + Send + 'static,
{
    Ok(Request::put(name, whole(call)?, put))
}

/// Reads a request to put a part of the configuration after which a snapshot can still be loaded.
fn put_beside_snapshot<T>(
    call: &Call<'_>,
    name: &'static str,
    put: Put<T>,
) -> Result<Request, Fault>
where
    T: DeserializeOwned + Send + 'static,
{
    let part = whole(call)?;
    let change = move |instance: &mut Instance| {
        instance.change_any(|configuration| put(configuration, part))
    };
    Ok(Request::change(Method::Put, name, change))
}

fn set_logger(logger: Logger) -> Request {
    Request::change(Method::Put, "logger", |instance| {
        instance.require_not_started()?;
        instance.put_logger(logger)
    })
}

impl From<Metrics> for Request {
    fn from(metrics: Metrics) -> Request {
        Request::change(Method::Put, "metrics", |instance| {
            instance.require_not_started()?;
            instance.put_metrics(metrics)
        })
    }
}
