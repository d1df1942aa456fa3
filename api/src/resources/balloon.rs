//! `/balloon`: memory that the guest gives back.

use std::num::NonZeroU32;

use bantam_vmm::config::DeviceName;
use bantam_vmm::{BalloonStatistics, DeviceAnswer, DeviceCommand, GuestStatistics, HintingCommand};
use serde::{Deserialize, Serialize};

use crate::configuration::{Balloon, Configuration};
use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;
use crate::view::View;

const NO_BALLOON: Fault = Fault::NotConfigured { kind: "balloon" };

pub(super) const RESOURCE: Resource = Resource {
    path: "balloon",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("balloon", |view| {
            Reply::value(balloon(&view.configuration())?)
        })),
        (Method::Get, ["statistics"]) => Ok(Request::get("balloon_stats", statistics)),
        (Method::Get, ["hinting", "status"]) => Ok(Request::get("balloon", hinting)),
        (Method::Put, []) => Ok(Request::put(
            "balloon",
            call.json()?,
            Configuration::put_balloon,
        )),
        (Method::Patch, []) => {
            let update: BalloonUpdate = call.json()?;
            Ok(Request::patch("balloon", move |instance| {
                update.apply(instance)
            }))
        }
        (Method::Patch, ["statistics"]) => {
            let update: BalloonStatisticsUpdate = call.json()?;
            Ok(Request::patch("balloon_stats", move |instance| {
                update.apply(instance)
            }))
        }
        // These two need no body.
        (Method::Patch, ["hinting", "start"]) => {
            let wanted = match call.body {
                [] => BalloonHinting::default(),
                _ => call.json()?,
            };
            let command = HintingCommand::Start {
                acknowledge_on_stop: wanted.acknowledge_on_stop,
            };
            Ok(Request::patch("balloon", move |instance| {
                hint(command, instance)
            }))
        }
        (Method::Patch, ["hinting", "stop"]) => Ok(Request::patch("balloon", |instance| {
            hint(HintingCommand::Stop, instance)
        })),
        _ => Err(call.unknown()),
    },
    groups: &[Group::new(
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count \
         event_fails",
    )],
};

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonUpdate {
    /// See [`Balloon::amount_mib`].
    amount_mib: u32,
}

/// Body of `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonHinting {
    /// Whether the guest may use the pages again as soon as it has reported all of them.
    #[serde(default = "acknowledge")]
    acknowledge_on_stop: bool,
}

fn acknowledge() -> bool {
    true
}

impl Default for BalloonHinting {
    fn default() -> BalloonHinting {
        BalloonHinting {
            acknowledge_on_stop: acknowledge(),
        }
    }
}

/// Answer of `GET /balloon/hinting/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct BalloonHintingStatus {
    /// The request to the guest: 0 if there was none yet, 1 if it is over, or else its number.
    host_cmd: u32,
    /// The guest's last answer, if there is one: the number of a request, or 0 at the end of one.
    guest_cmd: Option<u32>,
}

/// Answer of `GET /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct BalloonStatisticsAnswer {
    /// Pages of 4096 bytes that the guest is to give up.
    target_pages: u32,
    /// Pages in the balloon.
    actual_pages: u32,
    /// [`BalloonStatisticsAnswer::target_pages`] in MiB.
    target_mib: u32,
    /// [`BalloonStatisticsAnswer::actual_pages`] in whole MiB.
    actual_mib: u32,
    /// What the guest said last of its memory.
    #[serde(flatten)]
    guest: GuestStatistics,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonStatisticsUpdate {
    /// See [`Balloon::stats_polling_interval_s`].
    stats_polling_interval_s: u16,
}

fn balloon(configuration: &Configuration) -> Result<&Balloon, Fault> {
    configuration.balloon.as_ref().ok_or(NO_BALLOON)
}

fn statistics(view: &View) -> Result<Reply, Fault> {
    view.require_started()?;
    if balloon(&view.configuration())?.stats_polling_interval_s == 0 {
        return Err(Fault::NotConfigured {
            kind: "interval of the balloon's statistics",
        });
    }
    let BalloonStatistics {
        target_pages,
        actual_pages,
        target_mib,
        actual_mib,
        guest,
        ..
    } = ask(view)?;
    Reply::value(&BalloonStatisticsAnswer {
        target_pages,
        actual_pages,
        target_mib,
        actual_mib,
        guest,
    })
}

fn hinting(view: &View) -> Result<Reply, Fault> {
    require_driver(view)?;
    let status = ask(view)?.hinting;
    let status = status.ok_or(Fault::NotConfigured {
        kind: "free page hinting",
    })?;
    Reply::value(&BalloonHintingStatus {
        host_cmd: status.host_command,
        guest_cmd: status.guest_command,
    })
}

fn hint(command: HintingCommand, instance: &mut Instance) -> Result<(), Fault> {
    require_driver(instance.view())?;
    command_device(instance, DeviceCommand::Hint(command))
}

/// Checks that the guest can do what it is asked to do. Otherwise the request is refused, as by Firecracker,
/// whose clients may try again later.
fn require_driver(view: &View) -> Result<(), Fault> {
    view.require_started()?;
    balloon(&view.configuration())?;
    match ask(view)?.has_driver {
        true => Ok(()),
        false => Err(Fault::NotNow(
            "The guest has no driver for the balloon yet: check that its kernel has virtio_balloon",
        )),
    }
}

fn device_name() -> Result<DeviceName, Fault> {
    "balloon".parse().map_err(Fault::value("balloon"))
}

/// Asks the machine's balloon for its statistics.
fn ask(view: &View) -> Result<BalloonStatistics, Fault> {
    let name = device_name()?;
    let answer = view
        .controller()
        .device(&name, DeviceCommand::BalloonStatistics)?;
    match answer {
        DeviceAnswer::Balloon(statistics) => Ok(*statistics),
        _ => Err(NO_BALLOON),
    }
}

fn command_device(instance: &Instance, command: DeviceCommand) -> Result<(), Fault> {
    let name = device_name()?;
    instance.controller().device(&name, command)?;
    Ok(())
}

/// Records a change of the balloon in the configuration.
fn record(instance: &mut Instance, change: impl FnOnce(&mut Balloon)) {
    instance.record(|configuration| {
        if let Some(balloon) = &mut configuration.balloon {
            change(balloon);
        }
    });
}

impl BalloonUpdate {
    fn apply(self, instance: &mut Instance) -> Result<(), Fault> {
        require_driver(instance.view())?;
        let mib = self.amount_mib;
        command_device(instance, DeviceCommand::SetBalloonTarget { mib })?;
        record(instance, |balloon| balloon.amount_mib = self.amount_mib);
        Ok(())
    }
}

impl BalloonStatisticsUpdate {
    fn apply(self, instance: &mut Instance) -> Result<(), Fault> {
        instance.view().require_started()?;
        let seconds = self.stats_polling_interval_s;
        let before = balloon(&instance.view().configuration())?.stats_polling_interval_s;
        match NonZeroU32::new(seconds.into()) {
            Some(seconds) if before != 0 => {
                command_device(instance, DeviceCommand::SetStatisticsInterval { seconds })?;
            }
            None if before == 0 => {}
            _ => {
                return Err(Fault::NotNow(
                    "Statistics of the balloon cannot be turned on or off after the start",
                ));
            }
        }
        record(instance, |balloon| {
            balloon.stats_polling_interval_s = seconds;
        });
        Ok(())
    }
}
