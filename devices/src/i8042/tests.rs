use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::power::tests::PowerRecorder;
use crate::suspend_test::{SuspendCase, suspend_tests};

/// Counts its edges.
#[derive(Clone, Default)]
struct Line(Arc<AtomicUsize>);

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A controller, and the guest's side of it.
struct Machine {
    i8042: I8042,
    line: Line,
    power: Arc<PowerRecorder>,
}

/// Codes of the keys pressed and released, translated to set 1.
const TRANSLATED: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
/// The same codes in set 2.
const UNTRANSLATED: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

impl Machine {
    fn new() -> Machine {
        let (line, power) = (Line::default(), Arc::new(PowerRecorder::default()));
        Machine {
            i8042: I8042::new(power.clone(), Box::new(line.clone())),
            line,
            power,
        }
    }

    /// Makes a machine whose guest has enabled its keyboard with a command byte.
    fn with_command_byte(command_byte: u8) -> Machine {
        let mut machine = Machine::new();
        machine.command(0x60);
        machine.data(command_byte);
        machine
    }

    fn command(&mut self, value: u8) {
        self.i8042.write(COMMAND_PORT, &[value]);
    }

    fn data(&mut self, value: u8) {
        self.i8042.write(DATA_PORT, &[value]);
    }

    fn register(&mut self, offset: u64) -> u8 {
        let mut value = [0];
        self.i8042.read(offset, &mut value);
        value[0]
    }

    fn status(&mut self) -> u8 {
        self.register(COMMAND_PORT)
    }

    /// Reads until nothing is left.
    fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.status() & 1 != 0 {
            bytes.push(self.register(DATA_PORT));
            assert!(bytes.len() < 100, "{bytes:x?}");
        }
        bytes
    }

    fn answer_to_command(&mut self, value: u8) -> Vec<u8> {
        self.command(value);
        self.drain()
    }

    fn answer_to_data(&mut self, value: u8) -> Vec<u8> {
        self.data(value);
        self.drain()
    }

    fn interrupts(&self) -> usize {
        self.line.0.load(Ordering::SeqCst)
    }
}

#[test]
fn ctrl_alt_del_comes_translated_and_with_an_interrupt_for_each_byte() {
    let mut machine = Machine::with_command_byte(0x45);
    machine.i8042.press_ctrl_alt_del().unwrap();
    for (count, code) in (1..).zip(TRANSLATED) {
        assert_eq!(machine.interrupts(), count);
        assert_eq!(machine.status() & 1, 1);
        assert_eq!(machine.register(DATA_PORT), code);
    }
    assert_eq!(machine.interrupts(), TRANSLATED.len());
    assert_eq!(machine.status() & 1, 0);
    assert_eq!(machine.register(DATA_PORT), TRANSLATED[7], "the last byte");
}

#[test]
fn ctrl_alt_del_comes_as_it_is_where_translation_is_off() {
    let mut machine = Machine::with_command_byte(0x04);
    machine.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(machine.drain(), UNTRANSLATED);
    assert_eq!(machine.interrupts(), 0, "they are off");
}

#[test]
fn a_byte_that_waits_raises_the_interrupt_when_that_is_enabled() {
    let mut machine = Machine::with_command_byte(0x44);
    machine.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(machine.interrupts(), 0);
    machine.command(0x60);
    machine.data(0x45);
    assert_eq!(machine.interrupts(), 1);
    assert_eq!(machine.drain(), TRANSLATED);
}

#[test]
fn keys_are_refused_where_nobody_listens() {
    let mut machine = Machine::new();
    assert_eq!(
        machine.i8042.press_ctrl_alt_del(),
        Err(KeyboardError::Disabled)
    );
    machine.command(0xae);
    machine.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(machine.drain(), TRANSLATED);

    assert_eq!(machine.answer_to_data(0xf5), [0xfa]);
    assert_eq!(
        machine.i8042.press_ctrl_alt_del(),
        Err(KeyboardError::Disabled)
    );
    assert_eq!(machine.answer_to_data(0xf4), [0xfa]);
    machine.i8042.press_ctrl_alt_del().unwrap();

    machine.command(0xad);
    assert_eq!(
        machine.i8042.press_ctrl_alt_del(),
        Err(KeyboardError::Disabled)
    );
}

#[test]
fn keys_that_nobody_takes_fill_the_keyboard() {
    let mut machine = Machine::with_command_byte(0x44);
    machine.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(machine.i8042.press_ctrl_alt_del(), Err(KeyboardError::Full));
    assert_eq!(machine.drain(), TRANSLATED);
    machine.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(machine.drain(), TRANSLATED);
}

#[test]
fn a_disabled_keyboard_sends_what_it_has_when_it_is_enabled() {
    let mut machine = Machine::with_command_byte(0x44);
    machine.i8042.press_ctrl_alt_del().unwrap();
    machine.command(0xad);
    assert_eq!(machine.drain(), TRANSLATED[..1], "it was sent already");
    machine.command(0xae);
    assert_eq!(machine.drain(), TRANSLATED[1..]);
}

#[test]
fn controller_commands_are_answered() {
    let mut machine = Machine::new();
    assert_eq!(machine.answer_to_command(0xaa), [0x55]);
    assert_eq!(machine.answer_to_command(0xab), [0x00]);
    assert_eq!(machine.answer_to_command(0x20), [0x74]);
    machine.command(0xae);
    assert_eq!(machine.answer_to_command(0x20), [0x64]);
    machine.command(0xad);
    assert_eq!(machine.answer_to_command(0x20), [0x74]);
    machine.command(0x60);
    machine.data(0x31);
    assert_eq!(machine.answer_to_command(0x20), [0x31]);

    assert_eq!(machine.answer_to_command(0xd0), [0x03]);
    machine.command(0xd1);
    machine.data(0xdd);
    assert_eq!(machine.answer_to_command(0xd0), [0xcd]);
    // Commands for auxiliary devices, and ones without a meaning.
    for command in [0x00, 0xa8, 0xa9, 0xd4, 0xef] {
        assert!(machine.answer_to_command(command).is_empty());
    }
    assert_eq!(machine.power.requests(), (0, 0));
}

#[test]
fn status_says_what_is_to_be_read_and_what_was_written() {
    let mut machine = Machine::with_command_byte(0x41);
    assert_eq!(machine.status(), 0x10);
    machine.command(0xaa);
    assert_eq!(machine.status(), 0x1d);
    assert_eq!(machine.register(DATA_PORT), 0x55);
    assert_eq!(machine.status(), 0x1c);
    machine.data(0xee);
    assert_eq!(machine.status(), 0x15);
}

#[test]
fn keyboard_commands_are_acknowledged() {
    // Without translation, as the keyboard sends them.
    let mut machine = Machine::with_command_byte(0x04);
    for (command, answer) in [
        (0xff, &[0xfa, 0xaa][..]),
        (0xf2, &[0xfa, 0xab, 0x83]),
        (0xed, &[0xfa]),
        (0x02, &[0xfa]),
        (0xf3, &[0xfa]),
        (0xff, &[0xfa]),
        (0xf0, &[0xfa]),
        (0x00, &[0xfa, 0x02]),
        (0xf0, &[0xfa]),
        (0x02, &[0xfa]),
        (0xf0, &[0xfa]),
        (0x03, &[0xfe]),
        (0xf6, &[0xfa]),
        (0xf5, &[0xfa]),
        (0xf4, &[0xfa]),
        (0xee, &[0xee]),
        (0x00, &[0xfe]),
        (0xfe, &[0xfe]),
    ] {
        assert_eq!(machine.answer_to_data(command), answer, "{command:#x}");
    }
    let mut machine = Machine::with_command_byte(0x44);
    assert_eq!(machine.answer_to_data(0xf2), [0xfa, 0xab, 0x41]);
}

#[test]
fn a_command_to_the_keyboard_enables_it() {
    let mut machine = Machine::new();
    assert_eq!(machine.answer_to_data(0xf4), [0xfa]);
    assert_eq!(machine.answer_to_command(0x20), [0x64]);
}

#[test]
fn an_answer_comes_before_keys_and_the_controllers_before_the_keyboards() {
    let mut machine = Machine::with_command_byte(0x44);
    machine.i8042.press_ctrl_alt_del().unwrap();
    machine.data(0xee);
    machine.command(0xaa);
    let mut expected = vec![TRANSLATED[0], 0x55, 0xee];
    expected.extend(&TRANSLATED[1..]);
    assert_eq!(machine.drain(), expected);
}

#[test]
fn the_reset_line_resets_and_nothing_else_does() {
    let mut machine = Machine::new();
    machine.data(0xfe);
    for command in [0xd1, 0xff, 0xf1] {
        machine.command(command);
    }
    machine.i8042.write(COMMAND_PORT, &[0xfe, 0]);
    assert_eq!(machine.power.requests(), (0, 0));
    machine.command(0xfe);
    assert_eq!(machine.power.requests(), (0, 1));
    machine.command(0xd1);
    machine.data(0xfe);
    assert_eq!(machine.power.requests(), (0, 2));
}

proptest! {
    /// Whatever a guest has done, only a bounded number of bytes can be read, and a driver that sets the
    /// controller up has a keyboard.
    #[test]
    fn nothing_keeps_a_driver_from_the_keyboard(
        accesses in prop::collection::vec(
            (0..6_u8, any::<u8>(), 0..=COMMAND_PORT), 0..200,
        ),
    ) {
        let mut machine = Machine::new();
        for (access, value, offset) in accesses {
            match access {
                0 => drop(machine.register(offset)),
                1 => machine.i8042.write(offset, &[value, value]),
                2 => drop(machine.i8042.press_ctrl_alt_del()),
                3 => machine.command(value),
                _ => machine.data(value),
            }
            prop_assert_eq!(machine.status() & 0b1110_0010, 0);
        }
        machine.command(0x60);
        machine.data(0x45);
        prop_assert!(machine.drain().len() <= 1 + 1 + 3 + 16);
        // The first byte may be the argument of an earlier command.
        machine.answer_to_data(0xff);
        prop_assert_eq!(machine.answer_to_data(0xff), [0xfa, 0xaa]);
        let interrupts = machine.interrupts();
        machine.i8042.press_ctrl_alt_del().unwrap();
        prop_assert_eq!(machine.drain(), TRANSLATED);
        prop_assert_eq!(machine.interrupts() - interrupts, TRANSLATED.len());
    }
}

impl SuspendCase for Machine {
    fn new() -> Machine {
        Machine::new()
    }

    fn set_up(&mut self) {
        self.drain();
        self.command(0x60);
        self.data(0x45);
    }

    fn work(&mut self) {
        let before = self.interrupts();
        self.i8042.press_ctrl_alt_del().unwrap();
        assert_eq!(self.drain(), TRANSLATED);
        assert_eq!(self.interrupts(), before + TRANSLATED.len());
    }

    /// Keys of which the first is in the output buffer, and a command whose argument has yet to come.
    fn begin(&mut self) {
        self.i8042.press_ctrl_alt_del().unwrap();
        self.command(0xd1);
    }

    fn end(&mut self) {
        self.data(0b11);
        assert_eq!(self.drain(), TRANSLATED);
        assert_eq!(self.answer_to_command(0xd0), [0b11]);
        assert_eq!(self.power.requests(), (0, 0));
    }

    fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
        act(&mut self.i8042)
    }

    fn replace(&mut self) {
        *self = Machine::new();
    }

    fn visible_state(&mut self) -> Vec<u8> {
        vec![self.status()]
    }
}

suspend_tests!(Machine);

#[test]
fn keys_that_are_pressed_in_a_pause_come_after_it() {
    let mut machine = Machine::with_command_byte(0x45);
    machine.i8042.pause().unwrap();
    machine.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(machine.interrupts(), 0);
    machine.i8042.resume().unwrap();
    assert_eq!(machine.interrupts(), 1);
    assert_eq!(machine.drain(), TRANSLATED);
}

#[test]
fn an_interrupt_that_the_driver_may_have_missed_is_raised_elsewhere() {
    let mut machine = Machine::with_command_byte(0x45);
    machine.i8042.press_ctrl_alt_del().unwrap();
    machine.i8042.pause().unwrap();
    let section = machine.i8042.save().unwrap();
    let mut other = Machine::new();
    other.i8042.restore(&section).unwrap();
    assert_eq!(other.interrupts(), 0);
    other.i8042.resume().unwrap();
    assert_eq!(other.interrupts(), 1);
    assert_eq!(other.drain(), TRANSLATED);
}

#[test]
fn state_that_no_controller_can_have_is_refused() {
    let contradictions: [fn(&mut Registers); 5] = [
        |registers| registers.answer = Some(0),
        |registers| registers.keyboard.press_ctrl_alt_del().unwrap(),
        |registers| {
            registers.output_full = true;
            registers.keyboard.press_ctrl_alt_del().unwrap();
            for _ in 0..6 {
                registers.keyboard.push_key(0);
            }
        },
        |registers| {
            registers.output_full = true;
            registers.keyboard.push_answer(4);
        },
        |registers| registers.keyboard.await_argument(0xee),
    ];
    for contradiction in contradictions {
        let mut registers = Registers {
            command_byte: command_byte::INTERRUPT,
            ..Registers::default()
        };
        contradiction(&mut registers);
        let section = Section::of(&registers).unwrap();
        let mut machine = Machine::new();
        machine.i8042.restore(&section).unwrap_err();
        machine.i8042.resume().unwrap();
        machine.set_up();
        machine.work();
    }
}
