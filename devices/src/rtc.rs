//! The real-time clock of a PC: an MC146818A behind an index port and a data port.
//!
//! It shows the host's time in UTC, so guests without a paravirtual clock start with today's date. A guest
//! cannot set it: writes to the time registers are ignored. There are no interrupts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::PassiveDevice;

/// Offset of the port that selects a register.
const INDEX: u64 = 0;
/// Offset of the port that reads or writes the selected register.
const DATA: u64 = 1;
/// Bits of the index port that select a register. The top bit masks the NMI of a PC.
const REGISTER_MASK: u8 = 0x7f;
const REGISTER_COUNT: usize = 1 << 7;

/// Time registers (MC146818A data sheet, "Address map").
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
/// Register that holds the century, by the convention of PCs.
const CENTURY: u8 = 0x32;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// Register A: the time registers are about to change.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register A as a PC's firmware leaves it: a 32,768 Hz crystal and a periodic rate of 1,024 Hz.
const REGISTER_A_AT_START: u8 = 0x26;
/// Register B: updates are inhibited.
const SET: u8 = 1 << 7;
/// Register B: the time registers are binary rather than BCD.
const BINARY: u8 = 1 << 2;
/// Register B: hours count from 0 to 23.
const HOURS_24: u8 = 1 << 1;
/// Bit of the hours register for the afternoon, if hours count from 1 to 12.
const AFTERNOON: u8 = 1 << 7;
/// Register D: the clock has not lost its power.
const VALID: u8 = 1 << 7;

/// How long before it changes the time the chip announces the change (MC146818A data sheet, "Update cycle").
/// A driver that sees no announcement has at least that long to read the whole time.
const UPDATE_NOTICE: Duration = Duration::from_micros(244);

/// Two I/O ports: index and data.
pub struct Rtc {
    now: fn() -> Duration,
    index: u8,
    /// All that the guest can write: control registers, alarm, and memory for the firmware.
    registers: [u8; REGISTER_COUNT],
}

impl Rtc {
    /// Makes a clock that shows the host's time.
    #[must_use]
    pub fn new() -> Rtc {
        Rtc::with_clock(|| {
            // The clock starts at 1970 if the host's clock is set to an earlier date.
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        })
    }

    /// Makes a clock that shows the time since 1970 that `now` returns.
    fn with_clock(now: fn() -> Duration) -> Rtc {
        Rtc {
            now,
            index: 0,
            registers: registers_at_start(),
        }
    }

    fn read_register(&self) -> u8 {
        let now = (self.now)();
        let date = Date::from_unix(now.as_secs());
        match self.index {
            SECONDS => self.number(date.second),
            MINUTES => self.number(date.minute),
            HOURS => self.hours(date.hour),
            DAY_OF_WEEK => self.number(date.day_of_week),
            DAY_OF_MONTH => self.number(date.day),
            MONTH => self.number(date.month),
            YEAR => self.number((date.year % 100) as u8),
            CENTURY => self.number((date.year / 100 % 100) as u8),
            REGISTER_A => {
                let rest = Duration::from_secs(1) - Duration::from_nanos(now.subsec_nanos().into());
                let updates = rest <= UPDATE_NOTICE && self.control() & SET == 0;
                let status = self.registers[usize::from(REGISTER_A)];
                status | if updates { UPDATE_IN_PROGRESS } else { 0 }
            }
            REGISTER_C => 0,
            REGISTER_D => VALID,
            index => self.registers[usize::from(index)],
        }
    }

    fn write_register(&mut self, value: u8) {
        match self.index {
            REGISTER_A => self.registers[usize::from(REGISTER_A)] = value & !UPDATE_IN_PROGRESS,
            index if is_kept(index) => self.registers[usize::from(index)] = value,
            _ => {}
        }
    }

    fn control(&self) -> u8 {
        self.registers[usize::from(REGISTER_B)]
    }

    /// Encodes a number below 100 in the format that the guest has chosen.
    fn number(&self, number: u8) -> u8 {
        if self.control() & BINARY != 0 {
            number
        } else {
            ((number / 10) << 4) | (number % 10)
        }
    }

    fn hours(&self, hour: u8) -> u8 {
        if self.control() & HOURS_24 != 0 {
            return self.number(hour);
        }
        let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
        let hour = match hour % 12 {
            0 => 12,
            hour => hour,
        };
        self.number(hour) | afternoon
    }
}

/// The registers as a PC's firmware leaves them.
fn registers_at_start() -> [u8; REGISTER_COUNT] {
    let mut registers = [0; REGISTER_COUNT];
    registers[usize::from(REGISTER_A)] = REGISTER_A_AT_START;
    registers[usize::from(REGISTER_B)] = HOURS_24;
    registers
}

/// Whether a register keeps what the guest writes to it.
fn is_kept(register: u8) -> bool {
    !matches!(
        register,
        SECONDS
            | MINUTES
            | HOURS
            | DAY_OF_WEEK
            | DAY_OF_MONTH
            | MONTH
            | YEAR
            | CENTURY
            | REGISTER_C
            | REGISTER_D
    )
}

/// The registers that the guest has written. The time is not saved: it is always that of the present host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RtcState {
    index: u8,
    registers: Vec<u8>,
}

impl SavedState for RtcState {
    const KIND: &'static str = "rtc";
    const VERSION: u16 = 1;
}

impl PassiveDevice for Rtc {
    type State = RtcState;

    fn reset(&mut self) {
        *self = Rtc::with_clock(self.now);
    }

    fn state(&self) -> RtcState {
        RtcState {
            index: self.index,
            registers: self.registers.to_vec(),
        }
    }

    fn set_state(&mut self, state: RtcState) -> Result<(), String> {
        if state.index & !REGISTER_MASK != 0 {
            return Err(format!("there is no register {:#x}", state.index));
        }
        let registers = state.registers.try_into();
        self.registers = registers
            .map_err(|registers: Vec<u8>| format!("it has {} registers", registers.len()))?;
        self.index = state.index;
        for (register, &value) in (0_u8..).zip(&self.registers) {
            let is_possible = match register {
                REGISTER_A => value & UPDATE_IN_PROGRESS == 0,
                register => is_kept(register) || value == 0,
            };
            if !is_possible {
                return Err(format!("register {register:#x} cannot hold {value:#x}"));
            }
        }
        Ok(())
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Rtc::new()
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index port cannot be read on a PC.
        data.fill(u8::MAX);
        if let (DATA, [value]) = (offset, data) {
            *value = self.read_register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (INDEX, &[index]) => self.index = index & REGISTER_MASK,
            (DATA, &[value]) => self.write_register(value),
            _ => {}
        }
    }
}

/// A moment of the Gregorian calendar, in UTC.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    /// From 1.
    month: u8,
    /// From 1.
    day: u8,
    /// From 1, which is Sunday.
    day_of_week: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    /// Returns the moment `seconds` after the start of 1970.
    fn from_unix(seconds: u64) -> Date {
        /// 1970 began on a Thursday.
        const FIRST_DAY_OF_WEEK: u64 = 4;
        /// Days from the first of March of year 0 to the start of 1970. A year that begins in March
        /// has its leap day at its end.
        const DAYS_BEFORE_1970: u64 = 719_468;
        const DAYS_IN_4_YEARS: u64 = 4 * 365 + 1;
        const DAYS_IN_CENTURY: u64 = 25 * DAYS_IN_4_YEARS - 1;
        const DAYS_IN_4_CENTURIES: u64 = 4 * DAYS_IN_CENTURY + 1;

        let (days, time) = (seconds / 86_400, seconds % 86_400);
        let day = days + DAYS_BEFORE_1970;
        let (era, day) = (day / DAYS_IN_4_CENTURIES, day % DAYS_IN_4_CENTURIES);
        // The last day of four centuries, and of four years, is a leap day: the years and centuries
        // before it are not 4 but 3.
        let century = (day / DAYS_IN_CENTURY).min(3);
        let day = day - century * DAYS_IN_CENTURY;
        let (cycle, day) = (day / DAYS_IN_4_YEARS, day % DAYS_IN_4_YEARS);
        let year = (day / 365).min(3);
        let day = day - year * 365;
        // From March on, the months repeat a pattern of 31, 30, 31, 30 and 31 days: 153 in five months.
        let month = (5 * day + 2) / 153;
        let day_of_month = day - (153 * month + 2) / 5 + 1;
        let year = 400 * era + 100 * century + 4 * cycle + year;
        let (year, month) = match month {
            0..10 => (year, month + 3),
            _ => (year + 1, month - 9),
        };
        Date {
            year,
            month: month as u8,
            day: day_of_month as u8,
            day_of_week: ((days + FIRST_DAY_OF_WEEK) % 7 + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bantam_state::Section;

    use crate::lifecycle::Device;
    use crate::suspend_test::{SuspendCase, suspend_tests};
    use nix::libc;
    use proptest::prelude::*;

    /// 2026-11-29 17:08:09.25, a Sunday.
    fn an_afternoon() -> Duration {
        Duration::from_millis(1_795_972_089_250)
    }

    fn read(rtc: &mut Rtc, register: u8) -> u8 {
        rtc.write(INDEX, &[register]);
        let mut data = [0];
        rtc.read(DATA, &mut data);
        data[0]
    }

    fn write(rtc: &mut Rtc, register: u8, value: u8) {
        rtc.write(INDEX, &[register]);
        rtc.write(DATA, &[value]);
    }

    fn time(rtc: &mut Rtc) -> [u8; 8] {
        [
            CENTURY,
            YEAR,
            MONTH,
            DAY_OF_MONTH,
            DAY_OF_WEEK,
            HOURS,
            MINUTES,
            SECONDS,
        ]
        .map(|register| read(rtc, register))
    }

    #[test]
    fn the_time_is_told_in_the_format_that_the_guest_chooses() {
        let mut rtc = Rtc::with_clock(an_afternoon);
        let bcd = [0x20, 0x26, 0x11, 0x29, 0x01, 0x17, 0x08, 0x09];
        assert_eq!(time(&mut rtc), bcd);
        write(&mut rtc, REGISTER_B, BINARY | HOURS_24);
        assert_eq!(time(&mut rtc), [20, 26, 11, 29, 1, 17, 8, 9]);
        write(&mut rtc, REGISTER_B, 0);
        assert_eq!(read(&mut rtc, HOURS), AFTERNOON | 0x05);
        assert_eq!(read(&mut rtc, REGISTER_D), VALID);

        let mut midnight = Rtc::with_clock(|| Duration::ZERO);
        write(&mut midnight, REGISTER_B, BINARY);
        assert_eq!(read(&mut midnight, HOURS), 12);
    }

    #[test]
    fn a_change_of_the_time_is_announced() {
        let is_announced = |rtc: &mut Rtc| read(rtc, REGISTER_A) & UPDATE_IN_PROGRESS != 0;
        assert!(!is_announced(&mut Rtc::with_clock(an_afternoon)));
        let mut late = Rtc::with_clock(|| Duration::from_nanos(7_999_756_000));
        assert!(is_announced(&mut late));
        write(&mut late, REGISTER_B, SET | HOURS_24);
        assert!(!is_announced(&mut late));
        assert!(!is_announced(&mut Rtc::with_clock(|| {
            Duration::from_nanos(7_999_755_999)
        })));
    }

    #[test]
    fn a_guest_cannot_set_the_time_but_keeps_what_else_it_writes() {
        let mut rtc = Rtc::with_clock(an_afternoon);
        let before = time(&mut rtc);
        for register in 0..=u8::MAX {
            // Not register B, which sets the format of the time.
            if register & REGISTER_MASK != REGISTER_B {
                write(&mut rtc, register, 0x5a);
            }
        }
        assert_eq!(time(&mut rtc), before);
        assert_eq!(read(&mut rtc, REGISTER_C), 0);
        // Here the kernel of a PC stores how a processor is to start after a reset.
        assert_eq!(read(&mut rtc, 0x0f), 0x5a);
        // The top bit is not part of the index.
        assert_eq!(read(&mut rtc, 0x8f), 0x5a);
    }

    #[test]
    fn an_access_of_another_width_does_nothing() {
        let mut rtc = Rtc::with_clock(an_afternoon);
        rtc.write(INDEX, &[YEAR, 0]);
        rtc.write(7, &[1]);
        let mut data = [0; 4];
        rtc.read(DATA, &mut data);
        rtc.read(7, &mut data[..1]);
        assert_eq!(data, [u8::MAX; 4]);
        let mut data = [0];
        rtc.read(DATA, &mut data);
        assert_eq!(data, [0x09]);
    }

    /// Converts the same moment with the C library.
    fn by_the_c_library(seconds: u64) -> Date {
        // SAFETY: a `tm` is integers and a pointer, for which zero is a value.
        let mut tm: libc::tm = unsafe { std::mem::zeroed() };
        let time = seconds as libc::time_t;
        // SAFETY: both point to values that live through the call.
        let converted = unsafe { libc::gmtime_r(&time, &mut tm) };
        assert!(!converted.is_null());
        Date {
            year: (tm.tm_year + 1900) as u64,
            month: tm.tm_mon as u8 + 1,
            day: tm.tm_mday as u8,
            day_of_week: tm.tm_wday as u8 + 1,
            hour: tm.tm_hour as u8,
            minute: tm.tm_min as u8,
            second: tm.tm_sec as u8,
        }
    }

    #[test]
    fn every_day_of_a_thousand_years_has_its_date() {
        for day in 0..366 * 1000 {
            let seconds = day * 86_400 + day % 86_400;
            assert_eq!(Date::from_unix(seconds), by_the_c_library(seconds));
        }
    }

    proptest! {
        #[test]
        fn any_moment_has_its_date(seconds in 0..1_u64 << 40) {
            prop_assert_eq!(Date::from_unix(seconds), by_the_c_library(seconds));
        }
    }

    impl SuspendCase for Rtc {
        const WORKS_BY_ITSELF: bool = false;

        fn new() -> Rtc {
            Rtc::with_clock(an_afternoon)
        }

        fn set_up(&mut self) {
            write(self, REGISTER_B, BINARY | HOURS_24);
        }

        fn work(&mut self) {
            assert_eq!(read(self, HOURS), 17);
            write(self, 0x0f, 0x5a);
        }

        /// Selects a register.
        fn begin(&mut self) {
            BusDevice::write(self, INDEX, &[0x0f]);
        }

        fn end(&mut self) {
            let mut value = [0];
            BusDevice::read(self, DATA, &mut value);
            assert_eq!(value, [0x5a]);
        }

        fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
            act(self)
        }

        fn replace(&mut self) {
            *self = Rtc::with_clock(an_afternoon);
        }

        fn visible_state(&mut self) -> Vec<u8> {
            let mut value = [0];
            BusDevice::read(self, DATA, &mut value);
            value.to_vec()
        }
    }

    suspend_tests!(Rtc);

    #[test]
    fn what_a_guest_cannot_write_is_refused() {
        let saved = Rtc::with_clock(an_afternoon).save().unwrap();
        let contradictions: [fn(&mut RtcState); 5] = [
            |state| state.index = 0x80,
            |state| state.registers.truncate(1),
            |state| state.registers[usize::from(SECONDS)] = 1,
            |state| state.registers[usize::from(REGISTER_D)] = 1,
            |state| state.registers[usize::from(REGISTER_A)] |= UPDATE_IN_PROGRESS,
        ];
        for contradiction in contradictions {
            let mut state: RtcState = saved.decode().unwrap();
            contradiction(&mut state);
            let section = Section::of(&state).unwrap();
            let mut rtc = Rtc::with_clock(an_afternoon);
            rtc.restore(&section).unwrap_err();
            assert_eq!(rtc.save().unwrap(), saved);
        }
    }
}
