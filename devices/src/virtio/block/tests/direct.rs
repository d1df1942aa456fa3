//! Requests that direct access does not take as they are, mixed with others that it takes.

use bantam_storage::DiskOptions;
use proptest::test_runner::Config;

use super::*;

/// Sectors of the disk that are written: few, so that requests share blocks.
const AREA: u64 = 96;
const BLOCK: u64 = 4096;

#[derive(Debug, Clone)]
enum Kind {
    Write,
    Read,
    Zero,
    Discard,
}

#[derive(Debug, Clone)]
struct Piece {
    kind: Kind,
    sectors: u64,
    /// Its offset in memory from the start of a page.
    shift: u64,
    /// Where it is split into two buffers.
    cut: u32,
}

fn piece() -> impl Strategy<Value = Piece> {
    let kind = prop_oneof![
        6 => Just(Kind::Write),
        2 => Just(Kind::Read),
        1 => Just(Kind::Zero),
        1 => Just(Kind::Discard),
    ];
    let sectors = prop_oneof![4 => 1..6_u64, 1 => Just(8), 1 => 6..40_u64];
    let shift = prop_oneof![2 => Just(0_u64), 1 => Just(512), 1 => 0..4096_u64];
    (kind, sectors, shift, 0..20_000_u32).prop_map(|(kind, sectors, shift, cut)| Piece {
        kind,
        sectors,
        shift,
        cut,
    })
}

/// Makes a disk that bypasses the page cache in a file of `size` bytes in `folder`. Its storage has blocks of
/// `block` bytes, if that is given instead of what the host reports.
fn machine(folder: &Path, engine: Engine, size: usize, block: Option<u64>) -> Option<Machine> {
    let folder = TempDir::new_in(folder).unwrap();
    let image = folder.as_path().join("disk.img");
    fs::write(&image, vec![0x5a; size]).unwrap();
    let options = DiskOptions {
        cache: CacheMode::None,
        ..DiskOptions::default()
    };
    let disk = match DiskFile::open(&image, &options) {
        Err(DiskError::Direct { .. }) => return None,
        disk => disk.unwrap(),
    };
    let disk = match block {
        Some(block) => disk.with_block(block),
        None => disk,
    };
    let options = BlockOptions {
        engine,
        ..BlockOptions::default()
    };
    Some(Machine::of(disk, image, folder, &options))
}

/// Offers at once requests for consecutive parts that together cover the area, and compares the result with
/// `model`.
fn round(machine: &mut Machine, pieces: &[Piece], model: &mut [u8], number: u8) {
    let mut sector = 0;
    let mut reads = Vec::new();
    let mut offered = 0;
    let mut place = DATA;
    for piece in pieces {
        let end = (sector + piece.sectors).min(model.len() as u64 / 512);
        let bytes = (sector as usize * 512)..(end as usize * 512);
        if bytes.is_empty() {
            break;
        }
        let len = bytes.len() as u32;
        let address = place + piece.shift;
        place += u64::from(len).next_multiple_of(4096) + 2 * 4096;
        let cut = piece.cut.min(len - 1);
        let data = match cut {
            0 => vec![(address, len)],
            _ => vec![(address, cut), (address + u64::from(cut), len - cut)],
        };
        let memory = machine.memory.clone();
        let write = |bytes: &[u8]| memory.write_slice(bytes, GuestAddress(address)).unwrap();
        let range = |flags: u32| {
            let [sector, count] = [sector, end - sector];
            let count_and_flags = count | u64::from(flags) << 32;
            [sector, count_and_flags].map(u64::to_le_bytes).concat()
        };
        match piece.kind {
            Kind::Write => {
                let new: Vec<u8> = bytes.clone().map(|at| (at / 7) as u8 ^ number).collect();
                write(&new);
                model[bytes].copy_from_slice(&new);
                machine.offer(VIRTIO_BLK_T_OUT, sector, &data);
            }
            Kind::Read => {
                let head = machine.offer(VIRTIO_BLK_T_IN, sector, &data);
                reads.push((head, address, bytes));
            }
            Kind::Zero => {
                write(&range(0));
                model[bytes].fill(0);
                machine.offer_readable(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(address, 16)]);
            }
            Kind::Discard => {
                write(&range(0));
                // In a file it becomes a hole.
                model[bytes].fill(0);
                machine.offer_readable(VIRTIO_BLK_T_DISCARD, 0, &[(address, 16)]);
            }
        }
        offered += 1;
        sector = end;
        if offered == 60 {
            break;
        }
    }
    for (head, _) in machine.run(offered) {
        assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
    }
    for (_, address, bytes) in reads {
        assert!(machine.bytes(address, bytes.len()) == model[bytes.clone()]);
    }
    assert!(fs::read(&machine.image).unwrap() == model);
}

/// Returns a folder on storage with real blocks, and one for which the host reports none.
pub(super) fn folders() -> [PathBuf; 2] {
    let program = std::env::current_exe().unwrap();
    [program.parent().unwrap().into(), "/dev/shm".into()]
}

proptest! {
    #![proptest_config(Config::with_cases(40))]

    #[test]
    fn requests_that_share_blocks_lose_nothing(
        rounds in prop::collection::vec(prop::collection::vec(piece(), 1..60), 1..4),
        engine in prop::sample::select(&ENGINES[..]),
        tail in 0..8_u64,
    ) {
        let [disk, memory] = folders();
        let whole = (AREA * 512).next_multiple_of(BLOCK) as usize;
        let odd = whole + tail as usize * 512;
        for machine in [
            machine(&disk, engine, whole, Some(BLOCK)),
            machine(&disk, engine, odd, None),
            machine(&memory, engine, odd, None),
        ] {
            let Some(mut machine) = machine else { continue };
            let mut model = fs::read(&machine.image).unwrap();
            for (number, pieces) in rounds.iter().enumerate() {
                round(&mut machine, pieces, &mut model, number as u8 + 1);
            }
            prop_assert!(!machine.link.needs_reset());
        }
    }
}

#[test]
fn sectors_of_one_block_are_written_by_requests_at_the_same_time() {
    let [disk, _] = folders();
    for engine in ENGINES {
        let mut machine = machine(&disk, engine, 64 << 10, Some(BLOCK)).unwrap();
        for round in 1..30_u8 {
            let order = (0..64).map(|at| (at * 37 + u64::from(round)) % 64);
            for sector in order {
                let address = DATA + sector * 0x1000;
                let bytes = [round ^ sector as u8; 512];
                machine
                    .memory
                    .write_slice(&bytes, GuestAddress(address))
                    .unwrap();
                machine.offer(VIRTIO_BLK_T_OUT, sector, &[(address, 512)]);
            }
            for (head, _) in machine.run(64) {
                assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
            }
            let image = fs::read(&machine.image).unwrap();
            for (sector, bytes) in (0..64_u8).zip(image.chunks(512)) {
                assert!(
                    bytes.iter().all(|&byte| byte == round ^ sector),
                    "{engine:?} {sector}"
                );
            }
        }
    }
}

#[test]
fn a_large_request_goes_through_a_small_buffer() {
    let [disk, _] = folders();
    for engine in ENGINES {
        let size = 1 << 20;
        let mut machine = machine(&disk, engine, size, Some(BLOCK)).unwrap();
        let bytes: Vec<u8> = (0..size - 1024).map(byte_of_disk).collect();
        machine
            .memory
            .write_slice(&bytes, GuestAddress(DATA + 5))
            .unwrap();
        let all = [(DATA + 5, bytes.len() as u32)];
        assert_eq!(machine.request(VIRTIO_BLK_T_OUT, 1, &all), VIRTIO_BLK_S_OK);
        let image = fs::read(&machine.image).unwrap();
        assert!(image[512..size - 512] == bytes);
        assert!(
            image[..512]
                .iter()
                .chain(&image[size - 512..])
                .all(|&byte| byte == 0x5a)
        );
        let back = [(DATA + 0x20_0001, bytes.len() as u32)];
        assert_eq!(machine.request(VIRTIO_BLK_T_IN, 1, &back), VIRTIO_BLK_S_OK);
        assert!(machine.bytes(DATA + 0x20_0001, bytes.len()) == bytes);
    }
}

#[test]
fn a_reset_waits_for_requests_that_wait_for_each_other() {
    let [disk, _] = folders();
    for engine in ENGINES {
        let mut machine = machine(&disk, engine, 64 << 10, Some(BLOCK)).unwrap();
        machine
            .memory
            .write_slice(&[1; 512], GuestAddress(DATA))
            .unwrap();
        let heads: Vec<u16> = (0..8)
            .chain(0..8)
            .map(|sector| machine.offer(VIRTIO_BLK_T_OUT, sector, &[(DATA, 512)]))
            .collect();
        machine.driver.ring_doorbell();
        machine.manager.run_with_timeout(0).unwrap();
        drop(machine.manager.remove_subscriber(machine.worker).unwrap());
        let image = fs::read(&machine.image).unwrap();
        for (sector, &head) in heads.iter().enumerate().take(8) {
            // If the host is slow, a turn ends before all are begun.
            if machine.status(head) == u32::from(UNTOUCHED) {
                continue;
            }
            assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
            assert_eq!(image[sector * 512..][..512], [1; 512]);
        }
    }
}

#[test]
fn an_empty_write_keeps_no_discard_from_being_done() {
    let [disk, _] = folders();
    for engine in ENGINES {
        let mut machine = machine(&disk, engine, 64 << 10, Some(BLOCK)).unwrap();
        let range = [0_u64, 8].map(u64::to_le_bytes).concat();
        machine
            .memory
            .write_slice(&range, GuestAddress(DATA))
            .unwrap();
        for _ in 0..6 {
            machine.offer(VIRTIO_BLK_T_OUT, 0, &[]);
            machine.offer_readable(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)]);
        }
        for (head, _) in machine.run(12) {
            assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
        }
    }
}
