//! The transport, with the simplest device behind it.

use bantam_devices::rate_limiter::Limits;
use bantam_devices::virtio::VirtioDevice;
use bantam_devices::virtio::rng::Rng;

use crate::Target;
use crate::driver::{DATA, Driver, writable};
use crate::machine::Machine;
use crate::operation::Operation;

pub struct RngTarget;

impl Target for RngTarget {
    type Options = ();

    fn device(&mut self, (): &()) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new(&Limits::default()).unwrap())
    }

    fn requests(driver: &mut Driver) -> Vec<Operation> {
        [64, 1, 4096]
            .into_iter()
            .flat_map(|len| driver.request(0, &[writable(DATA, len)]))
            .collect()
    }

    fn check_service(&mut self, (): &(), machine: &mut Machine) {
        let mut driver = Driver::plain(1);
        machine.initialize(&mut driver);
        machine.store(DATA, &[0; 64]);
        for operation in driver.request(0, &[writable(DATA, 64)]) {
            machine.act(&operation);
        }
        machine.await_used(0, 1);
        assert_ne!(machine.bytes(DATA, 64), [0; 64]);
    }
}
