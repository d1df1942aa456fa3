//! Receiving a machine from another process or host.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use bantam_arch::cpuid::Topology;
use bantam_memory::GuestMemory;
use bantam_migration::{Connection, Incoming};
use bantam_snapshot::StateFile;

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
        Arrival::of(Incoming::new(connection)?)
    }

    fn of(incoming: Incoming) -> Result<Arrival, Error> {
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

    /// Returns what the owner of the machine at the other end says of it ([`MigrationOptions::note`](crate::MigrationOptions::note)).
    pub fn note(&self) -> Option<&str> {
        self.sections.note.as_deref()
    }

    /// Returns whether other connections of the source are still to come, for [`Arrival::join`].
    pub fn awaits_connections(&self) -> bool {
        self.incoming.awaits_connections()
    }

    /// Adds another connection of the source.
    ///
    /// # Errors
    /// If it is not one. The source may still have to make it.
    pub fn join(&mut self, connection: Connection) -> Result<(), Error> {
        Ok(self.incoming.join(connection)?)
    }

    /// Writes the offer to a file at `path`, and returns the connections, for another process of this host that receives the
    /// machine ([`Arrival::handed_on`]).
    ///
    /// # Errors
    /// If the host refuses the file, or is out of descriptors.
    pub fn hand_on(self, path: &Path) -> Result<Vec<OwnedFd>, Error> {
        let (descriptors, offer) = self
            .incoming
            .hand_on()
            .map_err(Error::resource("a descriptor of the connection"))?;
        let mut file = File::create(path).map_err(Error::resource("the file of the offer"))?;
        offer.write_to(&mut file)?;
        Ok(descriptors)
    }

    /// Goes on with a machine whose offer another process of this host has written to a file at `path`.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn handed_on(connection: Connection, path: &Path) -> Result<Arrival, Error> {
        let file = File::open(path).map_err(Error::resource("the file of the offer"))?;
        let offer = StateFile::read(&mut BufReader::new(file), path)?;
        Arrival::of(Incoming::handed_on(connection, offer))
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
    pub fn receive(self, controller: &Controller) -> Result<(), Error> {
        self.receive_then(controller, || Ok(()))
    }

    /// Does the same, and calls `settle` at the moment in which the machine is this end's, before it goes on. If that fails,
    /// the machine does not run here, and nobody knows at the source that it could go on there ([`Error::HandOver`]).
    ///
    /// # Errors
    /// Those of [`Arrival::receive`], and that of `settle`.
    pub fn receive_then(
        mut self,
        controller: &Controller,
        settle: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), Error> {
        let received = self.build(controller).and_then(|runs| {
            settle().map_err(Error::resource("a place for the machine"))?;
            Ok(runs)
        });
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
