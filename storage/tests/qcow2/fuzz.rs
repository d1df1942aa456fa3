//! Headers and images that someone has damaged: nothing panics, runs away, or takes memory without bound.

use std::sync::{Arc, LazyLock};

use bantam_storage::qcow2::{Compression, CreateOptions, Header, Options, Qcow2, Repair};
use bantam_storage::{Direction, Image};
use bolero::TypeGenerator;

use crate::memory_file::MemoryFile;

/// Largest file that an image may grow to.
const MAX_FILE: u64 = 32 << 20;
const SIZE: u64 = 1 << 20;

/// Whole images, which the tests damage.
static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let usual = CreateOptions {
        size: SIZE,
        cluster_size: 512,
        ..CreateOptions::default()
    };
    let options = [
        usual.clone(),
        CreateOptions {
            refcount_bits: 1,
            compression: Compression::Zstd,
            ..usual.clone()
        },
        CreateOptions {
            version: 2,
            cluster_size: 4096,
            ..usual.clone()
        },
        CreateOptions {
            extended_l2: true,
            cluster_size: 16384,
            refcount_bits: 64,
            ..usual
        },
    ];
    options
        .iter()
        .map(|options| {
            let file = Arc::new(MemoryFile::new(Vec::new()));
            Qcow2::create(Arc::clone(&file) as _, options).unwrap();
            let image = Qcow2::open(Arc::clone(&file) as _, Options::default()).unwrap();
            image.write_at(&[1; 50_000], 10_000).unwrap();
            image.write_compressed(&[2; 65536], 1 << 18).unwrap();
            image
                .write_zeroes(1 << 19..(1 << 19) + 40_000, true)
                .unwrap();
            if options.refcount_bits > 1 {
                image.create_snapshot("s").unwrap();
                image.write_at(&[3; 20_000], 20_000).unwrap();
            }
            drop(image);
            file.bytes()
        })
        .collect()
});

/// A change of a word of an image.
#[derive(Debug, TypeGenerator)]
struct Damage {
    /// Which word it is: one of the header if it is small.
    place: u16,
    value: Value,
}

#[derive(Debug, TypeGenerator)]
enum Value {
    Any(u64),
    Small(u8),
    /// A cluster with these of the upper bits.
    Cluster(u8, u8),
    /// One bit is flipped.
    Flip(u8),
}

#[derive(Debug, TypeGenerator)]
struct Case {
    image: u8,
    damage: Vec<Damage>,
    seed: u8,
}

fn damaged(case: &Case) -> Vec<u8> {
    let mut bytes = IMAGES[usize::from(case.image) % IMAGES.len()].clone();
    let cluster_bits = bytes[23];
    for Damage { place, value } in case.damage.iter().take(8) {
        let words = if place % 3 == 0 { 14 } else { bytes.len() / 8 };
        let place = usize::from(*place) / 3 % words * 8;
        let old = u64::from_be_bytes(bytes[place..place + 8].try_into().unwrap());
        let new = match *value {
            Value::Any(value) => value,
            Value::Small(value) => value.into(),
            Value::Cluster(cluster, upper) => {
                u64::from(cluster) << cluster_bits | u64::from(upper) << 56
            }
            Value::Flip(bit) => old ^ 1 << (bit % 64),
        };
        bytes[place..place + 8].copy_from_slice(&new.to_be_bytes());
    }
    bytes
}

#[test]
fn any_header_is_read_or_refused() {
    bolero::check!().for_each(|bytes| {
        let _ = Header::parse(bytes);
        let mut whole = IMAGES[0][..512].to_vec();
        for (place, byte) in whole[8..].iter_mut().zip(bytes) {
            *place ^= byte;
        }
        let _ = Header::parse(&whole);
    });
}

#[test]
fn any_damage_is_survived() {
    bolero::check!().with_type::<Case>().for_each(|case| {
        let bytes = damaged(case);
        let file = || Arc::new(MemoryFile::with_limit(bytes.clone(), MAX_FILE));
        let _ = Qcow2::check(file(), Repair::Nothing);
        let _ = Qcow2::check(file(), Repair::All);
        let read_only = Options {
            read_only: true,
            ..Options::default()
        };
        if let Ok(image) = Qcow2::open(file(), read_only) {
            look(&image);
            let _ = image.snapshots();
        }
        if let Ok(image) = Qcow2::open(file(), Options::default()) {
            let mut place = u64::from(case.seed) * 4099;
            for turn in 0..8 {
                place = place.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let offset = (place >> 20) % image.size().clamp(1, SIZE);
                let end = (offset + 30_000).min(image.size());
                let len = end.saturating_sub(offset);
                let _ = match turn % 4 {
                    0 => image.write_at(&vec![7; len as usize], offset),
                    1 => image.write_zeroes(offset..end, turn > 4),
                    2 => image.discard(offset..end),
                    _ => image.flush(),
                };
            }
            look(&image);
            let _ = image.create_snapshot("t");
            let _ = image.apply_snapshot("1");
            let _ = image.delete_snapshot("1");
            let _ = image.resize(SIZE * 2);
            let _ = image.resize(SIZE / 2);
            let _ = image.check_open();
        }
    });
}

/// Reads some of the disk in all ways.
fn look(image: &Qcow2) {
    let mut bytes = vec![0; 10_000];
    for offset in (0..image.size().min(SIZE)).step_by(33_333) {
        let len = (image.size() - offset).min(bytes.len() as u64);
        let _ = image.read_at(&mut bytes[..len as usize], offset);
        for direction in [Direction::Read, Direction::Write] {
            let _ = image.map(offset..offset + len, direction);
        }
        let _ = image.status(offset..offset + len);
    }
}
