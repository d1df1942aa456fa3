//! Metadata for the guest.

use bantam_tests::{HostTap, require_taps};
use fctools::vm::api::VmApi;
use fctools::vm::configuration::InitMethod;
use fctools::vm::models::{MmdsConfiguration, MmdsVersion, NetworkInterface};
use serde_json::json;

use crate::workshop::{Workshop, pause_then_kill};

#[tokio::test]
async fn metadata_are_set_and_changed() {
    require_taps!();
    for via_file in [false, true] {
        let tap = HostTap::new();
        let mut workshop = Workshop::new();
        let mut data = workshop.configuration("hello", "finish=hang");
        data.network_interfaces = vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: tap.name.clone(),
            guest_mac: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }];
        data.mmds_configuration = Some(MmdsConfiguration {
            version: MmdsVersion::V2,
            network_interfaces: vec!["eth0".to_owned()],
            ipv4_address: Some("169.254.170.2".parse().unwrap()),
            imds_compat: None,
        });
        let init_method = match via_file {
            true => InitMethod::ViaJsonConfiguration(workshop.path("config.json")),
            false => InitMethod::ViaApiCalls,
        };
        let (mut machine, _folder) = workshop.start(init_method, data).await;
        let data = json!({"latest": {"name": "web", "number": 1}});
        machine.create_mmds_untyped(&data).await.unwrap();
        assert_eq!(machine.get_mmds_untyped().await.unwrap(), data);
        let update = json!({"latest": {"number": 2}});
        machine.update_mmds_untyped(&update).await.unwrap();
        let merged = json!({"latest": {"name": "web", "number": 2}});
        assert_eq!(machine.get_mmds_untyped().await.unwrap(), merged);
        pause_then_kill(&mut machine).await;
    }
}
