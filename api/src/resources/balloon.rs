//! `/balloon`: memory that the guest gives back.

use std::num::NonZeroU32;

use bantam_vmm::config::{BalloonConfig, BalloonSize, DeviceName};
use bantam_vmm::{BalloonStatistics, DeviceAnswer, DeviceCommand, GuestStatistics, HintingCommand};
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::machine_config::{HugePages, MachineConfiguration};
use super::{Part, Resource, put_all};
use crate::fault::Fault;
use crate::instance::Instance;
use crate::metrics_groups::Group;
use crate::reply::Reply;
use crate::request::{Method, Request};
use crate::view::View;

const NO_BALLOON: Fault = Fault::NotConfigured { kind: "balloon" };

pub(crate) const RESOURCE: Resource = Resource {
    path: "balloon",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("balloon", |view| {
            Reply::value(balloon(&view.configuration())?)
        })),
        (Method::Get, ["statistics"]) => Ok(Request::get("balloon_stats", statistics)),
        (Method::Get, ["hinting", "status"]) => Ok(Request::get("balloon", hinting)),
        (Method::Put, []) => Ok(Request::put("balloon", call.json::<Balloon>()?)),
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
    check: |given, checked| put_all(given.balloon.take(), checked),
    configure: |configuration, machine| {
        machine.balloon = configuration.balloon.as_ref().map(Balloon::config);
        Ok(())
    },
    groups: &[Group::new(
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count \
         event_fails",
    )],
};

/// Body of `PUT /balloon`, and answer of `GET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Size wanted in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take memory back when it has no other.
    pub deflate_on_oom: bool,
    /// Seconds between two reports of the guest's memory; none if zero.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked for hints of free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports pages that it does not use.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// See [`Balloon::amount_mib`].
    pub amount_mib: u32,
}

/// Body of `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonHinting {
    /// Whether the guest may use the pages again as soon as it has reported all of them.
    #[serde(default = "acknowledge")]
    pub acknowledge_on_stop: bool,
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
pub struct BalloonHintingStatus {
    /// The request to the guest: 0 if there was none yet, 1 if it is over, or else its number.
    pub host_cmd: u32,
    /// The guest's last answer, if there is one: the number of a request, or 0 at the end of one.
    pub guest_cmd: Option<u32>,
}

/// Answer of `GET /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonStatisticsAnswer {
    /// Pages of 4096 bytes that the guest is to give up.
    pub target_pages: u32,
    /// Pages in the balloon.
    pub actual_pages: u32,
    /// [`BalloonStatisticsAnswer::target_pages`] in MiB.
    pub target_mib: u32,
    /// [`BalloonStatisticsAnswer::actual_pages`] in whole MiB.
    pub actual_mib: u32,
    /// What the guest said last of its memory.
    #[serde(flatten)]
    pub guest: GuestStatistics,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsUpdate {
    /// See [`Balloon::stats_polling_interval_s`].
    pub stats_polling_interval_s: u16,
}

impl Balloon {
    fn config(&self) -> BalloonConfig {
        BalloonConfig {
            size: BalloonSize::from_mib(self.amount_mib),
            deflate_on_oom: self.deflate_on_oom,
            reporting: self.free_page_reporting,
            hinting: self.free_page_hinting,
            statistics: self.stats_polling_interval_s.into(),
        }
    }

    /// Checks that the machine can have this balloon, so that a client hears of it at once.
    pub(crate) fn check(&self, machine: &MachineConfiguration) -> Result<(), Fault> {
        let refused = |reason| {
            Err(Fault::Value {
                what: "balloon",
                reason,
            })
        };
        let (amount, memory) = (self.amount_mib, machine.mem_size_mib);
        if u64::from(amount) > memory {
            return refused(format!(
                "{amount} MiB are more than the memory of {memory} MiB"
            ));
        }
        if machine.huge_pages == HugePages::TwoMib {
            return refused("it cannot give back huge pages of 2M".to_string());
        }
        Ok(())
    }
}

impl Part for Balloon {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        self.check(&configuration.machine_config)?;
        configuration.balloon = Some(self);
        Ok(())
    }
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

/// Checks that the guest can do what it is asked for. Otherwise Firecracker refuses, and its clients may try
/// again later.
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

/// What the machine's balloon says of itself.
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

/// Notes a change of the balloon in the configuration.
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
