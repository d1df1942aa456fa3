//! The pages of guest memory that a request leaves in the dirty log.

use super::*;

const PAGE: u64 = 0x1000;
/// The page with the used ring.
const USED: u64 = RINGS + 0x2000;
/// The page with the status bytes.
const STATUS: u64 = HEADERS;

/// Has the requests done that `offer` offers, and returns what is then in the log.
fn dirty_after(machine: &mut Machine, count: usize, offer: impl Fn(&mut Machine)) -> Vec<u64> {
    // The test driver is a part of this process, but the log is not to show its writes.
    offer(machine);
    machine.memory.start_dirty_log().unwrap();
    machine.run(count);
    let pages = machine.memory.take_dirty().unwrap();
    pages.iter().map(|page| page.0).collect()
}

#[test]
fn what_is_read_is_in_the_log() {
    for_each_kind(|mut machine| {
        for count in [1, 8] {
            let dirty = dirty_after(&mut machine, count, |machine| {
                for index in 0..count as u64 {
                    let data = DATA + index * 8 * PAGE;
                    let buffers = [(data, 4096), (data + 3 * PAGE, 512)];
                    machine.offer(VIRTIO_BLK_T_IN, 8 * index, &buffers);
                }
            });
            let mut expected = vec![USED, STATUS];
            let data = |index| DATA + index * 8 * PAGE;
            expected.extend((0..count as u64).flat_map(|it| [data(it), data(it) + 3 * PAGE]));
            assert_eq!(dirty, expected);
        }
    });
}

#[test]
fn what_is_read_by_way_of_a_buffer_is_in_the_log() {
    for engine in ENGINES {
        let mut machine = Machine::new(engine, CacheMode::None);
        let dirty = dirty_after(&mut machine, 1, |machine| {
            let buffers = [(DATA + PAGE - 1, 2), (DATA + 4 * PAGE + 1, 1022)];
            machine.offer(VIRTIO_BLK_T_IN, 1, &buffers);
        });
        let data = [0, 1, 4].map(|page| DATA + page * PAGE);
        assert_eq!(dirty, [&[USED, STATUS], &data[..]].concat());
    }
}

#[test]
fn a_read_that_fails_is_in_the_log_as_it_may_have_come_far() {
    for engine in ENGINES {
        let mut machine = Machine::new(engine, CacheMode::Writeback);
        let file = OpenOptions::new().write(true).open(&machine.image);
        file.unwrap().set_len(4096).unwrap();
        let dirty = dirty_after(&mut machine, 1, |machine| {
            machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 4096), (DATA + PAGE, 512)]);
        });
        assert_eq!(dirty, [USED, STATUS, DATA, DATA + PAGE]);
    }
}

#[test]
fn a_request_that_reads_nothing_leaves_its_status_and_itself_in_the_log() {
    for_each_kind(|mut machine| {
        for (kind, data) in [
            (VIRTIO_BLK_T_OUT, &[(DATA, 4096)][..]),
            (VIRTIO_BLK_T_FLUSH, &[]),
        ] {
            let dirty = dirty_after(&mut machine, 1, |machine| {
                machine.offer(kind, 0, data);
            });
            assert_eq!(dirty, [USED, STATUS]);
        }
        let dirty = dirty_after(&mut machine, 1, |machine| {
            machine.offer(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20)]);
        });
        assert_eq!(dirty, [USED, STATUS, DATA]);
    });
}
