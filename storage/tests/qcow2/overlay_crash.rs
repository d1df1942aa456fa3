//! Crashes of the host at all moments of an external snapshot, while the guest writes.

use std::sync::Arc;

use bantam_storage::Image;
use bantam_storage::qcow2::{Options, Qcow2};

use crate::jobs_crash::{
    BASES, Base, Model, check_clean, crash_often, make_files, open_base, open_top, tops, use_once,
};
use crate::memory_file::{Journal, MemoryFile};
use crate::support::{Numbers, read_all};

#[test]
fn a_crash_during_a_snapshot_loses_nothing_that_was_flushed() {
    for (seed, base) in BASES.into_iter().enumerate() {
        for (number, top) in tops(base).iter().enumerate() {
            let mut numbers = Numbers::new(seed as u64 * 10 + number as u64 + 40);
            let (bytes, _) = make_files(base, top, &mut numbers);
            let journal = Arc::new(Journal::default());
            let file = |number, bytes: &[u8]| {
                Arc::new(MemoryFile::new(bytes.to_vec()).recorded_in(&journal, number))
            };
            let (base_file, top_file) = (file(0, &bytes), file(1, &[]));
            let image = open_base(base, &base_file, false);
            let mut model = Model::new(&*image);
            let mut use_for = |image: &dyn Image, turns| {
                for _ in 0..turns {
                    use_once(image, &journal, &mut numbers, &mut model);
                }
            };
            // In the order of a snapshot of a device.
            use_for(&*image, 20);
            let options = Options {
                max_pending: [3, 1024][number % 2],
                ..Options::default()
            };
            let overlay =
                Qcow2::create_overlay(Arc::clone(&top_file) as _, top, Arc::clone(&image), options);
            let overlay = overlay.unwrap();
            let made = journal.len();
            use_for(&*image, 10);
            image.flush().unwrap();
            use_for(&*image, 10);
            let switched = journal.len();
            use_for(&overlay, 10);
            overlay.flush().unwrap();
            image.end_writing().unwrap();
            use_for(&overlay, 30);
            drop((overlay, image));

            let files = [(bytes, base_file), (Vec::new(), top_file)];
            crash_often(&files, &journal, &mut numbers, |files, changes| {
                let what = format!("{base:?}, {top:?}, {changes} changes, {made} and {switched}");
                if let Base::Qcow2 { .. } = base {
                    check_clean(&files[0], &what);
                }
                let base = open_base(base, &files[0], true);
                if changes <= switched {
                    model.check(&read_all(&*base), changes, &what);
                }
                if changes >= made {
                    check_clean(&files[1], &what);
                    let image = open_top(&files[1], Some(base), 1024);
                    model.check(&read_all(&image), changes, &what);
                }
            });
        }
    }
}
