//! The registers of a vCPU, in the order and form in which gdb has them (`target.xml`).

use std::num::NonZeroUsize;

use gdbstub::arch::{Arch, RegId, Registers};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_xsave};
use kvm_ioctls::VcpuFd;

/// Bit of CR0 that enables protected mode (PE).
const CR0_PROTECTED: u64 = 1;
/// Bit of RFLAGS that is set in virtual-8086 mode (VM).
const RFLAGS_VIRTUAL_8086: u64 = 1 << 17;

/// Places in the XSAVE area, whose start is that of FXSAVE (Intel SDM, volume 1, "XSAVE Area").
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
/// Place of XSTATE_BV in words, and its bits of x87 and SSE state.
const XSTATE_BV_WORD: usize = 128;
const XSTATE_LEGACY: u32 = 0b11;

/// x86-64 as gdb is told of it.
pub(super) enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = RegisterFile;
    type RegId = Register;
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        Some(include_str!("target.xml"))
    }
}

/// A register, by its number in the target description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Register(usize);

/// Numbers of registers, or of the first of a kind.
mod number {
    pub(super) const GENERAL: usize = 0;
    pub(super) const RIP: usize = 16;
    pub(super) const EFLAGS: usize = 17;
    pub(super) const SEGMENTS: usize = 18;
    pub(super) const ST: usize = 24;
    pub(super) const FPU: usize = 32;
    pub(super) const XMM: usize = 40;
    pub(super) const MXCSR: usize = 56;
    pub(super) const FS_BASE: usize = 57;
    pub(super) const GS_BASE: usize = 58;
    pub(super) const SYSTEM: usize = 59;
    pub(super) const COUNT: usize = 65;
}

impl Register {
    /// Returns all registers in their order.
    fn all() -> impl Iterator<Item = Register> {
        (0..number::COUNT).map(Register)
    }

    /// Returns its size in bytes.
    fn size(self) -> usize {
        match self.0 {
            number::EFLAGS..number::ST | number::FPU..number::XMM | number::MXCSR => 4,
            number::ST..number::FPU => 10,
            number::XMM..number::MXCSR => 16,
            _ => 8,
        }
    }
}

impl RegId for Register {
    fn from_raw_id(id: usize) -> Option<(Register, Option<NonZeroUsize>)> {
        let register = (id < number::COUNT).then_some(Register(id))?;
        Some((register, NonZeroUsize::new(register.size())))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}

/// All registers one after the other, as gdb reads and writes them at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RegisterFile(Vec<u8>);

impl RegisterFile {
    /// Returns each register with its bytes.
    pub(super) fn registers(&self) -> impl Iterator<Item = (Register, &[u8])> {
        let mut offset = 0;
        Register::all().filter_map(move |register| {
            let bytes = self.0.get(offset..offset + register.size())?;
            offset += register.size();
            Some((register, bytes))
        })
    }
}

impl Registers for RegisterFile {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let mut registers = self.registers();
        let rip = registers.find(|(register, _)| register.0 == number::RIP);
        rip.map_or(0, |(_, bytes)| word(bytes))
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for byte in &self.0 {
            write_byte(Some(*byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let size: usize = Register::all().map(Register::size).sum();
        if bytes.len() < size {
            return Err(());
        }
        self.0 = bytes[..size].to_vec();
        Ok(())
    }
}

/// Why a register cannot be set.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegisterError {
    #[error("KVM refuses it: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    #[error("it has another size")]
    Size,
    #[error("no segment has this selector")]
    Selector,
}

/// The registers of a vCPU as KVM has them.
pub(super) struct CpuRegisters {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    changed: Changed,
}

/// What has to be given to KVM.
#[derive(Default)]
struct Changed {
    regs: bool,
    sregs: bool,
    xsave: bool,
}

impl CpuRegisters {
    /// Reads the registers of a vCPU.
    pub(super) fn read(fd: &VcpuFd) -> Result<CpuRegisters, kvm_ioctls::Error> {
        Ok(CpuRegisters {
            regs: fd.get_regs()?,
            sregs: fd.get_sregs()?,
            xsave: fd.get_xsave()?,
            changed: Changed::default(),
        })
    }

    /// Gives the vCPU what has changed. An exception that was about to be delivered is dropped with a change of
    /// general registers; its instruction is executed again, and raises it again.
    pub(super) fn write(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        if self.changed.sregs {
            fd.set_sregs(&self.sregs)?;
        }
        if self.changed.regs {
            fd.set_regs(&self.regs)?;
        }
        if self.changed.xsave {
            // SAFETY: a vCPU whose extended state is larger than this structure would need permission from
            // the kernel that this program never asks for, and the structure was read from the same vCPU.
            unsafe { fd.set_xsave(&self.xsave) }?;
        }
        Ok(())
    }

    /// Returns the bytes of all registers.
    pub(super) fn file(&mut self) -> RegisterFile {
        let mut bytes = Vec::new();
        for register in Register::all() {
            bytes.extend(self.get(register));
        }
        RegisterFile(bytes)
    }

    /// Returns the bytes of a register, as many as its size.
    pub(super) fn get(&mut self, register: Register) -> Vec<u8> {
        let value = match register.0 {
            n @ number::ST..number::FPU => {
                return self.fx(ST + 16 * (n - number::ST), register.size());
            }
            n @ number::XMM..number::MXCSR => {
                return self.fx(XMM + 16 * (n - number::XMM), register.size());
            }
            n @ number::FPU..number::XMM => self.fpu_control(n - number::FPU),
            number::EFLAGS => self.regs.rflags,
            n @ number::SEGMENTS..number::ST => self.segment(n - number::SEGMENTS).selector.into(),
            number::MXCSR => word(&self.fx(MXCSR, 4)),
            n => *self.wide(n),
        };
        value.to_le_bytes()[..register.size()].to_vec()
    }

    /// Changes a register; [`CpuRegisters::write`] then gives it to KVM. `descriptor` reads the eight bytes at a
    /// linear address, for a segment.
    pub(super) fn set(
        &mut self,
        register: Register,
        bytes: &[u8],
        descriptor: impl Fn(u64) -> Option<[u8; 8]>,
    ) -> Result<(), RegisterError> {
        if bytes.len() != register.size() {
            return Err(RegisterError::Size);
        }
        let value = word(bytes);
        match register.0 {
            n @ number::ST..number::FPU => self.set_fx(ST + 16 * (n - number::ST), bytes),
            n @ number::XMM..number::MXCSR => self.set_fx(XMM + 16 * (n - number::XMM), bytes),
            n @ number::FPU..number::XMM => self.set_fpu_control(n - number::FPU, value),
            number::MXCSR => self.set_fx(MXCSR, bytes),
            number::EFLAGS => {
                self.regs.rflags = value;
                self.changed.regs = true;
            }
            n @ number::SEGMENTS..number::ST => {
                let selector = u16::try_from(value).map_err(|_| RegisterError::Selector)?;
                let segment = self.load_segment(n - number::SEGMENTS, selector, descriptor)?;
                *self.segment(n - number::SEGMENTS) = segment;
                self.changed.sregs = true;
            }
            n => {
                *self.wide(n) = value;
                match n {
                    ..=number::RIP => self.changed.regs = true,
                    _ => self.changed.sregs = true,
                }
            }
        }
        Ok(())
    }

    /// Returns a register of 64 bits that KVM has as such.
    fn wide(&mut self, number: usize) -> &mut u64 {
        const SYSTEM: usize = number::SYSTEM;
        let (regs, sregs) = (&mut self.regs, &mut self.sregs);
        match number {
            number::GENERAL => &mut regs.rax,
            1 => &mut regs.rbx,
            2 => &mut regs.rcx,
            3 => &mut regs.rdx,
            4 => &mut regs.rsi,
            5 => &mut regs.rdi,
            6 => &mut regs.rbp,
            7 => &mut regs.rsp,
            8 => &mut regs.r8,
            9 => &mut regs.r9,
            10 => &mut regs.r10,
            11 => &mut regs.r11,
            12 => &mut regs.r12,
            13 => &mut regs.r13,
            14 => &mut regs.r14,
            15 => &mut regs.r15,
            number::FS_BASE => &mut sregs.fs.base,
            number::GS_BASE => &mut sregs.gs.base,
            SYSTEM => &mut sregs.cr0,
            n if n == SYSTEM + 1 => &mut sregs.cr2,
            n if n == SYSTEM + 2 => &mut sregs.cr3,
            n if n == SYSTEM + 3 => &mut sregs.cr4,
            n if n == SYSTEM + 4 => &mut sregs.cr8,
            n if n == SYSTEM + 5 => &mut sregs.efer,
            _ => &mut regs.rip,
        }
    }

    fn segment(&mut self, place: usize) -> &mut kvm_segment {
        let sregs = &mut self.sregs;
        match place {
            0 => &mut sregs.cs,
            1 => &mut sregs.ss,
            2 => &mut sregs.ds,
            3 => &mut sregs.es,
            4 => &mut sregs.fs,
            _ => &mut sregs.gs,
        }
    }

    /// Returns the segment that the processor would load for `selector` (Intel SDM, volume 3A, "Segment
    /// Descriptors").
    fn load_segment(
        &mut self,
        place: usize,
        selector: u16,
        descriptor: impl Fn(u64) -> Option<[u8; 8]>,
    ) -> Result<kvm_segment, RegisterError> {
        let mut segment = *self.segment(place);
        segment.selector = selector;
        if self.sregs.cr0 & CR0_PROTECTED == 0 || self.regs.rflags & RFLAGS_VIRTUAL_8086 != 0 {
            segment.base = u64::from(selector) << 4;
            return Ok(segment);
        }
        let index = u64::from(selector & !0b111);
        let (base, limit) = match selector & 0b100 {
            0 => (self.sregs.gdt.base, self.sregs.gdt.limit.into()),
            _ => (self.sregs.ldt.base, self.sregs.ldt.limit),
        };
        if selector & !0b11 == 0 {
            segment.unusable = 1;
            segment.present = 0;
            return Ok(segment);
        }
        if index + 7 > u64::from(limit) {
            return Err(RegisterError::Selector);
        }
        let bytes = descriptor(base.wrapping_add(index)).ok_or(RegisterError::Selector)?;
        let bits = u64::from_le_bytes(bytes);
        let flag = |bit: u32| (bits >> bit & 1) as u8;
        // A system descriptor (S), or one that is not present (P).
        if flag(44) == 0 || flag(47) == 0 {
            return Err(RegisterError::Selector);
        }
        let limit = (bits & 0xffff | bits >> 32 & 0xf_0000) as u32;
        Ok(kvm_segment {
            base: bits >> 16 & 0xff_ffff | bits >> 32 & 0xff00_0000,
            limit: match flag(55) {
                0 => limit,
                _ => limit << 12 | 0xfff,
            },
            selector,
            type_: (bits >> 40 & 0xf) as u8,
            present: 1,
            dpl: (bits >> 45 & 0b11) as u8,
            db: flag(54),
            s: 1,
            l: flag(53),
            g: flag(55),
            avl: flag(52),
            unusable: 0,
            padding: 0,
        })
    }

    /// Does what `iretq` does with CS and SS in `selectors`, and with RIP, RSP and RFLAGS in `values`.
    pub(super) fn return_to(
        &mut self,
        selectors: [u16; 2],
        values: [u64; 3],
        descriptor: impl Fn(u64) -> Option<[u8; 8]>,
    ) -> Result<(), RegisterError> {
        let [cs, ss] = selectors;
        self.sregs.cs = self.load_segment(0, cs, &descriptor)?;
        self.sregs.ss = self.load_segment(1, ss, &descriptor)?;
        [self.regs.rip, self.regs.rsp, self.regs.rflags] = values;
        (self.changed.sregs, self.changed.regs) = (true, true);
        Ok(())
    }

    /// Returns `fctrl`, `fstat`, `ftag`, `fiseg`, `fioff`, `foseg`, `fooff` or `fop`.
    fn fpu_control(&self, place: usize) -> u64 {
        match place {
            0 => word(&self.fx(FCW, 2)),
            1 => word(&self.fx(FSW, 2)),
            2 => self.tags().into(),
            3 => word(&self.fx(FIP + 4, 4)),
            4 => word(&self.fx(FIP, 4)),
            5 => word(&self.fx(FDP + 4, 4)),
            6 => word(&self.fx(FDP, 4)),
            _ => word(&self.fx(FOP, 2)),
        }
    }

    fn set_fpu_control(&mut self, place: usize, value: u64) {
        let bytes = value.to_le_bytes();
        match place {
            0 => self.set_fx(FCW, &bytes[..2]),
            1 => self.set_fx(FSW, &bytes[..2]),
            2 => {
                let used = (0..8).filter(|register| value >> (2 * register) & 0b11 != 0b11);
                let used = used.fold(0_u8, |used, register| used | 1 << register);
                self.set_fx(FTW, &[used]);
            }
            3 => self.set_fx(FIP + 4, &bytes[..4]),
            4 => self.set_fx(FIP, &bytes[..4]),
            5 => self.set_fx(FDP + 4, &bytes[..4]),
            6 => self.set_fx(FDP, &bytes[..4]),
            _ => self.set_fx(FOP, &bytes[..2]),
        }
    }

    /// Returns the x87 tag word, of which XSAVE keeps only which registers are empty (Intel SDM, volume 1, "x87
    /// FPU Tag Word").
    fn tags(&self) -> u16 {
        let used = self.fx(FTW, 1)[0];
        let top = word(&self.fx(FSW, 2)) >> 11 & 0b111;
        let mut tags = 0;
        for register in 0..8_u64 {
            // The area has the registers in the order of the stack.
            let place = (register + 8 - top) % 8;
            let bytes = self.fx(ST + 16 * place as usize, 10);
            let (fraction, exponent) = (word(&bytes[..8]), word(&bytes[8..]) & 0x7fff);
            let tag = if used >> register & 1 == 0 {
                0b11
            } else if exponent == 0 && fraction == 0 {
                0b01
            } else if exponent == 0 || exponent == 0x7fff || fraction >> 63 == 0 {
                0b10
            } else {
                0b00
            };
            tags |= tag << (2 * register);
        }
        tags
    }

    /// Returns `len` bytes at `offset` of the XSAVE area.
    fn fx(&self, offset: usize, len: usize) -> Vec<u8> {
        let byte = |place: usize| self.xsave.region[place / 4].to_le_bytes()[place % 4];
        (offset..offset + len).map(byte).collect()
    }

    fn set_fx(&mut self, offset: usize, bytes: &[u8]) {
        for (place, byte) in (offset..).zip(bytes) {
            let word = &mut self.xsave.region[place / 4];
            let mut changed = word.to_le_bytes();
            changed[place % 4] = *byte;
            *word = u32::from_le_bytes(changed);
        }
        // Otherwise the processor takes these registers for those after a reset.
        self.xsave.region[XSTATE_BV_WORD] |= XSTATE_LEGACY;
        self.changed.xsave = true;
    }
}

/// Reads a number of up to eight bytes; of more, the first eight.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> CpuRegisters {
        CpuRegisters {
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: kvm_xsave::default(),
            changed: Changed::default(),
        }
    }

    fn no_descriptor(_: u64) -> Option<[u8; 8]> {
        None
    }

    fn named(name: &str) -> Register {
        let xml = X86_64::target_description_xml().unwrap();
        let mut names = xml.split("<reg name=\"").skip(1);
        let place = names.position(|it| it.starts_with(&format!("{name}\"")));
        Register(place.expect("the description has the register"))
    }

    #[test]
    fn the_description_has_these_registers_in_this_size() {
        let xml = X86_64::target_description_xml().unwrap();
        let sizes = xml.split("<reg name=\"").skip(1).map(|text| {
            let size = text.split("bitsize=\"").nth(1).unwrap();
            size.split('"').next().unwrap().parse::<usize>().unwrap() / 8
        });
        assert!(sizes.eq(Register::all().map(Register::size)));
        assert_eq!(Register::from_raw_id(number::COUNT), None);
        for (name, number) in [
            ("rip", number::RIP),
            ("cs", number::SEGMENTS),
            ("st0", number::ST),
            ("fctrl", number::FPU),
            ("xmm0", number::XMM),
            ("mxcsr", number::MXCSR),
            ("cr0", number::SYSTEM),
        ] {
            assert_eq!(named(name), Register(number));
        }
    }

    #[test]
    fn each_register_has_a_place_of_its_own() {
        let mut registers = registers();
        let is_kept = |it: &Register| {
            let segments = number::SEGMENTS..number::ST;
            // The tag word is not kept, and a segment depends on its descriptor.
            *it != named("ftag") && !segments.contains(&it.0)
        };
        let all: Vec<_> = Register::all().filter(is_kept).collect();
        let value = |register: Register| {
            let mut bytes = vec![register.0 as u8 + 1; register.size()];
            // These have 16 bits.
            if ["fctrl", "fstat", "fop"].map(named).contains(&register) {
                bytes[2..].fill(0);
            }
            bytes
        };
        for &register in &all {
            registers
                .set(register, &value(register), no_descriptor)
                .unwrap();
        }
        for register in all {
            assert_eq!(registers.get(register), value(register), "{register:?}");
        }
        assert_eq!(registers.regs.r15, u64::from_le_bytes([16; 8]));
        assert_eq!(registers.sregs.cr4, u64::from_le_bytes([63; 8]));
        assert!(registers.changed.regs && registers.changed.sregs && registers.changed.xsave);
        assert_eq!(registers.xsave.region[XSTATE_BV_WORD], XSTATE_LEGACY);
    }

    #[test]
    fn all_registers_at_once_are_the_single_ones() {
        let mut registers = registers();
        registers.regs.rip = 0x1234_5678;
        registers.sregs.efer = 0xd01;
        let file = registers.file();
        assert_eq!(file.pc(), 0x1234_5678);
        let mut bytes = Vec::new();
        file.gdb_serialize(|byte| bytes.extend(byte));
        let mut read = RegisterFile::default();
        assert_eq!(read.gdb_deserialize(&bytes[1..]), Err(()));
        read.gdb_deserialize(&bytes).unwrap();
        assert_eq!(read, file);
        for (register, bytes) in file.registers() {
            assert_eq!(registers.get(register), bytes);
        }
        assert_eq!(file.registers().count(), number::COUNT);
        assert_eq!(RegisterFile::default().pc(), 0);
    }

    #[test]
    fn a_value_of_another_size_is_refused() {
        let mut registers = registers();
        for bytes in [&[0; 7][..], &[0; 9], &[]] {
            let set = registers.set(Register(number::RIP), bytes, no_descriptor);
            assert!(matches!(set, Err(RegisterError::Size)));
        }
        assert!(!registers.changed.regs);
    }

    #[test]
    fn a_segment_is_loaded_as_the_processor_does() {
        let cs = named("cs");
        let mut registers = registers();
        registers.set(cs, &[0, 0xf0, 0, 0], no_descriptor).unwrap();
        assert_eq!(registers.sregs.cs.base, 0xf_0000);

        registers.sregs.cr0 = CR0_PROTECTED;
        registers.sregs.gdt.base = 0x500;
        registers.sregs.gdt.limit = 0x1f;
        // 64-bit code, privilege level 3, at 0x500 + 0x10.
        let code = 0x00af_fb00_0000_ffff_u64.to_le_bytes();
        let table = |address| (address == 0x510).then_some(code);
        registers.set(cs, &[0x13, 0, 0, 0], table).unwrap();
        let segment = registers.sregs.cs;
        assert_eq!(
            (segment.selector, segment.dpl, segment.l, segment.db),
            (0x13, 3, 1, 0)
        );
        assert_eq!(
            (segment.base, segment.limit, segment.type_),
            (0, u32::MAX, 0xb)
        );

        for selector in [0x18, 0x20, 0x17] {
            let set = registers.set(cs, &[selector, 0, 0, 0], table);
            assert!(matches!(set, Err(RegisterError::Selector)), "{selector:#x}");
        }
        let set = registers.set(cs, &[0, 0, 1, 0], table);
        assert!(matches!(set, Err(RegisterError::Selector)));
        registers
            .set(named("ds"), &[3, 0, 0, 0], no_descriptor)
            .unwrap();
        assert_eq!(registers.sregs.ds.unusable, 1);
    }

    #[test]
    fn tags_say_what_the_x87_registers_hold() {
        let mut registers = registers();
        assert_eq!(registers.tags(), 0xffff);
        // Register 7 is the top of the stack, and is 1.0; register 0 is the next, and zero.
        registers.set_fx(FSW, &(7_u16 << 11).to_le_bytes());
        registers.set_fx(ST, &[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        registers.set_fx(FTW, &[0b1000_0001]);
        assert_eq!(registers.tags(), 0b00_11_11_11_11_11_11_01);
        registers.set_fpu_control(2, 0xfffd);
        assert_eq!(registers.fx(FTW, 1), [1]);
    }
}
