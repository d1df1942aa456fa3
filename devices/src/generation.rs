//! Tells a guest that its machine has been restored from saved state, in two ways that guests know: by a new
//! generation id ("Virtual Machine Generation ID", Microsoft) and by the VMClock page (Linux,
//! `include/uapi/linux/vmclock-abi.h`).
//!
//! Both are in guest memory, at places that the ACPI tables give, and are saved with it. An interrupt says that
//! they have changed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use bantam_memory::GuestMemory;
use bantam_state::SavedState;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::InterruptLine;
use crate::lifecycle::PassiveDevice;

/// Size of the generation id in bytes.
pub const ID_SIZE: usize = 16;
/// Alignment of the generation id, which the specification requires.
const ID_ALIGNMENT: u64 = 8;
/// Size of the VMClock page, which a guest may map into its programs: a page that has nothing else.
pub const CLOCK_SIZE: usize = 0x1000;

/// Offsets of the fields of the VMClock page that are not zero. The lowest bit of the sequence number says that
/// the fields after it are being changed.
mod field {
    pub(super) const MAGIC: u64 = 0;
    pub(super) const SIZE: u64 = 4;
    pub(super) const VERSION: u64 = 8;
    pub(super) const COUNTER: u64 = 10;
    pub(super) const SEQUENCE: u64 = 12;
    pub(super) const DISRUPTION_MARKER: u64 = 16;
    pub(super) const FLAGS: u64 = 24;
    pub(super) const GENERATION_MARKER: u64 = 104;
}

/// "VCLK", little-endian.
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
/// No counter of the processor is given a relation to the time of day. The status of the clock, zero, is unknown.
const NO_COUNTER: u8 = 0xff;
/// The page has a marker of the generation.
const FLAG_GENERATION: u64 = 1 << 8;
/// Each change of the page is notified.
const FLAG_NOTIFICATION: u64 = 1 << 9;

/// Guest-physical addresses at which the guest looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationPlaces {
    /// The generation id, of [`ID_SIZE`] bytes.
    pub id: u64,
    /// The VMClock page, of [`CLOCK_SIZE`] bytes.
    pub clock: u64,
}

/// The generation id and the VMClock page of a machine. A guest that writes to them misleads only itself.
pub struct Generation {
    memory: Arc<GuestMemory>,
    /// Where they are in a machine that boots.
    usual_places: GenerationPlaces,
    /// Where they are in this machine.
    places: GenerationPlaces,
    line: Box<dyn InterruptLine>,
}

impl Generation {
    /// Makes the device, which writes to `places` of `memory` and notifies the guest through `line`.
    pub fn new(
        memory: Arc<GuestMemory>,
        places: GenerationPlaces,
        line: Box<dyn InterruptLine>,
    ) -> Generation {
        Generation {
            memory,
            usual_places: places,
            places,
            line,
        }
    }

    /// Writes what a guest finds when it boots: the random `id`, and a page whose markers are zero.
    ///
    /// # Errors
    /// If the guest has no memory at the places.
    pub fn begin(&self, id: [u8; ID_SIZE]) -> io::Result<()> {
        let mut page = [0; CLOCK_SIZE];
        let mut put = |offset: u64, bytes: &[u8]| {
            page[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(field::MAGIC, &MAGIC.to_le_bytes());
        put(field::SIZE, &(CLOCK_SIZE as u32).to_le_bytes());
        put(field::VERSION, &VERSION.to_le_bytes());
        put(field::COUNTER, &[NO_COUNTER]);
        let flags = FLAG_GENERATION | FLAG_NOTIFICATION;
        put(field::FLAGS, &flags.to_le_bytes());
        self.write_id(id)
            .and_then(|()| {
                let address = GuestAddress(self.places.clock);
                self.memory.write_slice(&page, address)
            })
            .map_err(io::Error::other)
    }

    /// Tells the guest that its machine goes on from saved state. `id` and `marker` are random, so that all
    /// machines that go on from one state differ. Programs of the guest may see `marker`, and do not see `id`,
    /// from which Linux makes random numbers.
    ///
    /// # Errors
    /// If the guest has no memory at the places, or the host refuses to deliver the interrupt.
    pub fn change(&self, id: [u8; ID_SIZE], marker: u64) -> io::Result<()> {
        self.write_id(id)
            .and_then(|()| self.mark(marker))
            .map_err(io::Error::other)?;
        self.line.trigger()
    }

    fn write_id(&self, id: [u8; ID_SIZE]) -> Result<(), GuestMemoryError> {
        self.memory.write_slice(&id, GuestAddress(self.places.id))
    }

    /// Marks a disruption of the processor's counters, and a generation. A guest that was saved while it read
    /// the page finds another sequence number, and reads it again.
    fn mark(&self, marker: u64) -> Result<(), GuestMemoryError> {
        let address = GuestAddress(self.places.clock + field::SEQUENCE);
        let sequence: u32 = self.memory.load(address, Ordering::Acquire)?;
        let sequence = sequence | 1;
        self.store(field::SEQUENCE, sequence, Ordering::Relaxed)?;
        fence(Ordering::Release);
        for field in [field::DISRUPTION_MARKER, field::GENERATION_MARKER] {
            self.store(field, marker, Ordering::Relaxed)?;
        }
        let sequence = sequence.wrapping_add(1);
        self.store(field::SEQUENCE, sequence, Ordering::Release)
    }

    fn store<T: vm_memory::AtomicAccess>(
        &self,
        field: u64,
        value: T,
        order: Ordering,
    ) -> Result<(), GuestMemoryError> {
        let address = GuestAddress(self.places.clock + field);
        self.memory.store(value, address, order)
    }
}

/// Where the guest looks, which it read in its tables when it booted.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct GenerationState {
    places: GenerationPlaces,
}

impl SavedState for GenerationState {
    const KIND: &'static str = "generation";
    const VERSION: u16 = 1;
}

impl PassiveDevice for Generation {
    type State = GenerationState;

    fn reset(&mut self) {
        self.places = self.usual_places;
    }

    fn state(&self) -> GenerationState {
        GenerationState {
            places: self.places,
        }
    }

    fn set_state(&mut self, state: GenerationState) -> Result<(), String> {
        let GenerationPlaces { id, clock } = state.places;
        for (what, address, size, alignment) in [
            ("generation id", id, ID_SIZE, ID_ALIGNMENT),
            ("VMClock page", clock, CLOCK_SIZE, CLOCK_SIZE as u64),
        ] {
            let fits = address.is_multiple_of(alignment)
                && self.memory.contains(GuestAddress(address), size);
            if !fits {
                return Err(format!("the {what} cannot be at {address:#x}"));
            }
        }
        self.places = state.places;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::lifecycle::Device;
    use crate::suspend_test::{SuspendCase, suspend_tests};

    const PLACES: GenerationPlaces = GenerationPlaces {
        id: 0x1040,
        clock: 0x2000,
    };
    const MEMORY_SIZE: usize = 0x4000;

    /// A guest with the device.
    struct Guest {
        memory: Arc<GuestMemory>,
        line: EventFd,
        device: Generation,
    }

    impl Guest {
        fn with(memory: Arc<GuestMemory>, places: GenerationPlaces) -> Guest {
            let line = EventFd::new(EFD_NONBLOCK).unwrap();
            let interrupt = Box::new(line.try_clone().unwrap());
            let device = Generation::new(memory.clone(), places, interrupt);
            Guest {
                memory,
                line,
                device,
            }
        }

        /// Returns the number of interrupts since the last call.
        fn take_interrupts(&self) -> u64 {
            self.line.read().unwrap_or(0)
        }

        fn id(&self) -> [u8; ID_SIZE] {
            let address = GuestAddress(self.device.places.id);
            self.memory.read_obj(address).unwrap()
        }

        fn page(&self) -> Vec<u8> {
            let mut page = vec![0; CLOCK_SIZE];
            let address = GuestAddress(self.device.places.clock);
            self.memory.read_slice(&mut page, address).unwrap();
            page
        }

        /// Returns the sequence number, and the markers of disruption and generation.
        fn marks(&self) -> (u32, u64, u64) {
            let page = self.page();
            let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
            let sequence = u32::from_le_bytes(page[12..16].try_into().unwrap());
            (sequence, word(16), word(104))
        }
    }

    #[test]
    fn the_page_is_as_linux_declares_it() {
        let guest = Guest::with(memory(), PLACES);
        guest.device.begin([7; ID_SIZE]).unwrap();
        assert_eq!(guest.id(), [7; ID_SIZE]);
        let page = guest.page();
        assert_eq!(page[..8], *b"VCLK\0\x10\0\0");
        // Version 1, no counter, UTC; no update in progress and no disruption.
        assert_eq!(
            page[8..24],
            [1, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        // Generations are marked and notified.
        assert_eq!(page[24..32], [0, 3, 0, 0, 0, 0, 0, 0]);
        assert!(page[32..].iter().all(|&byte| byte == 0));
        assert_eq!(guest.take_interrupts(), 0);
    }

    #[test]
    fn each_change_is_marked_and_notified() {
        let guest = Guest::with(memory(), PLACES);
        guest.device.begin([1; ID_SIZE]).unwrap();
        let before = guest.page();
        for number in 1..=3_u8 {
            let marker = u64::from(number) << 40;
            guest.device.change([number; ID_SIZE], marker).unwrap();
            assert_eq!(guest.id(), [number; ID_SIZE]);
            assert_eq!(guest.marks(), (2 * u32::from(number), marker, marker));
            assert_eq!(guest.take_interrupts(), 1);
        }
        let mut page = guest.page();
        for changed in [12..16, 16..24, 104..112] {
            page[changed].fill(0);
        }
        assert_eq!(page, before, "nothing else has changed");
    }

    #[test]
    fn a_guest_may_write_to_the_page() {
        let guest = Guest::with(memory(), PLACES);
        let page = [0xff; CLOCK_SIZE];
        let address = GuestAddress(PLACES.clock);
        guest.memory.write_slice(&page, address).unwrap();
        guest.device.change([1; ID_SIZE], 5).unwrap();
        assert_eq!(guest.marks(), (0, 5, 5));
    }

    #[test]
    fn the_places_of_the_saved_machine_are_kept() {
        let elsewhere = GenerationPlaces {
            id: 0x3008,
            clock: 0x1000,
        };
        let saved = Guest::with(memory(), elsewhere).device.save().unwrap();
        let mut guest = Guest::with(memory(), PLACES);
        guest.device.restore(&saved).unwrap();
        guest.device.change([9; ID_SIZE], 5).unwrap();
        let id: [u8; ID_SIZE] = guest.memory.read_obj(GuestAddress(0x3008)).unwrap();
        assert_eq!(id, [9; ID_SIZE]);
        assert_eq!(guest.marks(), (2, 5, 5));
        assert!(guest.device.save().unwrap() == saved);

        Device::reset(&mut guest.device);
        assert_eq!(guest.device.places, PLACES);
    }

    #[test]
    fn impossible_places_are_refused() {
        let end = MEMORY_SIZE as u64;
        for (id, clock) in [
            (PLACES.id + 4, PLACES.clock),
            (end - 8, PLACES.clock),
            (end, PLACES.clock),
            (u64::MAX - 7, PLACES.clock),
            (PLACES.id, PLACES.clock + 8),
            (PLACES.id, end),
            (PLACES.id, u64::MAX - 0xfff),
        ] {
            let places = GenerationPlaces { id, clock };
            let saved = Guest::with(memory(), places).device.save().unwrap();
            let mut guest = Guest::with(memory(), PLACES);
            guest.device.restore(&saved).unwrap_err();
            assert_eq!(guest.device.places, PLACES, "{places:x?}");
        }
    }

    fn memory() -> Arc<GuestMemory> {
        let regions = [(GuestAddress(0), MEMORY_SIZE)];
        Arc::new(GuestMemory::from_ranges(&regions).unwrap())
    }

    impl SuspendCase for Guest {
        const WORKS_BY_ITSELF: bool = false;

        fn new() -> Guest {
            Guest::with(memory(), PLACES)
        }

        fn set_up(&mut self) {
            self.device.begin([0; ID_SIZE]).unwrap();
        }

        fn work(&mut self) {
            let id = self.id().map(|byte| byte.wrapping_add(1));
            let (sequence, marker, _) = self.marks();
            self.device.change(id, marker + 1).unwrap();
            assert_eq!(self.id(), id);
            assert_eq!(self.marks(), (sequence + 2, marker + 1, marker + 1));
            assert_eq!(self.take_interrupts(), 1);
        }

        fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
            act(&mut self.device)
        }

        fn replace(&mut self) {
            *self = Guest::with(self.memory.clone(), PLACES);
        }

        fn visible_state(&mut self) -> Vec<u8> {
            let GenerationPlaces { id, clock } = self.device.places;
            [id.to_le_bytes(), clock.to_le_bytes()].concat()
        }
    }

    suspend_tests!(Guest);
}
