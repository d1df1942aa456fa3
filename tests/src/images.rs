//! Kernel images made for tests.

use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;

/// How the kernel in a bzImage is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Compression {
    Bzip2,
    Gzip,
    Lz4,
    Lzma,
    Lzo,
    Xz,
    Zstd,
}

impl Compression {
    /// All formats that the kernel build knows.
    pub const ALL: [Self; 7] = [
        Self::Bzip2,
        Self::Gzip,
        Self::Lz4,
        Self::Lzma,
        Self::Lzo,
        Self::Xz,
        Self::Zstd,
    ];

    /// The program and options of the kernel build (Linux scripts/Makefile.lib).
    fn command(self) -> &'static [&'static str] {
        match self {
            Self::Bzip2 => &["bzip2", "-9"],
            Self::Gzip => &["gzip", "-n", "-9"],
            Self::Lz4 => &["lz4", "-l", "-9", "-", "-"],
            Self::Lzma => &["lzma", "-9"],
            Self::Lzo => &["lzop", "-9"],
            Self::Xz => &["xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"],
            Self::Zstd => &["zstd", "--quiet", "--ultra", "-22"],
        }
    }

    /// Compresses `data` as the kernel build does.
    ///
    /// # Panics
    ///
    /// If the program cannot be run.
    pub fn compress(self, data: &[u8]) -> Vec<u8> {
        let mut compressed = filter(self.command(), data);
        // Every format gets the size appended, except gzip, whose own trailer ends with it.
        if self != Self::Gzip {
            let size = u32::try_from(data.len()).expect("a test's kernel is small");
            compressed.extend(size.to_le_bytes());
        }
        compressed
    }
}

/// Returns the output of `command` for `input`.
fn filter(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    let output = thread::scope(|scope| {
        // The scope joins the thread, which closes the pipe at its end.
        scope.spawn(move || stdin.write_all(input).expect("the program reads its input"));
        child.wait_with_output().expect("it is a child")
    });
    assert!(output.status.success(), "{command:?}: {}", output.status);
    output.stdout
}

/// A bzImage of boot protocol 2.15 (Linux Documentation/arch/x86/boot.rst).
#[derive(Debug, Clone, Default)]
pub struct BzImage {
    /// The compressed kernel.
    pub payload: Vec<u8>,
    /// The code at the 64-bit entry point, which has to decompress the kernel; at most 256 bytes.
    pub entry_code: Vec<u8>,
}

impl BzImage {
    const SETUP_SECTORS: usize = 1;
    const PROTECTED_MODE_OFFSET: usize = (1 + Self::SETUP_SECTORS) * 512;
    /// From the start of the protected-mode code.
    const ENTRY_OFFSET: usize = 0x200;
    const PAYLOAD_OFFSET: usize = 0x300;
    const LOAD_ADDRESS: u64 = 16 << 20;

    /// Returns the bytes of the file.
    ///
    /// # Panics
    ///
    /// If a part is too large.
    pub fn build(&self) -> Vec<u8> {
        assert!(self.entry_code.len() <= Self::PAYLOAD_OFFSET - Self::ENTRY_OFFSET);
        let mut code = vec![0; Self::ENTRY_OFFSET];
        code.extend(&self.entry_code);
        code.resize(Self::PAYLOAD_OFFSET, 0);
        code.extend(&self.payload);
        code.resize(code.len().next_multiple_of(16), 0);

        let mut image = vec![0; Self::PROTECTED_MODE_OFFSET];
        let mut set = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let word = |value: usize| {
            let value = u32::try_from(value).expect("a test's kernel is small");
            value.to_le_bytes()
        };
        set(0x1f1, &[Self::SETUP_SECTORS as u8]);
        // syssize, in paragraphs of 16 bytes.
        set(0x1f4, &word(code.len() / 16));
        // boot_flag.
        set(0x1fe, &[0x55, 0xaa]);
        // A jump over the setup header, which ends at 0x268.
        set(0x200, &[0xeb, 0x66]);
        set(0x202, b"HdrS");
        // version.
        set(0x206, &[0x0f, 0x02]);
        // loadflags: LOADED_HIGH.
        set(0x211, &[1]);
        // code32_start.
        set(0x214, &word(0x10_0000));
        // initrd_addr_max.
        set(0x22c, &word(0x7fff_ffff));
        // kernel_alignment.
        set(0x230, &word(2 << 20));
        // relocatable_kernel.
        set(0x234, &[1]);
        // xloadflags: XLF_KERNEL_64.
        set(0x236, &[1]);
        // cmdline_size.
        set(0x238, &word(2047));
        // payload_offset and payload_length.
        set(0x248, &word(Self::PAYLOAD_OFFSET));
        set(0x24c, &word(self.payload.len()));
        // pref_address.
        set(0x258, &Self::LOAD_ADDRESS.to_le_bytes());
        // init_size.
        set(0x260, &word(code.len().max(1 << 20)));
        image.extend(code);
        image
    }
}

/// Returns an ELF executable that consists of `code` at 1 MiB, which is also its 64-bit entry
/// point. It has no PVH note.
pub fn elf_kernel(code: &[u8]) -> Vec<u8> {
    const HEADER_SIZE: u64 = 64;
    const PROGRAM_HEADER_SIZE: u64 = 56;
    const ADDRESS: u64 = 1 << 20;
    const CODE_OFFSET: u64 = HEADER_SIZE + PROGRAM_HEADER_SIZE;

    // 64-bit, little-endian, version 1.
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    // ET_EXEC for EM_X86_64, version 1.
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry point, program headers, section headers.
    for field in [ADDRESS, HEADER_SIZE, 0] {
        image.extend(field.to_le_bytes());
    }
    // Flags.
    image.extend([0; 4]);
    // Sizes and numbers of headers: one program header, no section header.
    for field in [64_u16, 56, 1, 64, 0, 0] {
        image.extend(field.to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    image.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let size = code.len() as u64;
    for field in [CODE_OFFSET, ADDRESS, ADDRESS, size, size, 16] {
        image.extend(field.to_le_bytes());
    }
    image.extend(code);
    image
}
