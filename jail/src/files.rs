//! Files and networks that a process can reach, by Landlock.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::ptr;

use landlock::{
    ABI, Access, AccessFs, AccessNet, AddRuleError, AddRulesError, BitFlags, CompatLevel,
    Compatible, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};

/// The version of Landlock whose rights are handled, as far as the host's kernel knows them.
const VERSION: ABI = ABI::V7;

/// Why the process can reach more than it should.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file of which a rule is to be made cannot be found.
    #[error("cannot find '{}': {source}", path.display())]
    Path {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The kernel refuses the rules.
    #[error("cannot restrict the process by Landlock: {0}")]
    Landlock(#[from] RulesetError),
}

/// What has become of [`Files::confine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confined {
    /// All of it is in force.
    Fully,
    /// The kernel does not know all rights.
    InPart,
    /// The kernel has no Landlock, or it is switched off.
    NotAtAll,
}

/// The files that a process can open, and whether it can use TCP. Descriptors that are open are not affected.
#[derive(Clone, Debug, Default)]
pub struct Files {
    rules: Vec<(PathBuf, BitFlags<AccessFs>)>,
    tcp: bool,
    requests: bool,
}

impl Files {
    /// Returns the version of Landlock that the kernel has, or `None` if it has none or it is switched off. All that is
    /// used of it is there since version 6.
    pub fn kernel_version() -> Option<u32> {
        const VERSION_REQUEST: u32 = 1;
        let no_rules = ptr::null::<libc::c_void>();
        // SAFETY: with this flag the kernel reads no memory, and only returns a number.
        let version = unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                no_rules,
                0,
                VERSION_REQUEST,
            )
        };
        u32::try_from(version).ok().filter(|&version| version > 0)
    }

    /// No files at all.
    pub fn none() -> Files {
        Files::default()
    }

    /// All files, but no program can be executed and no device file made. TCP and requests to devices are allowed.
    pub fn all() -> Files {
        let refused = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
        Files {
            rules: vec![("/".into(), AccessFs::from_all(VERSION) & !refused)],
            tcp: true,
            requests: true,
        }
    }

    /// Adds a file, or all files below a folder, to read.
    pub fn read(mut self, path: impl Into<PathBuf>) -> Files {
        self.rules
            .push((path.into(), AccessFs::ReadFile | AccessFs::ReadDir));
        self
    }

    /// Adds a file, or all files below a folder, to read and write.
    pub fn write(mut self, path: impl Into<PathBuf>) -> Files {
        let rights =
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        self.rules.push((path.into(), rights));
        self
    }

    /// Adds a folder in which files and sockets can be read, written, made and removed.
    pub fn folder(mut self, path: impl Into<PathBuf>) -> Files {
        let refused = AccessFs::Execute
            | AccessFs::MakeChar
            | AccessFs::MakeBlock
            | AccessFs::MakeSym
            | AccessFs::IoctlDev;
        self.rules
            .push((path.into(), AccessFs::from_all(VERSION) & !refused));
        self
    }

    /// Allows connections and ports of TCP.
    pub fn tcp(mut self) -> Files {
        self.tcp = true;
        self
    }

    /// Confines the calling thread, and the threads that it starts from now on, to these files. Files that do not exist
    /// are left out. Signals and abstract sockets of processes that are not confined with it are out of reach.
    ///
    /// # Errors
    /// If a file that exists cannot be looked up, or the kernel refuses the rules.
    pub fn confine(&self) -> Result<Confined, FilesError> {
        let mut rights = AccessFs::from_all(VERSION);
        if self.requests {
            rights &= !BitFlags::from(AccessFs::IoctlDev);
        }
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(rights)?
            .scope(Scope::from_all(VERSION))?;
        if !self.tcp {
            rules = rules.handle_access(AccessNet::from_all(VERSION))?;
        }
        let mut rules = rules.create()?;
        for (path, allowed) in &self.rules {
            let Some(rule) = rule(path, *allowed & rights)? else {
                continue;
            };
            match (&mut rules).add_rule(rule) {
                Ok(_) => {}
                // A pipe, socket or namespace that has a name in /proc or is mounted: Landlock leaves these alone.
                Err(RulesetError::AddRules(AddRulesError::Fs(AddRuleError::AddRuleCall {
                    source,
                    ..
                }))) if source.raw_os_error() == Some(libc::EBADFD) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let RestrictionStatus { ruleset, .. } = rules.restrict_self()?;
        Ok(match ruleset {
            RulesetStatus::FullyEnforced => Confined::Fully,
            RulesetStatus::PartiallyEnforced => Confined::InPart,
            RulesetStatus::NotEnforced => Confined::NotAtAll,
        })
    }
}

/// Makes the rule of a file, if it exists.
fn rule(
    path: &Path,
    mut rights: BitFlags<AccessFs>,
) -> Result<Option<PathBeneath<PathFd>>, FilesError> {
    let error = |source| FilesError::Path {
        path: path.to_owned(),
        source,
    };
    let kind = match fs::metadata(path) {
        Ok(found) => found.file_type(),
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(error(source)),
    };
    if !kind.is_dir() {
        rights &= AccessFs::from_file(VERSION);
    }
    if !(kind.is_dir() || kind.is_char_device() || kind.is_block_device()) {
        rights &= !BitFlags::from(AccessFs::IoctlDev);
    }
    let opened = PathFd::new(path).map_err(|source| error(io::Error::other(source)))?;
    Ok(Some(PathBeneath::new(opened, rights)))
}
