//! Random requests, against a model in memory and QEMU.

use std::sync::Arc;

use bantam_storage::qcow2::{Options, Qcow2};
use bantam_storage::{Direction, Extent, Image, ImageFile};
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::support::{Folder, host_file, qemu, raw_image, read_all, write_as_device};

/// How an image is made.
#[derive(Debug, Clone)]
struct Format {
    cluster_bits: u32,
    refcount_bits: u32,
    version_2: bool,
    extended: bool,
    backing: Option<u64>,
    max_pending: usize,
}

impl Format {
    fn options(&self) -> String {
        let mut options = format!("cluster_size={}", 1 << self.cluster_bits);
        if self.version_2 {
            options += ",compat=0.10";
        } else {
            options += &format!(",refcount_bits={}", self.refcount_bits);
        }
        if self.extended {
            options += ",extended_l2=on";
        }
        options
    }
}

fn format() -> impl Strategy<Value = Format> {
    let backing = proptest::option::of(1..SIZE / 512 * 2);
    let max_pending = prop_oneof![0..4usize, Just(1024)];
    let flags = (any::<bool>(), any::<bool>());
    (9u32..=17, 0u32..=6, flags, backing, max_pending).prop_map(
        |(cluster_bits, order, (version_2, extended), backing, max_pending)| Format {
            cluster_bits,
            refcount_bits: 1 << order,
            version_2,
            extended: extended && cluster_bits >= 14 && !version_2,
            backing: backing.map(|sectors| sectors * 512),
            max_pending,
        },
    )
}

const SIZE: u64 = (3 << 20) + 512 * 3;

#[derive(Debug, Clone)]
enum Operation {
    Write {
        offset: u64,
        len: u64,
        byte: u8,
    },
    /// A write to where `map` says.
    Direct {
        offset: u64,
        len: u64,
        byte: u8,
    },
    /// A write to where `map` or `allocate` says, if one does.
    AsDevice {
        offset: u64,
        len: u64,
        byte: u8,
    },
    Zeroes {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Read {
        offset: u64,
        len: u64,
    },
    /// Whole clusters are written in compressed form.
    Compressed {
        offset: u64,
        len: u64,
        byte: u8,
    },
    CreateSnapshot,
    /// The snapshots have a state each, of which one is chosen.
    ApplySnapshot(usize),
    DeleteSnapshot(usize),
    Flush,
    Reopen,
    /// QEMU writes, and discards.
    Qemu {
        offset: u64,
        len: u64,
        byte: u8,
    },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let len = prop_oneof![1..5000u64, 1..400_000u64, Just(4096), Just(65536)];
    (
        0..SIZE,
        len,
        prop_oneof![Just(1u64), Just(512), Just(4096), Just(65536)],
    )
        .prop_map(|(offset, len, alignment)| {
            let offset = offset / alignment * alignment;
            (offset, len.min(SIZE - offset))
        })
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => (range(), 1u8..)
            .prop_map(|((offset, len), byte)| Operation::Write { offset, len, byte }),
        4 => (range(), 1u8..)
            .prop_map(|((offset, len), byte)| Operation::Direct { offset, len, byte }),
        4 => (range(), 1u8..)
            .prop_map(|((offset, len), byte)| Operation::AsDevice { offset, len, byte }),
        4 => (range(), any::<bool>())
            .prop_map(|((offset, len), unmap)| Operation::Zeroes { offset, len, unmap }),
        3 => range().prop_map(|(offset, len)| Operation::Discard { offset, len }),
        4 => range().prop_map(|(offset, len)| Operation::Read { offset, len }),
        1 => (range(), 1u8..)
            .prop_map(|((offset, len), byte)| Operation::Compressed { offset, len, byte }),
        1 => Just(Operation::CreateSnapshot),
        1 => any::<usize>().prop_map(Operation::ApplySnapshot),
        1 => any::<usize>().prop_map(Operation::DeleteSnapshot),
        2 => Just(Operation::Flush),
        1 => Just(Operation::Reopen),
        1 => (range(), 1u8..)
            .prop_map(|((offset, len), byte)| Operation::Qemu { offset, len, byte }),
    ]
}

struct Subject {
    folder: Folder,
    has_backing: bool,
    max_pending: usize,
    image: Option<Qcow2>,
    file: Arc<dyn ImageFile>,
    model: Vec<u8>,
    /// What the disk held when each snapshot was made, by its identifier.
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Subject {
    fn new(format: &Format) -> Subject {
        let folder = Folder::new();
        let mut model = vec![0; SIZE as usize];
        folder.create("image", &format.options(), &SIZE.to_string());
        if let Some(size) = format.backing {
            let base: Vec<u8> = (0..size).map(|index| (index / 512 % 251) as u8).collect();
            let len = base.len().min(model.len());
            model[..len].copy_from_slice(&base[..len]);
            std::fs::write(folder.path("base"), base).unwrap();
            let (base, image) = (folder.name("base"), folder.name("image"));
            qemu(
                "qemu-img",
                &[
                    "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", &base, &image,
                ],
            );
        }
        let file = host_file(&folder.path("image"), false);
        let has_backing = format.backing.is_some();
        let mut subject = Subject {
            folder,
            has_backing,
            max_pending: format.max_pending,
            image: None,
            file,
            model,
            snapshots: Vec::new(),
        };
        subject.open();
        subject
    }

    fn open(&mut self) {
        let backing = self
            .has_backing
            .then(|| raw_image(&self.folder.path("base")));
        // A small cache, so that slices come and go.
        let options = Options {
            cache_bytes: 0,
            max_pending: self.max_pending,
            backing,
            ..Options::default()
        };
        self.image = Some(Qcow2::open(Arc::clone(&self.file), options).unwrap());
    }

    fn run(&mut self, operation: &Operation) {
        let image = self.image.as_ref().unwrap();
        let part = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match *operation {
            Operation::Write { offset, len, byte } => {
                let bytes = vec![byte; len as usize];
                image.write_at(&bytes, offset).unwrap();
                self.model[part(offset, len)].fill(byte);
            }
            Operation::Direct { offset, len, byte } => {
                if let Extent::File {
                    file,
                    offset: host,
                    len,
                } = image.map(offset..offset + len, Direction::Write)
                {
                    assert_eq!(file, 0);
                    self.file.write_at(&vec![byte; len as usize], host).unwrap();
                    self.model[part(offset, len)].fill(byte);
                }
            }
            Operation::AsDevice { offset, len, byte } => {
                let bytes = vec![byte; len as usize];
                write_as_device(image, &*self.file, &bytes, offset).unwrap();
                self.model[part(offset, len)].fill(byte);
            }
            Operation::Zeroes { offset, len, unmap } => {
                image.write_zeroes(offset..offset + len, unmap).unwrap();
                self.model[part(offset, len)].fill(0);
            }
            Operation::Discard { offset, len } => {
                image.discard(offset..offset + len).unwrap();
                let mut bytes = vec![0; len as usize];
                image.read_at(&mut bytes, offset).unwrap();
                let model = &mut self.model[part(offset, len)];
                assert!(
                    bytes
                        .iter()
                        .zip(&*model)
                        .all(|(new, old)| *new == 0 || new == old)
                );
                model.copy_from_slice(&bytes);
            }
            Operation::Read { offset, len } => {
                let mut bytes = vec![0; len as usize];
                image.read_at(&mut bytes, offset).unwrap();
                assert!(bytes == self.model[part(offset, len)]);
            }
            Operation::Compressed { offset, len, byte } => {
                let cluster = image.header().cluster_size();
                let start = offset / cluster * cluster;
                let end = ((offset + len).div_ceil(cluster) * cluster).min(SIZE);
                let bytes = vec![byte; (end - start) as usize];
                image.write_compressed(&bytes, start).unwrap();
                self.model[part(start, end - start)].fill(byte);
            }
            Operation::CreateSnapshot => match image.create_snapshot("s") {
                Ok(id) => self.snapshots.push((id, self.model.clone())),
                // Some refcounts are too narrow for another one.
                Err(_) => assert!(image.header().refcount_bits() < 16),
            },
            Operation::ApplySnapshot(choice) if !self.snapshots.is_empty() => {
                let (id, state) = &self.snapshots[choice % self.snapshots.len()];
                match image.apply_snapshot(id) {
                    Ok(()) => self.model.clone_from(state),
                    Err(_) => assert!(image.header().refcount_bits() < 16),
                }
            }
            Operation::DeleteSnapshot(choice) if !self.snapshots.is_empty() => {
                let (id, _) = self.snapshots.remove(choice % self.snapshots.len());
                image.delete_snapshot(&id).unwrap();
            }
            Operation::ApplySnapshot(_) | Operation::DeleteSnapshot(_) => {}
            Operation::Flush => image.flush().unwrap(),
            Operation::Reopen => {
                self.compare();
                self.open();
            }
            Operation::Qemu { offset, len, byte } => {
                self.image = None;
                self.folder
                    .io("image", &[format!("write -P {byte} {offset} {len}")]);
                self.model[part(offset, len)].fill(byte);
                self.open();
            }
        }
    }

    /// Closes the image, and has QEMU check and read it.
    fn compare(&mut self) {
        self.image = None;
        self.folder.check("image");
        assert!(self.folder.contents("image") == self.model);
    }
}

proptest! {
    #![proptest_config(Config { cases: 64, ..Config::default() })]

    #[test]
    fn the_disk_holds_what_was_written(
        format in format(),
        operations in proptest::collection::vec(operation(), 1..60),
    ) {
        let mut subject = Subject::new(&format);
        for operation in &operations {
            subject.run(operation);
        }
        let image = subject.image.as_ref().unwrap();
        prop_assert!(read_all(image) == subject.model);
        subject.compare();
    }
}
