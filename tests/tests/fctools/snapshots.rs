//! Machines that go on from a snapshot.

use bantam_tests::page_server::{Conduct, PageServer};
use bantam_tests::{HostTap, require_taps};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::Vm;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    CreateSnapshot, LoadSnapshot, MemoryBackend, MemoryBackendType, NetworkInterface,
    NetworkOverride, SnapshotType, UpdateNetworkInterface,
};
use fctools::vm::snapshot::{PrepareVmFromSnapshotOptions, VmSnapshot};
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::{MovedResourceType, ResourceType};

use tempfile::TempDir;

use crate::workshop::{Machine, PATIENCE, Workshop, limiter, pause_then_kill, read_until};

/// Starts a machine, pauses it and takes a snapshot of it.
async fn snapshot_of(
    workshop: Workshop,
    data: VmConfigurationData,
) -> (Machine, VmSnapshot, TempDir) {
    let paths = ["state", "memory"].map(|name| workshop.path(name));
    let (mut machine, folder) = workshop.start(InitMethod::ViaApiCalls, data).await;
    let mut output = machine.take_pipes().unwrap();
    read_until(&mut output.stdout, "PASS\n").await;
    let [state, memory] = paths.map(|path| {
        let resources = machine.get_resource_system_mut();
        let resource = resources.create_resource(path, ResourceType::Produced);
        resource.unwrap()
    });
    let create = CreateSnapshot {
        snapshot_type: Some(SnapshotType::Full),
        snapshot: state,
        mem_file: memory,
    };
    machine.pause().await.unwrap();
    let snapshot = machine.create_snapshot(create).await.unwrap();
    (machine, snapshot, folder)
}

#[tokio::test]
async fn a_machine_goes_on_from_a_snapshot() {
    require_taps!();
    let taps = [HostTap::new(), HostTap::new()];
    let mut workshop = Workshop::new();
    let mut data = workshop.configuration("hello", "finish=hang");
    data.machine_configuration.track_dirty_pages = Some(true);
    data.network_interfaces = vec![NetworkInterface {
        iface_id: "eth0".to_owned(),
        host_dev_name: taps[0].name.clone(),
        guest_mac: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    }];
    let executor = workshop.executor("clone.socket");
    let (mut machine, snapshot, _folder) = snapshot_of(workshop, data).await;

    let options = PrepareVmFromSnapshotOptions {
        executor,
        process_spawner: DirectProcessSpawner,
        runtime: TokioRuntime,
        moved_resource_type: MovedResourceType::Copied,
        ownership_model: VmmOwnershipModel::Shared,
        track_dirty_pages: Some(true),
        resume_vm: Some(true),
        network_overrides: vec![NetworkOverride {
            iface_id: "eth0".to_owned(),
            host_dev_name: taps[1].name.clone(),
        }],
    };
    let clone = snapshot.prepare_vm(&mut machine, options).await;
    let mut clone = clone.unwrap();
    clone.start(PATIENCE).await.unwrap();
    assert!(!clone.get_info().await.unwrap().is_paused);
    let configuration = clone.get_machine_configuration().await.unwrap();
    assert_eq!(configuration.mem_size_mib, 64);
    assert_eq!(configuration.track_dirty_pages, Some(true));
    let update = UpdateNetworkInterface {
        iface_id: "eth0".to_owned(),
        rx_rate_limiter: Some(limiter(1 << 20)),
        tx_rate_limiter: None,
    };
    clone.update_network_interface(update).await.unwrap();
    clone.pause().await.unwrap();
    clone.resume().await.unwrap();
    pause_then_kill(&mut clone).await;
    machine.resume().await.unwrap();
    pause_then_kill(&mut machine).await;
}

#[tokio::test]
async fn a_machine_goes_on_with_memory_that_another_program_serves() {
    let mut workshop = Workshop::new();
    let data = workshop.configuration("hello", "finish=hang");
    let executor = workshop.executor("served.socket");
    let installation = workshop.installation();
    let socket = workshop.path("pages.socket");
    let (mut machine, snapshot, _folder) = snapshot_of(workshop, data).await;
    let _server = PageServer::start(&socket, &snapshot.mem_file_path, Conduct::Serves);

    let mut served = Workshop::new();
    let state = served.file(snapshot.snapshot_path);
    let backend = served.present(socket);
    let load_snapshot = LoadSnapshot {
        track_dirty_pages: None,
        mem_backend: MemoryBackend {
            backend_type: MemoryBackendType::Uffd,
            backend,
        },
        snapshot: state,
        resume_vm: Some(true),
        network_overrides: Vec::new(),
    };
    let configuration = VmConfiguration::RestoredFromSnapshot {
        load_snapshot,
        data: snapshot.configuration_data,
    };
    let served = Vm::prepare(
        executor,
        served.into_resources(),
        installation,
        configuration,
    );
    let mut served = served.await.unwrap();
    served.start(PATIENCE).await.unwrap();
    assert!(!served.get_info().await.unwrap().is_paused);
    served.pause().await.unwrap();
    served.resume().await.unwrap();
    pause_then_kill(&mut served).await;
    machine.resume().await.unwrap();
    pause_then_kill(&mut machine).await;
}
