//! The state of a device that all transports have in common: its status, features and queues (section 2), and
//! the device's worker.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, SaveError, SavedState, Section};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::EventLoop;
use crate::activity::Watched;
use crate::event_loop::WorkerId;
use crate::lifecycle::{Device, PAUSE_TIME};
use crate::virtio::{
    Activation, DriverLink, F_EVENT_IDX, F_VERSION_1, MAX_QUEUES, QueueSet, VirtQueue, VirtioDevice,
};
use crate::worker::{QueueProgress, VirtioWorker};

/// The registers of one queue as the driver wrote them; checked when it sets `DRIVER_OK`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) size: u32,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl QueueRegisters {
    /// Returns the queue as set up, if a device can serve it.
    fn to_queue(
        self,
        max_size: u16,
        event_index: bool,
        progress: QueueProgress,
        memory: &GuestMemory,
    ) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(max_size)?;
        if self.ready {
            let size = self.size.try_into();
            queue.try_set_size(size.map_err(|_| virtio_queue::Error::InvalidSize)?)?;
            queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(self.driver))?;
            queue.try_set_used_ring_address(GuestAddress(self.device))?;
            queue.set_event_idx(event_index);
            queue.set_next_avail(progress.next_available);
            queue.set_next_used(progress.next_used);
            queue.set_ready(true);
            if !queue.is_valid(memory) {
                return Err(virtio_queue::Error::FindMemoryRegion);
            }
        }
        Ok(queue)
    }
}

/// Where the device's worker is.
enum WorkerPlace {
    /// There is no worker: the driver is not ready, or the device could not be activated.
    None,
    /// On the event loop.
    AtWork(WorkerId),
    /// Taken off the event loop by a pause.
    Paused(Box<dyn VirtioWorker>),
    /// Not made yet: the device was restored, and has not been resumed.
    Saved(SavedWorker),
}

/// The state from which a worker is made again.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SavedWorker {
    /// One for each queue.
    progress: Vec<QueueProgress>,
    state: Option<Section>,
}

/// The state of a device and its transport.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct TransportState {
    device_id: u32,
    status: u32,
    needs_reset: bool,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    config: Vec<u8>,
    config_generation: u32,
    device: Option<Section>,
    worker: Option<SavedWorker>,
}

impl SavedState for TransportState {
    const KIND: &'static str = "virtio";
    const VERSION: u16 = 1;
}

/// A device with its status machine and its queues. A transport provides the driver with registers for them.
pub(super) struct TransportCore {
    pub(super) device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    event_loop: EventLoop,
    pub(super) link: Arc<DriverLink>,
    pub(super) doorbells: Vec<EventFd>,
    worker: WorkerPlace,
    is_paused: bool,
    status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    driver_features: u64,
    pub(super) queue_select: u32,
    queues: Vec<QueueRegisters>,
}

/// Why a device cannot be activated.
enum ActivateError {
    /// Its driver has set it up incorrectly.
    Driver(String),
    /// The host lacks a resource that it needs.
    Host(String),
}

impl TransportCore {
    /// Makes the state of `device` after power-on. Its worker will run on `event_loop`.
    ///
    /// # Errors
    /// If the host is out of file descriptors for the doorbells, or the device has more queues than
    /// [`MAX_QUEUES`].
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        event_loop: EventLoop,
        link: Arc<DriverLink>,
    ) -> io::Result<TransportCore> {
        let queue_count = device.queue_max_sizes().len();
        if queue_count > MAX_QUEUES {
            return Err(io::Error::other("the device has too many queues"));
        }
        let doorbells = (0..queue_count)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(TransportCore {
            device,
            memory,
            event_loop,
            link,
            doorbells,
            worker: WorkerPlace::None,
            is_paused: false,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![QueueRegisters::default(); queue_count],
        })
    }

    /// Returns the half of the offered features that the driver has selected.
    pub(super) fn selected_device_features(&self) -> u32 {
        half(self.device.features(), self.device_features_select)
    }

    /// Returns the registers of the queue that the driver has selected, if there is one.
    pub(super) fn selected_queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }

    /// Returns the largest size of the queue that the driver has selected; 0 if there is none.
    pub(super) fn selected_queue_max_size(&self) -> u16 {
        let sizes = self.device.queue_max_sizes();
        sizes
            .get(self.queue_select as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Returns the device status field (section 2.1).
    pub(super) fn status(&self) -> u32 {
        if self.link.needs_reset() {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    /// Handles a write to the status (section 3.1.1): the driver only ever adds bits, or resets the device.
    pub(super) fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset_by_driver();
            return;
        }
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let added = value & !self.status;
        if value & self.status != self.status {
            let status = self.status;
            self.link.warn(format_args!(
                "write of {value:#x} to the status register, which was {status:#x}: bits are only \
                 cleared by a reset"
            ));
            return;
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.link.warn(format_args!("the driver has given up"));
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.accepts_features() {
            // The driver learns of the refusal when it reads the bit back as zero.
            self.status = value & !VIRTIO_CONFIG_S_FEATURES_OK & !VIRTIO_CONFIG_S_DRIVER_OK;
            return;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            if value & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                self.link
                    .warn(format_args!("DRIVER_OK without FEATURES_OK is ignored"));
                self.status = value & !VIRTIO_CONFIG_S_DRIVER_OK;
                return;
            }
            self.status = value;
            if let Err(error) = self.activate(None) {
                self.ask_for_reset(&error);
            }
            return;
        }
        self.status = value;
    }

    fn ask_for_reset(&self, error: &ActivateError) {
        match error {
            ActivateError::Driver(reason) => self.link.need_reset(reason),
            ActivateError::Host(reason) => self.link.need_reset_by_host(reason),
        }
    }

    fn accepts_features(&self) -> bool {
        let valid = self.features_are_valid();
        if !valid {
            let (accepted, offered) = (self.driver_features, self.device.features());
            self.link.warn(format_args!(
                "the driver accepts features {accepted:#x} of {offered:#x} offered: it must accept \
                 VERSION_1 and none that are not offered"
            ));
        }
        valid
    }

    fn features_are_valid(&self) -> bool {
        let accepted = self.driver_features;
        accepted & !self.device.features() == 0 && accepted & F_VERSION_1 != 0
    }

    /// Sets the selected half of the features that the driver accepts.
    pub(super) fn set_driver_features(&mut self, value: u32) {
        let phase = VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
        if self.status & phase != VIRTIO_CONFIG_S_DRIVER {
            self.link.warn(format_args!(
                "driver features written out of turn are ignored"
            ));
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ if value == 0 => {}
            select => self
                .link
                .warn(format_args!("driver features {select} do not exist")),
        }
    }

    /// Changes the registers of the queue that the driver has selected.
    pub(super) fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        let phase = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if self.status & phase != VIRTIO_CONFIG_S_FEATURES_OK {
            self.link.warn(format_args!(
                "queue registers written out of turn are ignored"
            ));
            return;
        }
        match self.queues.get_mut(self.queue_select as usize) {
            Some(queue) => change(queue),
            None => {
                let index = self.queue_select;
                self.link.warn(format_args!("there is no queue {index}"));
            }
        }
    }

    /// Rings a doorbell that did not arrive through its event, because the driver wrote it in a way that it
    /// should not, or because the hypervisor was not told of the events.
    pub(super) fn ring_doorbell(&mut self, queue: u32) {
        match self.doorbells.get(queue as usize) {
            Some(doorbell) => signal(doorbell),
            None => self
                .link
                .warn(format_args!("the doorbell of queue {queue} does not exist")),
        }
    }

    fn activate(&mut self, saved: Option<SavedWorker>) -> Result<(), ActivateError> {
        let (progress, state) = match saved {
            Some(saved) => (saved.progress, saved.state),
            None => (Vec::new(), None),
        };
        let queues = self.build_queues(&progress)?;
        // Buffers that the driver made available before are served without a doorbell.
        for queue in &queues {
            queue.ring_doorbell();
        }
        let worker = self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            link: self.link.clone(),
            state,
        });
        let worker = worker.map_err(ActivateError::Host)?;
        let activity = self.link.activity().clone();
        self.put_to_work(Box::new(Watched::new(worker, activity)))
    }

    /// Builds the queues as the driver has set them up. Each goes on at its position in `progress`, or
    /// begins.
    fn build_queues(&self, progress: &[QueueProgress]) -> Result<Vec<VirtQueue>, ActivateError> {
        let event_index = self.driver_features & F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        let max_sizes = self.device.queue_max_sizes();
        for (index, registers) in self.queues.iter().enumerate() {
            let max_size = max_sizes.get(index).copied().unwrap_or_default();
            let progress = progress.get(index).copied().unwrap_or_default();
            let queue = registers
                .to_queue(max_size, event_index, progress, &self.memory)
                .map_err(|error| {
                    let reason = format!("queue {index} was set up as {registers:x?}: {error}");
                    ActivateError::Driver(reason)
                })?;
            let doorbell = self.doorbells.get(index).map(EventFd::try_clone);
            let Some(Ok(doorbell)) = doorbell else {
                return Err(ActivateError::Host(format!(
                    "the doorbell of queue {index} cannot be duplicated"
                )));
            };
            let queue = VirtQueue::new(index as u16, &queue, doorbell, self.memory.clone());
            queues.push(queue.map_err(|error| ActivateError::Driver(error.to_string()))?);
        }
        Ok(queues)
    }

    fn put_to_work(&mut self, worker: Box<dyn VirtioWorker>) -> Result<(), ActivateError> {
        match self.event_loop.add_worker(worker) {
            Ok(id) => {
                self.worker = WorkerPlace::AtWork(id);
                Ok(())
            }
            Err(error) => Err(ActivateError::Host(error.to_string())),
        }
    }

    /// Resets the device on the driver's request (section 2.4). On return its worker has ended and touches no
    /// guest memory any more.
    fn reset_by_driver(&mut self) {
        // However long it takes: until then the worker may use the guest's memory.
        if let WorkerPlace::AtWork(id) = std::mem::replace(&mut self.worker, WorkerPlace::None)
            && let Err(error) = self.event_loop.take_worker(&id, None)
        {
            self.link
                .warn_of_host(format_args!("cannot stop its worker: {error}"));
        }
        for doorbell in &self.doorbells {
            // It fails only if the doorbell was not rung.
            let _ = doorbell.read();
        }
        self.link.set_needs_reset(false);
        self.device.config().reset_driver_field();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.fill(QueueRegisters::default());
    }

    fn name(&self) -> String {
        self.link.name().to_owned()
    }

    /// Takes over the state, if it is that of such a device.
    fn adopt(&mut self, state: TransportState) -> Result<(), String> {
        if state.device_id != self.device.device_id() {
            return Err(format!("it is of a device of type {}", state.device_id));
        }
        if state.queues.len() != self.queues.len() {
            return Err(format!(
                "it has {} queues, and the device {}",
                state.queues.len(),
                self.queues.len()
            ));
        }
        let is_active = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if is_active && state.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return Err("its driver is ready without having negotiated features".to_owned());
        }
        // A device that could not be activated has asked for a reset.
        if state.worker.is_some() != is_active && !(is_active && state.needs_reset) {
            return Err("it is not at work if and only if its driver is ready".to_owned());
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.queues = state.queues;
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_valid() {
            return Err(format!(
                "its driver uses features {:#x}, and the device has {:#x}",
                self.driver_features,
                self.device.features()
            ));
        }
        if let Some(worker) = &state.worker {
            if worker.progress.len() != self.queues.len() {
                return Err("it does not say how far each queue has come".to_owned());
            }
            self.build_queues(&worker.progress)
                .map_err(|error| match error {
                    ActivateError::Driver(reason) | ActivateError::Host(reason) => reason,
                })?;
        }
        self.device
            .config()
            .restore(&state.config, state.config_generation)?;
        self.device.config_restored();
        self.link.set_needs_reset(state.needs_reset);
        if let Some(worker) = state.worker {
            self.worker = WorkerPlace::Saved(worker);
        }
        Ok(())
    }
}

impl Device for TransportCore {
    fn pause(&mut self) -> io::Result<()> {
        if self.is_paused {
            return Ok(());
        }
        if let WorkerPlace::AtWork(id) = &self.worker {
            let deadline = Instant::now() + PAUSE_TIME;
            match self.event_loop.take_worker(id, Some(deadline)) {
                Ok(worker) => self.worker = WorkerPlace::Paused(worker),
                // It is still on the loop, and goes on when the loop does.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(self.link.with_name(&error));
                }
                Err(error) => {
                    self.worker = WorkerPlace::None;
                    self.link.need_reset_by_host(&error);
                    return Err(self.link.with_name(&error));
                }
            }
        }
        if let WorkerPlace::Paused(worker) = &mut self.worker {
            worker
                .pause()
                .map_err(|error| self.link.with_name(&error))?;
        }
        self.is_paused = true;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        // The worker may be off the loop even after a pause that failed.
        self.is_paused = false;
        let resumed = match std::mem::replace(&mut self.worker, WorkerPlace::None) {
            WorkerPlace::Paused(worker) => {
                // Chains that were put back in the queues are taken again.
                for doorbell in &self.doorbells {
                    signal(doorbell);
                }
                self.put_to_work(worker)
            }
            WorkerPlace::Saved(saved) => {
                let resumed = self.activate(Some(saved));
                // The interrupt for earlier work may not have reached the driver.
                self.link
                    .notify_used_buffers(QueueSet::first(self.queues.len()));
                resumed
            }
            other => {
                self.worker = other;
                Ok(())
            }
        };
        resumed.map_err(|error| {
            self.ask_for_reset(&error);
            match error {
                ActivateError::Driver(reason) | ActivateError::Host(reason) => {
                    self.link.with_name(&io::Error::other(reason))
                }
            }
        })
    }

    fn reset(&mut self) {
        self.reset_by_driver();
        self.device.reset();
    }

    fn save(&self) -> Result<Section, SaveError> {
        let not_supported = |reason: &str| SaveError::NotSupported {
            part: self.name(),
            reason: reason.to_owned(),
        };
        if !self.is_paused {
            return Err(not_supported("it is at work"));
        }
        let worker = match &self.worker {
            WorkerPlace::None => None,
            WorkerPlace::AtWork(_) => return Err(not_supported("it is at work")),
            WorkerPlace::Paused(worker) => Some(SavedWorker {
                progress: worker.progress(),
                state: worker.save()?,
            }),
            WorkerPlace::Saved(saved) => Some(saved.clone()),
        };
        let (config, config_generation) = self.device.config().save();
        Section::of(&TransportState {
            device_id: self.device.device_id(),
            status: self.status,
            needs_reset: self.link.needs_reset(),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            config,
            config_generation,
            device: self.device.save()?,
            worker,
        })
    }

    fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        let state: TransportState = section.decode()?;
        self.is_paused = true;
        self.reset();
        let restored = self
            .device
            .restore(&state.config, state.device.as_ref())
            .and_then(|()| {
                self.adopt(state).map_err(|reason| RestoreError::Invalid {
                    kind: self.name(),
                    reason,
                })
            });
        if restored.is_err() {
            self.reset();
        }
        restored
    }
}

/// Makes `event` readable. It fails only if the counter is full, and then it is readable already.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

/// Returns the lower (0) or upper (1) half of `bits`; zero for any other `select`.
pub(super) fn half(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

pub(super) fn set_low(register: &mut u64, value: u32) {
    *register = *register & !u64::from(u32::MAX) | u64::from(value);
}

pub(super) fn set_high(register: &mut u64, value: u32) {
    *register = *register & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use event_manager::EventManager;

    use super::*;
    use crate::event_loop::Subscriber;
    use crate::rate_limiter::Limits;
    use crate::virtio::rng::Rng;
    use crate::virtio::test_driver::InterruptCounter;

    /// Makes an entropy device whose event loop is not run.
    fn core() -> TransportCore {
        let manager: EventManager<Subscriber> = EventManager::new().unwrap();
        TransportCore::new(
            Box::new(Rng::new(&Limits::default()).unwrap()),
            Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()),
            EventLoop::of(&manager),
            InterruptCounter::default().link(),
        )
        .unwrap()
    }

    /// Makes the state of a device after power-on, with one change.
    fn changed(change: impl FnOnce(&mut TransportState)) -> Section {
        let mut core = core();
        core.pause().unwrap();
        let mut state = core.save().unwrap().decode().unwrap();
        change(&mut state);
        Section::of(&state).unwrap()
    }

    #[test]
    fn state_that_contradicts_itself_is_refused() {
        let worker = |queues| SavedWorker {
            progress: vec![QueueProgress::default(); queues],
            state: None,
        };
        let ready = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        core().restore(&changed(|_| {})).unwrap();
        core()
            .restore(&changed(|state| {
                state.status = ready;
                state.driver_features = F_VERSION_1;
                state.worker = Some(worker(1));
            }))
            .unwrap();

        let contradictions: [fn(&mut TransportState); 6] = [
            |state| state.device_id += 1,
            |state| state.queues.clear(),
            |state| state.config.push(0),
            |state| state.status = VIRTIO_CONFIG_S_FEATURES_OK,
            |state| {
                state.status = VIRTIO_CONFIG_S_FEATURES_OK;
                state.driver_features = u64::MAX;
            },
            |state| {
                state.status = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
                state.driver_features = F_VERSION_1;
            },
        ];
        for contradiction in contradictions {
            core().restore(&changed(contradiction)).unwrap_err();
        }
        for (status, worker) in [
            (0, worker(1)),
            (VIRTIO_CONFIG_S_DRIVER_OK, worker(1)),
            (ready, worker(0)),
            (ready, worker(2)),
        ] {
            let section = changed(|state| {
                state.status = status;
                state.driver_features = F_VERSION_1;
                state.worker = Some(worker);
            });
            core().restore(&section).unwrap_err();
        }
    }
}
