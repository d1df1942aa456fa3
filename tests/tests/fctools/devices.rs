//! Devices that change while the machine runs.

use std::fs;
use std::os::unix::fs::FileTypeExt;

use bantam_tests::{HostTap, require_taps};
use fctools::vm::api::VmApi;
use fctools::vm::configuration::InitMethod;
use fctools::vm::models::{
    BalloonDevice, NetworkInterface, UpdateBalloonDevice, UpdateBalloonStatistics, UpdateDrive,
    UpdateNetworkInterface, VsockDevice,
};
use fctools::vmm::resource::ResourceType;

use crate::workshop::{Workshop, drive, limiter, pause_then_kill, read_until};

#[tokio::test]
async fn devices_are_changed_while_the_machine_runs() {
    require_taps!();
    for via_file in [false, true] {
        let tap = HostTap::new();
        let mut workshop = Workshop::new();
        let mut data = workshop.configuration("hello", "finish=hang");
        let scratch = workshop.image("scratch");
        let other = workshop.image("other");
        data.drives = vec![drive("scratch", scratch)];
        data.network_interfaces = vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: tap.name.clone(),
            guest_mac: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }];
        data.balloon_device = Some(BalloonDevice {
            amount_mib: 8,
            deflate_on_oom: true,
            stats_polling_interval_s: Some(1),
            free_page_reporting: Some(true),
        });
        let socket = workshop.path("vsock");
        let produced = workshop
            .resources()
            .create_resource(&socket, ResourceType::Produced);
        data.vsock_device = Some(VsockDevice {
            guest_cid: 3,
            uds: produced.unwrap(),
        });
        let init_method = match via_file {
            true => InitMethod::ViaJsonConfiguration(workshop.path("config.json")),
            false => InitMethod::ViaApiCalls,
        };
        let (mut machine, _folder) = workshop.start(init_method, data).await;
        let mut output = machine.take_pipes().unwrap();
        read_until(&mut output.stdout, "PASS\n").await;

        let update = UpdateDrive {
            drive_id: "scratch".to_owned(),
            block: Some(other),
            rate_limiter: Some(limiter(1 << 20)),
        };
        machine.update_drive(update).await.unwrap();
        let update = UpdateNetworkInterface {
            iface_id: "eth0".to_owned(),
            rx_rate_limiter: Some(limiter(1 << 20)),
            tx_rate_limiter: None,
        };
        machine.update_network_interface(update).await.unwrap();

        assert_eq!(machine.get_balloon_device().await.unwrap().amount_mib, 8);
        // This guest has no driver for the balloon.
        let update = UpdateBalloonDevice { amount_mib: 16 };
        assert!(machine.update_balloon_device(update).await.is_err());
        let balloon = machine.get_balloon_device().await.unwrap();
        assert_eq!(balloon.amount_mib, 8);
        assert_eq!(balloon.stats_polling_interval_s, Some(1));
        assert_eq!(balloon.free_page_reporting, Some(true));
        let update = UpdateBalloonStatistics {
            stats_polling_interval_s: 2,
        };
        machine.update_balloon_statistics(update).await.unwrap();
        let statistics = machine.get_balloon_statistics().await.unwrap();
        assert_eq!(statistics.target_mib, 8);
        assert_eq!(statistics.actual_mib, 0);

        let kind = fs::metadata(&socket).unwrap().file_type();
        assert!(kind.is_socket());
        pause_then_kill(&mut machine).await;
    }
}
