//! Which words of a command line Linux handles itself, and which it passes to its init.
//!
//! A parameter that no part of the kernel knows goes to init, as an environment variable if it has
//! a value and as an argument otherwise, unless its name contains a `.` (Linux init/main.c,
//! `unknown_bootoption()`). The image contains the names of the parameters that the kernel knows.

use std::collections::HashSet;
use std::fmt;

use bantam_memory::GuestMemory;
use vm_memory::GuestMemoryError;

use super::LoadedKernel;
use crate::command_line::CommandLine;

/// Part of the message with which Linux panics if init would get too many words. No other kernel
/// passes words to init by these rules.
const OVERFLOW_MESSAGE: &[u8] = b"Too many boot ";

/// Most arguments of init besides its name (`CONFIG_INIT_ENV_ARG_LIMIT`, 32 unless a kernel is
/// configured for more).
const ARGUMENT_LIMIT: usize = 32;

/// Most variables of init's environment besides `HOME` and `TERM`. These two count as well, but the
/// kernel allows one more entry here before it considers the list full.
const VARIABLE_LIMIT: usize = 31;

/// Variables that init always has, so that words only replace them.
const OWN_VARIABLES: [&str; 2] = ["HOME", "TERM"];

/// Names that Linux attributes to a boot loader, and ignores.
const BOOT_LOADER_NAMES: [&str; 2] = ["BOOT_IMAGE", "kexec"];

/// More words than a kernel of ordinary configuration can pass to its init, so that it would panic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitOverflow {
    /// Words without a value, and all words after `--`.
    Arguments,
    /// Words with a value.
    Environment,
}

impl fmt::Display for InitOverflow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (limit, what, kind) = match self {
            Self::Arguments => (ARGUMENT_LIMIT, "arguments", "without a value or after '--'"),
            Self::Environment => (VARIABLE_LIMIT, "environment variables", "with a value"),
        };
        write!(
            formatter,
            "the kernel command line has more than {limit} words {kind} that this kernel does not \
             know: it passes them to init as {what} and panics if there are more than \
             CONFIG_INIT_ENV_ARG_LIMIT allows, which is {limit} by default; leave some out"
        )
    }
}

impl LoadedKernel {
    /// Returns whether this is Linux and passes a parameter called `name`, which contains no `.`,
    /// to its init. `false` if the image is compressed, so that this is unknown.
    ///
    /// # Errors
    ///
    /// The kernel is not in `memory`.
    pub fn passes_to_init(
        &self,
        memory: &GuestMemory,
        name: &str,
    ) -> Result<bool, GuestMemoryError> {
        Ok(self.contains(memory, OVERFLOW_MESSAGE)? && !self.knows(memory, name)?)
    }

    /// Returns whether this is Linux and `command_line` has more words for its init than a kernel
    /// of ordinary configuration takes. It does not count words that may be meant for the kernel.
    ///
    /// # Errors
    ///
    /// The kernel is not in `memory`.
    pub fn overflows_init(
        &self,
        memory: &GuestMemory,
        command_line: &CommandLine,
    ) -> Result<Option<InitOverflow>, GuestMemoryError> {
        let mut arguments = Vec::new();
        let mut variables = HashSet::new();
        for word in command_line.kernel_words() {
            let name = word.name;
            if name.contains('.') || BOOT_LOADER_NAMES.contains(&name) {
                continue;
            }
            if !word.has_value {
                arguments.push(name);
            } else if !OWN_VARIABLES.contains(&name) {
                variables.insert(name);
            }
        }
        let after_dashes = command_line.init_words().count();
        // Searching the kernel takes time, and hardly any command line is that long.
        if arguments.len() + after_dashes <= ARGUMENT_LIMIT && variables.len() <= VARIABLE_LIMIT
            || !self.contains(memory, OVERFLOW_MESSAGE)?
        {
            return Ok(None);
        }
        if self.passes_more_than(memory, ARGUMENT_LIMIT, after_dashes, arguments)? {
            Ok(Some(InitOverflow::Arguments))
        } else if self.passes_more_than(memory, VARIABLE_LIMIT, 0, variables)? {
            Ok(Some(InitOverflow::Environment))
        } else {
            Ok(None)
        }
    }

    /// Returns whether `count`, plus the number of `names` that the kernel does not know, exceeds
    /// `limit`.
    fn passes_more_than<'a>(
        &self,
        memory: &GuestMemory,
        limit: usize,
        mut count: usize,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<bool, GuestMemoryError> {
        for name in names {
            if count > limit {
                break;
            }
            count += usize::from(!self.knows(memory, name)?);
        }
        Ok(count > limit)
    }

    /// Returns whether the image contains `name` as a string, or with the `=` that is part of the
    /// name of most parameters. The kernel treats `-` and `_` as equal.
    fn knows(&self, memory: &GuestMemory, name: &str) -> Result<bool, GuestMemoryError> {
        let spellings: HashSet<String> = HashSet::from([
            name.to_owned(),
            name.replace('-', "_"),
            name.replace('_', "-"),
        ]);
        for spelling in spellings {
            for end in ["\0", "=\0"] {
                if self.contains(memory, format!("{spelling}{end}").as_bytes())? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::kernel::{BootProtocol, load_kernel};
    use crate::test_images::{MIB, TestElf, file, memory};

    /// Returns a kernel with these bytes in its image.
    fn kernel_with(bytes: &[u8]) -> (GuestMemory, LoadedKernel) {
        let guest = memory(16 * MIB);
        let image = TestElf::with_pvh().build();
        let kernel = load_kernel(&guest, &mut file(&image), BootProtocol::Auto).unwrap();
        guest.write_slice(bytes, kernel.start).unwrap();
        (guest, kernel)
    }

    fn linux_with(names: &str) -> (GuestMemory, LoadedKernel) {
        kernel_with(format!("\0Too many boot %s vars at `%s'\0{names}\0").as_bytes())
    }

    fn overflow_of(
        (guest, kernel): &(GuestMemory, LoadedKernel),
        line: &str,
    ) -> Option<InitOverflow> {
        let line = CommandLine::new(line).unwrap();
        kernel.overflows_init(guest, &line).unwrap()
    }

    fn words(count: usize, end: &str) -> String {
        (0..count)
            .map(|number| format!("word{number}{end} "))
            .collect()
    }

    #[test]
    fn linux_passes_on_words_that_its_image_does_not_name() {
        let (guest, kernel) = linux_with("no_timer_check\0tsc=\0xsavex\0low-latency");
        let passes = |name| kernel.passes_to_init(&guest, name).unwrap();
        for name in ["no_timer_check", "tsc", "low-latency", "low_latency"] {
            assert!(!passes(name), "{name}");
        }
        assert!(passes("earlyprintk") && passes("xsave"));
    }

    #[test]
    fn other_kernels_and_compressed_ones_pass_nothing_on() {
        let other = kernel_with(b"tsc=\0");
        assert!(!other.1.passes_to_init(&other.0, "earlyprintk").unwrap());
        assert_eq!(overflow_of(&other, &words(100, "")), None);
    }

    #[test]
    fn init_gets_the_words_that_linux_has_room_for() {
        let linux = linux_with("quiet\0root=");
        for (known, end, limit, overflow) in [
            ("quiet", "", 32, InitOverflow::Arguments),
            ("root=/dev/vda", "=1", 31, InitOverflow::Environment),
        ] {
            let line = |count| format!("{known} a.b a.b=1 {}", words(count, end));
            assert_eq!(overflow_of(&linux, &line(limit)), None);
            assert_eq!(overflow_of(&linux, &line(limit + 1)), Some(overflow));
        }
        let after_dashes = |count| format!("one two=2 -- {}", words(count, "=1"));
        assert_eq!(overflow_of(&linux, &after_dashes(31)), None);
        let arguments = Some(InitOverflow::Arguments);
        assert_eq!(overflow_of(&linux, &after_dashes(32)), arguments);
    }

    #[test]
    fn variables_count_once_and_those_that_init_already_has_do_not_count() {
        let linux = linux_with("");
        let line = format!("{} word0=2 HOME=/root TERM=vt100", words(31, "=1"));
        assert_eq!(overflow_of(&linux, &line), None);
        let boot_loader = format!("{} BOOT_IMAGE=/vmlinuz", words(31, "=1"));
        assert_eq!(overflow_of(&linux, &boot_loader), None);
    }

    #[test]
    fn known_words_cause_no_warning() {
        let names: String = (0..60).map(|number| format!("word{number}\0")).collect();
        let linux = linux_with(&names);
        assert_eq!(overflow_of(&linux, &words(60, "")), None);
        assert_eq!(overflow_of(&linux, &words(60, "=1")), None);
    }
}
