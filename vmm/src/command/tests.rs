use std::num::NonZeroU32;
use std::path::Path;

use bantam_devices::rate_limiter::{Limits, RateLimit};
use bantam_devices::virtio::balloon::HintingCommand;
use bantam_devices::virtio::owner::{DiskJob, JobState, JobStatus, PresentImage};
use bantam_storage::ImageFormat;
use serde_json::json;

use super::*;
use crate::snapshot::{SnapshotBase, SnapshotDisks, SnapshotFiles};

fn comes_back<T>(value: &T)
where
    T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug,
{
    let text = serde_json::to_string(value).unwrap();
    assert_eq!(serde_json::from_str::<T>(&text).unwrap(), *value, "{text}");
}

#[test]
fn commands_and_answers_travel_as_json() {
    let limits = Limits {
        bytes: None,
        operations: Some(RateLimit {
            size: u64::MAX,
            refill_time: Duration::new(1, 2),
            one_time_burst: 3,
        }),
    };
    let mut config = MachineConfig::new("vmlinux");
    config.disks = vec!["root.img,ro,id=root".parse().unwrap()];
    for command in [
        Command::Configure(Box::new(config.clone())),
        Command::Start,
        Command::ShutDown {
            timeout: Some(Duration::from_millis(1500)),
        },
        Command::ShutDown { timeout: None },
        Command::SnapshotDisks(vec![DiskSnapshot {
            disk: "root".parse().unwrap(),
            path: "/overlay.qcow2".into(),
        }]),
        Command::Snapshot(Box::new(SnapshotOptions {
            files: SnapshotFiles::in_directory(Path::new("/snapshot")),
            base: Some(SnapshotBase::Last),
            disks: SnapshotDisks::Unprotected,
            stop: false,
            note: Some("root".to_owned()),
        })),
        Command::Fork(SnapshotDisks::Overlays),
        Command::PutMetadata(json!({"a": [1, null]})),
    ] {
        comes_back(&command);
    }
    for command in [
        DeviceCommand::UpdateSize,
        DeviceCommand::ReplaceImage {
            path: "/other.img".into(),
            format: Some(ImageFormat::Qcow2),
        },
        DeviceCommand::Grow { size: u64::MAX },
        DeviceCommand::StartJob(DiskJob::Copy {
            path: "/copy.img".into(),
            format: ImageFormat::Raw,
        }),
        DeviceCommand::StartJob(DiskJob::Pull),
        DeviceCommand::CancelJob,
        DeviceCommand::SetLimits(limits),
        DeviceCommand::SetStatisticsInterval {
            seconds: NonZeroU32::MIN,
        },
        DeviceCommand::Hint(HintingCommand::Stop),
    ] {
        comes_back(&Command::Device {
            name: "root".parse().unwrap(),
            command,
        });
    }
    for answer in [
        Answer::Done,
        Answer::State(State::Paused),
        Answer::ShutDown(ShutDown::PowerCut),
        Answer::ShutDown(ShutDown::Unheard),
        Answer::Configuration(Box::new(config)),
        Answer::Device(DeviceAnswer::Size(u64::MAX)),
        Answer::Device(DeviceAnswer::Image(PresentImage {
            path: "/copy.img".into(),
            format: ImageFormat::Raw,
            block_size: 512,
        })),
        Answer::Device(DeviceAnswer::Job(Some(JobStatus {
            job: DiskJob::Commit,
            state: JobState::Failed {
                reason: "there is no room".to_owned(),
            },
            done: 1,
            total: 2,
        }))),
        Answer::Snapshot {
            held_up: Duration::from_micros(700),
        },
        Answer::Metadata(None),
    ] {
        comes_back(&answer);
    }
}

#[test]
fn a_command_for_a_device_is_written_by_its_name() {
    let command = Command::Device {
        name: "balloon".parse().unwrap(),
        command: DeviceCommand::SetBalloonTarget { mib: 64 },
    };
    let text =
        json!({"device": {"name": "balloon", "command": {"set-balloon-target": {"mib": 64}}}});
    assert_eq!(serde_json::to_value(&command).unwrap(), text);
    let wrong = json!({"device": {"name": "a b", "command": "update-size"}});
    assert!(serde_json::from_value::<Command>(wrong).is_err());
}
