//! Snapshots and jobs of a disk, by the owner of the machine.

use std::thread;

use bantam_storage::{HostOpener, ImageFormat};

use super::*;

impl Machine {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.as_path().join(name)
    }

    /// Writes `byte` to the first 64 KiB of the disk, by many requests of which some are still under way when `work` is
    /// done by the owner.
    fn write_during<T: Send>(
        &mut self,
        byte: u8,
        work: impl FnOnce(&BlockHandle) -> T + Send,
    ) -> T {
        let data = [byte; 0x1000];
        self.memory.write_slice(&data, GuestAddress(DATA)).unwrap();
        let offer = |machine: &mut Machine, index: u64| {
            machine.offer(VIRTIO_BLK_T_OUT, index * 8, &[(DATA, 0x1000)])
        };
        let mut heads: Vec<u16> = (0..8).map(|index| offer(self, index)).collect();
        self.driver.ring_doorbell();
        self.manager.run_with_timeout(0).unwrap();
        heads.extend((8..16).map(|index| offer(self, index)));
        self.driver.ring_doorbell();
        let done = self.during(work);
        let used = self.driver.take_used().len();
        self.run(heads.len() - used);
        for head in heads {
            assert_eq!(self.status(head), VIRTIO_BLK_S_OK);
        }
        done
    }

    fn snapshot(&mut self, byte: u8, path: &Path) -> Duration {
        let taken = self.write_during(byte, |handle| {
            snapshot(&[(handle, path)], &HostOpener, no_haste())
        });
        taken.unwrap()
    }

    fn has(&mut self, byte: u8) {
        let read = self.request(VIRTIO_BLK_T_IN, 0, &[(DATA + 0x2_0000, 0x1_0000)]);
        assert_eq!(read, VIRTIO_BLK_S_OK);
        let bytes = self.bytes(DATA + 0x2_0000, 0x1_0000);
        assert!(bytes.iter().all(|&found| found == byte), "not {byte}");
        // What nobody has written is still there.
        let read = self.request(VIRTIO_BLK_T_IN, 4000, &[(DATA, 512)]);
        assert_eq!(read, VIRTIO_BLK_S_OK);
        let expected: Vec<u8> = (4000 * 512..4001 * 512).map(byte_of_disk).collect();
        assert!(self.bytes(DATA, 512) == expected);
    }

    fn start_job(&mut self, byte: u8, job: DiskJob) {
        let started = self.write_during(byte, |handle| {
            handle.start_job(job, &HostOpener, no_haste())
        });
        started.unwrap();
    }

    /// Runs the event loop until the job of the disk is in `state`.
    fn wait_for_job(&mut self, state: &JobState) {
        let deadline = Instant::now() + LIMIT;
        while self.handle.job().unwrap().state != *state {
            assert!(Instant::now() < deadline, "{:?}", self.handle.job());
            self.manager.run_with_timeout(1).unwrap();
        }
    }

    fn finish_job(&mut self, byte: u8) -> PresentImage {
        let finished = self.write_during(byte, |handle| handle.finish_job(no_haste()));
        finished.unwrap()
    }
}

#[test]
fn a_snapshot_is_taken_between_two_requests() {
    for engine in ENGINES {
        for cache in [
            CacheMode::Writeback,
            CacheMode::Writethrough,
            CacheMode::Unsafe,
        ] {
            let mut machine = Machine::new(engine, cache);
            let mut images = vec![machine.image.clone()];
            for byte in 1..4 {
                let path = machine.path(&format!("overlay{byte}"));
                machine.snapshot(byte, &path);
                machine.has(byte);
                images.push(path);
            }
            assert_eq!(machine.image_threads.count(), 1);
            let before: Vec<Vec<u8>> = images[..3].iter().map(|it| fs::read(it).unwrap()).collect();
            machine.write_during(9, |_| ());
            machine.has(9);
            for (image, before) in images.iter().zip(before) {
                assert!(fs::read(image).unwrap() == before);
            }
        }
    }
}

#[test]
fn a_snapshot_is_taken_whatever_the_driver_does() {
    let mut machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    machine.write_during(1, |_| ());
    // No driver yet.
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    let path = machine.path("first");
    snapshot(&[(&machine.handle, &path)], &HostOpener, no_haste()).unwrap();
    machine.activate();
    machine.has(1);
    // A driver that resets the device before the device gets to that.
    let path = machine.path("second");
    thread::scope(|scope| {
        let disks = [(&machine.handle, path.as_path())];
        let owner = scope.spawn(move || snapshot(&disks, &HostOpener, no_haste()));
        thread::sleep(Duration::from_millis(20));
        assert!(!owner.is_finished());
        drop(machine.manager.remove_subscriber(machine.worker).unwrap());
        owner.join().unwrap().unwrap();
    });
    machine.activate();
    machine.has(1);
}

#[test]
fn a_snapshot_that_comes_too_late_leaves_nothing() {
    let machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    let path = machine.path("overlay");
    let disks = [(&machine.handle, path.as_path())];
    // The event loop does not run.
    let deadline = Instant::now() + Duration::from_millis(100);
    let error = snapshot(&disks, &HostOpener, deadline).unwrap_err();
    assert!(matches!(error, SnapshotError::ChangeOver(_)), "{error}");
    assert!(!path.exists());
    assert_eq!(machine.handle.disk().path(), machine.image);
    let twice = [disks[0], disks[0]];
    let error = snapshot(&twice, &HostOpener, no_haste()).unwrap_err();
    assert!(matches!(error, SnapshotError::Repeated), "{error}");
}

#[test]
fn a_disk_moves_and_is_merged_whatever_the_driver_does() {
    for (engine, cache) in ENGINES
        .into_iter()
        .flat_map(|engine| [CacheMode::Writeback, CacheMode::None].map(|cache| (engine, cache)))
    {
        let mut machine = Machine::new(engine, cache);
        let copy = machine.path("copy");
        let job = DiskJob::Copy {
            path: copy.clone(),
            format: ImageFormat::Qcow2,
        };
        machine.start_job(1, job.clone());
        // The driver resets the device while the job is there.
        machine.reset();
        machine.write_during(2, |_| ());
        machine.wait_for_job(&JobState::Ready);
        machine.write_during(3, |_| ());
        machine.has(3);
        let image = machine.finish_job(4);
        assert_eq!(
            (image.path, image.format),
            (copy.clone(), ImageFormat::Qcow2)
        );
        machine.has(4);
        // The former image is free.
        open(&machine.image, false, CacheMode::Writeback).unwrap();

        let overlay = machine.path("overlay");
        machine.snapshot(5, &overlay);
        machine.start_job(6, DiskJob::Commit);
        machine.wait_for_job(&JobState::Ready);
        machine.handle.cancel_job().unwrap();
        machine.wait_for_job(&JobState::Cancelled);
        machine.has(6);
        machine.start_job(7, DiskJob::Commit);
        machine.wait_for_job(&JobState::Ready);
        let image = machine.finish_job(8);
        assert_eq!(image.path, copy);
        machine.has(8);
        fs::remove_file(&overlay).unwrap();

        machine.snapshot(9, &overlay);
        machine.start_job(10, DiskJob::Pull);
        machine.wait_for_job(&JobState::Finished);
        machine.has(10);
        fs::write(&copy, "nothing").unwrap();
        machine.write_during(11, |_| ());
        machine.has(11);
    }
}

#[test]
fn a_job_that_cannot_begin_leaves_nothing() {
    let mut machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    let path = machine.path("copy");
    let copy = || DiskJob::Copy {
        path: path.clone(),
        format: ImageFormat::Raw,
    };
    for job in [DiskJob::Commit, DiskJob::Pull] {
        let error = machine.handle.start_job(job, &HostOpener, no_haste());
        assert!(matches!(error, Err(JobCommandError::Begin(_))));
    }
    let late = Instant::now() + Duration::from_millis(50);
    let error = machine.handle.start_job(copy(), &HostOpener, late);
    assert!(matches!(error, Err(JobCommandError::Device(_))));
    assert!(!path.exists());
    machine.handle.owner = Arc::new(OneThread(machine.image_threads.owner()));
    let error = machine.during(|handle| handle.start_job(copy(), &HostOpener, no_haste()));
    assert!(matches!(error, Err(JobCommandError::Thread(_))));
    assert!(!path.exists() && machine.handle.job().is_none());
    machine.write_during(1, |_| ());
    machine.has(1);
    assert_eq!(machine.handle.disk().path(), machine.image);
}

/// The owner of a machine on a host without a thread for jobs.
struct OneThread(Arc<dyn DiskOwner>);

impl DiskOwner for OneThread {
    fn start_image_thread(&self, work: Arc<ImageWork>) -> io::Result<()> {
        self.0.start_image_thread(work)
    }

    fn start_job(&self, _: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        Err(io::Error::other("no more threads"))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.remove_file(path)
    }
}
