//! Receiving a machine from another process or host.

use std::sync::Arc;

use bantam_arch::cpuid::Topology;
use bantam_memory::GuestMemory;
use bantam_migration::{Connection, Incoming};

use super::Controller;
use crate::config::MachineConfig;
use crate::error::Error;
use crate::host;
use crate::kvm::{SavedProcessors, StateSupport};
use crate::memory::{allocate_memory, check_regions};
use crate::snapshot::{Sections, Snapshot};
use crate::vcpu::{Vcpu, VcpuModel};
use crate::vm::Vm;

/// A machine that is offered by whoever has it ([`Controller::migrate`]).
#[derive(Debug)]
pub struct Arrival {
    incoming: Incoming,
    config: MachineConfig,
    sections: Sections,
}

impl Arrival {
    /// Receives the offer of a machine.
    ///
    /// # Errors
    /// If the other end does not offer one, or one that this program does not know.
    pub fn new(connection: Connection) -> Result<Arrival, Error> {
        let incoming = Incoming::new(connection)?;
        let read = || -> Result<_, Error> {
            let sections = Sections::read(incoming.offer().sections())?;
            let config = sections.config()?;
            Ok((sections, config))
        };
        match read() {
            Ok((sections, config)) => Ok(Arrival {
                incoming,
                config,
                sections,
            }),
            Err(error) => {
                incoming.refuse(&error.to_string());
                Err(error)
            }
        }
    }

    /// Returns the configuration of the machine where it is now.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Returns whether the source only asks if the machine could run here ([`Controller::try_migrate`]).
    pub fn is_trial(&self) -> bool {
        self.incoming.is_trial()
    }

    /// Tells a source that only asks whether this host could run the machine in `controller`, which was configured as for
    /// [`Arrival::receive`]. The machine does not come.
    ///
    /// # Errors
    /// If this host could not run it, or the connection fails.
    pub fn answer_trial(self, controller: &Controller) -> Result<(), Error> {
        let check = || {
            let config = controller.configuration()?;
            let memory = Arc::new(allocate_memory(&config)?);
            self.check(controller, &config, &memory)
        };
        check().inspect_err(|error| self.incoming.refuse(&error.to_string()))?;
        Ok(self.incoming.would_accept()?)
    }

    /// Tells the other end that the machine is not taken, for this reason.
    pub fn refuse(self, reason: &str) {
        self.incoming.refuse(reason);
    }

    /// Checks that this host can run the machine, receives its memory and its state, and lets it go on in `controller`,
    /// which was configured as [`Arrival::config`] says, but for what the machine uses of its host.
    ///
    /// # Errors
    /// If this host cannot run it, the other end keeps it, or the connection fails. The machine does not run here then.
    pub fn receive(mut self, controller: &Controller) -> Result<(), Error> {
        let received = self.build(controller);
        if let Err(error) = &received {
            self.incoming.refuse(&error.to_string());
            controller.stop();
        }
        // The source has let go of it.
        if received? {
            controller.resume()?;
        }
        self.incoming.confirm();
        Ok(())
    }

    /// Builds the machine, which is this end's when this returns. Returns whether it is to run.
    fn build(&mut self, controller: &Controller) -> Result<bool, Error> {
        let config = controller.configuration()?;
        let memory = Arc::new(allocate_memory(&config)?);
        self.check(controller, &config, &memory)?;
        let state = self.incoming.receive(&memory)?;
        controller.restore(&Snapshot::received(&state, memory)?)?;
        Ok(self.incoming.take_over()?)
    }

    /// Checks what can be known of the machine before its memory is received.
    fn check(
        &self,
        controller: &Controller,
        config: &MachineConfig,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), Error> {
        check_regions(
            self.incoming.offer().facts().regions.iter().copied(),
            config,
        )?;
        config.cpu.check_host()?;
        for disk in &config.disks {
            let examined = std::fs::metadata(&disk.path);
            examined.map_err(|source| Error::ArrivingDisk {
                path: disk.path.clone(),
                source,
            })?;
        }
        // A machine for trial, of which nothing is left.
        let kvm = host::open_kvm_by(&*controller.0.context.opener)?;
        host::require_capabilities(&kvm, &config.cpu.required_capabilities)?;
        let vm = Vm::new(&kvm, memory.clone(), false)?;
        let topology = Topology {
            vcpu_count: config.cpus.get(),
            smt: config.smt,
        };
        let model = VcpuModel::new(&kvm, topology, &config.cpu)?;
        let vcpus = (0..config.cpus.get()).map(|index| Vcpu::new(&vm, &model, index, None));
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        let state = self.sections.machine_state(None, false);
        let saved = SavedProcessors::decode(state.processors, config.cpus.get())?;
        saved.check_features(&vcpus)?;
        saved.restore(&vm, &vcpus, &StateSupport::new(&kvm)?)
    }
}
