//! The worker of a block device: it takes requests from the queues, chooses how each is done, and returns it
//! when it is done.

mod images;
mod next_disk;
mod waiting;

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_memory::{GuestBuffers, GuestMemory};
use bantam_storage::{CacheMode, Disk, DiskFile};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::disk_slot::{DiskLease, OpenDisk};
use super::image_work::{Done, ImageWork};
use super::in_flight::{InFlight, Remaining};
use super::metrics::{Tally, Work};
use super::polling::Polling;
use super::request::{Failure, Operation, Request, RequestError, RequestHandler};
use super::ring::{self, Completion, Direction, MAX_IN_FLIGHT, Ring};
use super::{BlockOptions, Engine};
use crate::virtio::{Activation, Chain, DriverLink, MAX_TURN, QueueSet, Throttle, VirtQueue};
use crate::worker::QueueProgress;
use waiting::Waiting;

/// Most requests that are begun before the driver is told of those that are done. The driver prepares the
/// next ones while the rest is done, so that neither waits for the other.
const MAX_BATCH: u16 = 16;
/// The driver is also told after this many bytes of data.
const MAX_BATCH_SIZE: u64 = 4 << 20;
/// Fewest requests for which one system call of the ring is cheaper than one call each.
const MIN_RING_BATCH: u16 = 4;
/// If writes to the page cache take longer than this together, the host has held them back. Waiting for a CPU
/// can also take a thread some milliseconds.
const SLOW_WRITES: Duration = Duration::from_millis(10);
/// How long writes then go through the ring, so that they do not hold up anything else.
const SLOW_WRITES_LAST: Duration = Duration::from_millis(100);
/// Event token of the ring; the token of a queue is its index.
const RING_EVENT: u32 = u32::MAX;
/// Event token of the timer of the limits.
const TIMER_EVENT: u32 = RING_EVENT - 1;
/// Event token of a replacement of the disk.
const DISK_EVENT: u32 = RING_EVENT - 2;
/// Event token of the thread of the image.
const IMAGE_EVENT: u32 = RING_EVENT - 3;

/// Room for one request.
struct Slot {
    /// Holds the buffers. While the ring has the request, the kernel has their vectors, so the chain must not
    /// change until the completion.
    chain: Chain,
    /// The buffers of a transfer that come after those in the chain.
    rest: GuestBuffers,
    /// The remaining work of the request, if it was not done at once.
    in_flight: Option<InFlight>,
}

pub(super) struct Worker {
    handler: RequestHandler,
    /// The disk to use once no request to the present one is in progress, and the owner has decided. Until
    /// then no request is begun.
    next_disk: Option<OpenDisk>,
    /// Whether everything is prepared for the switch to the next disk.
    is_prepared: bool,
    link: Arc<DriverLink>,
    memory: Arc<GuestMemory>,
    queues: Vec<VirtQueue>,
    engine: Engine,
    ring: Option<Ring>,
    /// Slots of requests. The index of a slot is the token of its request's operation. A slot is made when
    /// all others are in use, and a request stays in its slot.
    slots: Vec<Slot>,
    /// Slots that are not in use.
    free_slots: Vec<usize>,
    /// Slots of requests to an image that is not raw, which begin with the next submission.
    parsed: Vec<usize>,
    completions: Vec<Completion>,
    /// What the thread of the image has to do. Present from the first image on that is not raw.
    image_work: Option<Arc<ImageWork>>,
    /// How many jobs that thread has.
    image_jobs: usize,
    image_jobs_done: Vec<Done>,
    waiting: Waiting,
    /// Whether requests may be left in queues because the ring had no room for them.
    stalled: bool,
    /// Whether so many requests are begun now that the ring is quicker.
    is_large_batch: bool,
    /// Whether data was written to the page cache since the last check for slow writes.
    has_written: bool,
    /// Until when writes to the page cache are assumed to block.
    slow_writes_until: Option<Instant>,
    /// How many requests change the storage of a range. A write to the page cache waits for them.
    storage_changes: usize,
    throttle: Arc<Throttle>,
    /// The queue that is served first when limits allow more: each in turn, or the first would get
    /// everything.
    first_queue: usize,
    polling: Polling,
    tally: Tally,
    /// When the current batch of requests was started.
    batch_since: Instant,
    /// Bytes of data of the requests that were begun; the count wraps.
    begun_bytes: u64,
    /// Dropped last, when nothing here uses the disk any more.
    lease: DiskLease,
}

impl Worker {
    /// Makes a worker, which takes the queues of `activation`. If there is a `next_disk`, it begins no request
    /// to the present one.
    pub(super) fn new(
        handler: RequestHandler,
        lease: DiskLease,
        activation: &mut Activation,
        options: &BlockOptions,
        throttle: Arc<Throttle>,
        ring: Option<Ring>,
        next_disk: Option<OpenDisk>,
    ) -> Worker {
        let image_work = lease.image_work();
        Worker {
            handler,
            lease,
            next_disk,
            is_prepared: false,
            link: activation.link.clone(),
            memory: activation.memory.clone(),
            queues: mem::take(&mut activation.queues),
            engine: options.engine,
            ring,
            slots: Vec::new(),
            free_slots: Vec::new(),
            parsed: Vec::new(),
            completions: Vec::new(),
            image_work,
            image_jobs: 0,
            image_jobs_done: Vec::new(),
            waiting: Waiting::default(),
            stalled: false,
            is_large_batch: false,
            has_written: false,
            slow_writes_until: None,
            storage_changes: 0,
            throttle,
            first_queue: 0,
            polling: Polling::new(options.polls),
            tally: Tally::default(),
            batch_since: Instant::now(),
            begun_bytes: 0,
        }
    }

    /// Serves a queue until it is empty, the ring is full, or its turn is over. If requests are left, they
    /// are served when the doorbell is rung for them or a completion comes.
    fn serve(&mut self, index: usize) -> Result<(), RequestError> {
        let start = Instant::now();
        let mut now = start;
        self.queues[index].disable_doorbell();
        loop {
            let waiting = self.queues[index].available_count()?;
            if waiting == 0 {
                if self.poll(index)? {
                    now = Instant::now();
                    continue;
                }
                if !self.queues[index].enable_doorbell()? {
                    return Ok(());
                }
                // A driver could make chains available and take them back without end.
                if start.elapsed() >= MAX_TURN {
                    self.queues[index].ring_doorbell();
                    return Ok(());
                }
                self.queues[index].disable_doorbell();
                now = Instant::now();
                continue;
            }
            // Half of them, so that there is more to do here while the driver handles these.
            let batch = (waiting / 2).clamp(1, MAX_BATCH);
            self.is_large_batch = batch >= MIN_RING_BATCH;
            self.batch_since = now;
            let bytes_before = self.begun_bytes;
            for _ in 0..batch {
                if !self.has_room() {
                    // Some may complete while they are submitted.
                    self.submit()?;
                    if !self.has_room() {
                        self.stalled = true;
                        if self.next_disk.is_none() {
                            self.lease.metrics().io_engine_throttled_events.add(1);
                        }
                        return self.leave_rest(index);
                    }
                }
                if !self.throttle.allows_more()? {
                    self.submit()?;
                    self.lease.metrics().rate_limiter_throttled_events.add(1);
                    return self.leave_rest(index);
                }
                self.begin_next(index)?;
                if self.begun_bytes.wrapping_sub(bytes_before) >= MAX_BATCH_SIZE {
                    break;
                }
            }
            self.submit()?;
            self.interrupt_driver();
            let before = mem::replace(&mut now, Instant::now());
            self.tally.end_batch(now - before);
            if now - before >= SLOW_WRITES && mem::take(&mut self.has_written) {
                self.slow_writes_until = Some(now + SLOW_WRITES_LAST);
            }
            if now - start >= MAX_TURN || self.lease.is_urgent() {
                self.queues[index].ring_doorbell();
                return self.leave_rest(index);
            }
        }
    }

    /// Counts the requests that are left in a queue.
    fn leave_rest(&mut self, index: usize) -> Result<(), RequestError> {
        let count = self.queues[index].available_count()?;
        self.lease.metrics().remaining_reqs_count.add(count.into());
        Ok(())
    }

    /// Polls an empty queue for requests, for as long as that pays. `true` if there are any.
    fn poll(&mut self, index: usize) -> Result<bool, RequestError> {
        let Some(end) = self.polling.queue_is_empty() else {
            return Ok(false);
        };
        while Instant::now() < end {
            if self.in_flight_count() > 0 {
                self.complete()?;
                // Requests that were done in part continue.
                self.submit()?;
                self.interrupt_driver();
            }
            if self.queues[index].available_count()? > 0 {
                self.polling.succeeded();
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        self.polling.failed();
        Ok(false)
    }

    /// Whether another request may be begun.
    fn has_room(&self) -> bool {
        self.next_disk.is_none() && self.in_flight_count() < MAX_IN_FLIGHT
    }

    fn in_flight_count(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Takes the next request from a queue and does it, or gives it to the ring. `false` if there is none.
    pub(super) fn begin_next(&mut self, queue: usize) -> Result<bool, RequestError> {
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                chain: Chain::new(&self.memory),
                rest: GuestBuffers::new(self.memory.clone()),
                in_flight: None,
            });
            self.slots.len() - 1
        });
        let begun = self.begin(queue, slot);
        if self.slots[slot].in_flight.is_none() {
            self.free_slots.push(slot);
        }
        begun
    }

    fn begin(&mut self, queue: usize, slot: usize) -> Result<bool, RequestError> {
        let chain = &mut self.slots[slot].chain;
        if !self.queues[queue].pop(chain)? {
            return Ok(false);
        }
        let (request, operation) = self.handler.parse(chain)?;
        let bytes = request.readable.wrapping_add(request.written);
        self.begun_bytes = self.begun_bytes.wrapping_add(bytes.into());
        if self.throttle.is_limited() {
            let bytes = match operation {
                Ok(Operation::Read { .. }) => chain.writable.len() as u64,
                Ok(Operation::Write { .. }) => chain.readable.len() as u64,
                Ok(operation) => operation.range().map_or(0, |range| range.end - range.start),
                Err(_) => 0,
            };
            self.throttle.count(1, bytes);
        }
        let (work, result) = match operation {
            Ok(operation) => match self.remaining(slot, operation) {
                Some(remaining) => {
                    self.storage_changes += usize::from(remaining.changes_storage());
                    self.slots[slot].in_flight = Some(InFlight {
                        queue,
                        request,
                        remaining,
                        since: self.batch_since,
                        bounce: None,
                        span: None,
                        waits: false,
                    });
                    if self.defer_start(slot, operation) {
                        return Ok(true);
                    }
                    let result = match self.start(slot) {
                        Ok(None) => return Ok(true),
                        Ok(Some(result)) => Ok(result),
                        Err(error) => Err(error),
                    };
                    // Neither the kernel nor the thread of the image has it, so there is nothing to wait for.
                    let Some(mut in_flight) = self.slots[slot].in_flight.take() else {
                        return Ok(true);
                    };
                    self.release(&mut in_flight);
                    (in_flight.work(), result?)
                }
                None => {
                    let work = match operation {
                        Operation::Read { .. } => Work::Read(request.data_to_driver()),
                        Operation::Write { .. } => Work::Write(request.readable),
                        Operation::Flush => Work::Flush,
                        _ => Work::Other,
                    };
                    (work, self.perform(slot, operation))
                }
            },
            Err(failure) => (Work::Other, Err(failure)),
        };
        self.finish(queue, &request, result, work, None)?;
        Ok(true)
    }

    /// Returns what is left to do for `operation`, unless all of it is better done at once. A part that could
    /// be done without blocking may be done already.
    fn remaining(&mut self, slot: usize, operation: Operation) -> Option<Remaining> {
        let Disk::Raw(disk) = &**self.handler.disk() else {
            self.slots[slot].rest.clear();
            return self.remaining_of_image(operation);
        };
        self.ring.as_ref()?;
        if let Some(mode) = operation.fallocate_mode(disk) {
            return Some(Remaining::Storage { operation, mode });
        }
        if self.has_to_wait(operation) {
            return Some(Remaining::AtOnce(operation));
        }
        let uses_page_cache = disk.cache() != CacheMode::None;
        let may_be_quick = self.engine == Engine::Auto && uses_page_cache;
        match operation {
            Operation::Read { .. } if self.slots[slot].chain.writable.is_empty() => None,
            Operation::Read { mut offset } => {
                // The ring, too, does at once what the page cache can answer.
                if may_be_quick && !self.is_large_batch {
                    let buffers = &mut self.slots[slot].chain.writable;
                    let wanted = buffers.len();
                    // A failure shows again when the rest is done.
                    let _ = disk.read_cached(buffers, offset);
                    if buffers.is_empty() {
                        return None;
                    }
                    offset += (wanted - buffers.len()) as u64;
                }
                let direction = Direction::Read;
                Some(Remaining::Transfer { direction, offset })
            }
            Operation::Write { .. } if self.slots[slot].chain.readable.is_empty() => None,
            Operation::Write { offset } => {
                let durable = self.handler.writes_are_durable();
                if may_be_quick && !durable && !self.writes_are_slow() {
                    return None;
                }
                let direction = Direction::Write { durable };
                Some(Remaining::Transfer { direction, offset })
            }
            Operation::Flush if disk.cache() != CacheMode::Unsafe => Some(Remaining::Flush),
            _ => None,
        }
    }

    fn perform(&mut self, slot: usize, operation: Operation) -> Result<(), Failure> {
        self.has_written |= matches!(operation, Operation::Write { .. });
        if !operation.is_transfer() {
            // How long the host takes for it is not known, so the batch ends and the clock is checked.
            self.begun_bytes = self.begun_bytes.wrapping_add(MAX_BATCH_SIZE);
        }
        self.handler.perform(operation, &mut self.slots[slot].chain)
    }

    fn writes_are_slow(&mut self) -> bool {
        if self.storage_changes > 0 {
            return true;
        }
        match self.slow_writes_until {
            Some(until) if Instant::now() < until => true,
            _ => {
                self.slow_writes_until = None;
                false
            }
        }
    }

    /// Adds the operation of the request in `slot` to the ring.
    fn push(&mut self, slot: usize) -> Result<(), RequestError> {
        let Slot {
            chain, in_flight, ..
        } = &mut self.slots[slot];
        let (Some(ring), Some(in_flight)) = (&mut self.ring, in_flight) else {
            return Ok(());
        };
        let token = slot as u64;
        match in_flight.remaining {
            Remaining::Flush | Remaining::FlushOfStorage => ring.push_flush(token)?,
            Remaining::Storage { operation, mode } => {
                if let Some(range) = operation.range() {
                    ring.push_fallocate(mode, range, token)?;
                }
            }
            Remaining::AtOnce(_) | Remaining::Pieces(_) | Remaining::ByImage(_) => {}
            Remaining::Transfer { direction, offset } => {
                let buffers = direction.buffers_mut(chain);
                if let (Some(bounce), Disk::Raw(disk)) =
                    (&mut in_flight.bounce, &**self.handler.disk())
                {
                    let writes = direction != Direction::Read;
                    let step = disk.next_step(bounce, buffers, offset, writes);
                    let pointer = bounce.pointer(&step);
                    // SAFETY: the bytes are on the heap, where the buffer keeps them as long as it is with
                    // the slot, and nothing else uses them before the completion, which is waited for as
                    // below.
                    unsafe { ring.push_step(direction, &step, pointer, token)? }
                    return Ok(());
                }
                // SAFETY: the slot is not taken for another request while it has one in flight, which
                // ends with the completion of this token. Dropping the worker waits for all of them.
                unsafe { ring.push_transfer(direction, buffers, 0, offset, token)? }
            }
        }
        Ok(())
    }

    /// Submits what was added to the ring, and returns completed requests to the driver.
    fn submit(&mut self) -> Result<(), RequestError> {
        self.start_parsed()?;
        while let Some(ring) = &mut self.ring
            && ring.unsubmitted() > 0
        {
            ring.submit()?;
            self.complete()?;
        }
        Ok(())
    }

    /// Returns the requests that the ring and the thread of the image have completed, and continues those that
    /// they have done in part.
    fn complete(&mut self) -> Result<(), RequestError> {
        let mut result = self.start_parsed();
        let mut completions = mem::take(&mut self.completions);
        if let Some(ring) = &mut self.ring {
            ring.take_completions(&mut completions);
        }
        // The clock is read once for all of them.
        let now = (!completions.is_empty()).then(Instant::now);
        for completion in completions.drain(..) {
            // All are handled: no token is lost because another one fails.
            let completed = self.complete_one(completion, now);
            result = result.and(completed);
        }
        self.completions = completions;
        if self.image_jobs > 0 {
            result = result.and(self.complete_image_jobs());
        }
        result.and(self.end_waiting())
    }

    fn complete_one(
        &mut self,
        completion: Completion,
        now: Option<Instant>,
    ) -> Result<(), RequestError> {
        let index = completion.token as usize;
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let Some(in_flight) = &mut slot.in_flight else {
            return Ok(());
        };
        let outcome = in_flight.advance(
            self.handler.disk(),
            &mut slot.chain,
            &slot.rest,
            completion.result,
        );
        let Remaining::Storage { operation, .. } = in_flight.remaining else {
            return match outcome {
                None => self.go_on_or_end(index, now),
                Some(result) => self.end(index, result, now),
            };
        };
        match outcome {
            Some(Ok(())) if self.handler.writes_are_durable() => {
                in_flight.remaining = Remaining::FlushOfStorage;
                self.go_on_or_end(index, now)
            }
            // The host has a slower way, or none.
            Some(Err(Failure::Host(error))) if DiskFile::is_unsupported(&error) => {
                let result = self.perform(index, operation);
                self.end(index, result, now)
            }
            None => self.go_on_or_end(index, now),
            Some(result) => self.end(index, result, now),
        }
    }

    /// Does what comes next for the request in `slot`, and returns it to the driver if it has ended.
    fn go_on_or_end(&mut self, slot: usize, now: Option<Instant>) -> Result<(), RequestError> {
        match self.go_on(slot) {
            Ok(None) => Ok(()),
            Ok(Some(result)) => self.end(slot, result, now),
            Err(error) => {
                self.give_up(slot);
                Err(error)
            }
        }
    }

    /// Returns the request in `slot`, which has ended, to the driver.
    fn end(
        &mut self,
        slot: usize,
        result: Result<(), Failure>,
        now: Option<Instant>,
    ) -> Result<(), RequestError> {
        let Some(in_flight) = self.give_up(slot) else {
            return Ok(());
        };
        let work = in_flight.work();
        let time = now.map(|now| now.duration_since(in_flight.since));
        self.finish(in_flight.queue, &in_flight.request, result, work, time)
    }

    /// Frees `slot` for another request.
    fn give_up(&mut self, slot: usize) -> Option<InFlight> {
        let mut in_flight = self.slots[slot].in_flight.take()?;
        self.release(&mut in_flight);
        self.free_slots.push(slot);
        Some(in_flight)
    }

    /// Tells the driver that a request has ended, after `time` or with the current batch.
    fn finish(
        &mut self,
        queue: usize,
        request: &Request,
        result: Result<(), Failure>,
        work: Work,
        time: Option<Duration>,
    ) -> Result<(), RequestError> {
        self.handler
            .finish(request, &result, self.lease.metrics())?;
        if result.is_ok() {
            self.tally.done(work, time);
        }
        self.queues[queue].add_used(request.head, request.written);
        Ok(())
    }

    /// Waits until no request is in progress.
    pub(super) fn finish_all(&mut self) -> io::Result<()> {
        // A driver that no longer listens misses nothing.
        self.wait_for_all(None).map(drop)
    }

    /// Waits until no request is in progress, and tells the driver of those that are done.
    ///
    /// # Errors
    /// If some are still in progress at `deadline`, or the ring fails. The worker can go on with them.
    pub(super) fn end_requests(&mut self, deadline: Instant) -> io::Result<()> {
        let ended = self.wait_for_all(Some(deadline));
        self.interrupt_driver();
        self.tally.report(self.lease.metrics());
        if let Err(error) = ended? {
            self.fail(&error);
        }
        Ok(())
    }

    /// Completes all requests in progress. Returns the first failure to return one of them to the driver.
    ///
    /// # Errors
    /// If some are still in progress at `deadline`, or the ring fails.
    fn wait_for_all(&mut self, deadline: Option<Instant>) -> io::Result<Result<(), RequestError>> {
        let mut returned = Ok(());
        loop {
            returned = returned.and(self.complete());
            if self.in_flight_count() == 0 {
                return Ok(returned);
            }
            if self.waiting.is_put_off() {
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Err(ring::timed_out());
                }
                continue;
            }
            if self.abandon_line() {
                return Ok(returned);
            }
            if self.ring.is_none() && self.image_jobs == 0 {
                return Ok(returned);
            }
            self.wait_for_any(deadline)?;
        }
    }

    /// Ends the work of a worker that has no request under way. Its queues are for the next one.
    pub(super) fn into_queues(mut self) -> Vec<VirtQueue> {
        mem::take(&mut self.queues)
    }

    /// Returns how far each queue has come.
    pub(super) fn progress(&self) -> Vec<QueueProgress> {
        self.queues.iter().map(VirtQueue::progress).collect()
    }

    /// Asks the driver for a reset.
    fn fail(&self, error: &RequestError) {
        self.lease.metrics().event_fails.add(1);
        self.link.need_reset(error);
    }

    fn interrupt_driver(&mut self) {
        let mut waiting = QueueSet::default();
        for queue in &mut self.queues {
            if queue.needs_interrupt() {
                waiting.insert(queue.index());
            }
        }
        self.link.notify_used_buffers(waiting);
    }

    fn handle_event(&mut self, event: u32) -> Result<(), RequestError> {
        match event {
            RING_EVENT | IMAGE_EVENT => {
                self.complete()?;
                self.submit()?;
            }
            TIMER_EVENT => {
                self.lease.metrics().rate_limiter_event_count.add(1);
                self.throttle.clear()?;
                self.first_queue = (self.first_queue + 1) % self.queues.len();
                self.ring_doorbells();
            }
            queue => {
                self.lease.metrics().queue_event_count.add(1);
                if self.queues[queue as usize].available_count()? == 0 {
                    self.lease.metrics().no_avail_buffer.add(1);
                }
                self.polling.doorbell_rang();
                if self.waiting.is_put_off() {
                    self.end_waiting()?;
                    self.submit()?;
                }
                self.serve(queue as usize)?;
            }
        }
        self.end_stall();
        Ok(())
    }

    /// Serves requests that were left in the queues, if it may.
    fn end_stall(&mut self) {
        if self.stalled && self.has_room() {
            self.stalled = false;
            self.ring_doorbells();
        }
    }

    /// Has all queues served, each in its own turn.
    fn ring_doorbells(&self) {
        let (last, first) = self.queues.split_at(self.first_queue);
        for queue in first.iter().chain(last) {
            queue.ring_doorbell();
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        // The driver rings often. The doorbells are watched edge-triggered, so that none needs to be read.
        let doorbells = self.queues.iter().enumerate().map(|(index, queue)| {
            let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
            Events::with_data(queue, index as u32, set)
        });
        let completions = self
            .ring
            .iter()
            .map(|ring| Events::with_data(ring, RING_EVENT, EventSet::IN));
        let others = [
            Events::with_data(&self.lease, DISK_EVENT, EventSet::IN),
            Events::with_data(&*self.throttle, TIMER_EVENT, EventSet::IN),
        ];
        let image = self.image_work.iter().map(|work| image_events(work));
        // Those of the host first: they are handled even while the device needs a reset.
        for events in others
            .into_iter()
            .chain(doorbells)
            .chain(completions)
            .chain(image)
        {
            if let Err(error) = operations.add(events) {
                self.link.need_reset_by_host(&error);
                return;
            }
        }
        // A pause that failed may have left something to submit.
        if let Err(error) = self.submit() {
            self.fail(&error);
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if events.data() == DISK_EVENT {
            self.look_for_disk(operations);
        } else if self.link.needs_reset() {
            // Nothing clears its readiness any more, so it would be reported without end.
            if let Err(error) = operations.remove(events) {
                self.link
                    .warn_of_host(format_args!("cannot stop watching a file: {error}"));
            }
        } else {
            let handled = self.handle_event(events.data());
            // The driver is told of what was done, even if it broke the rules afterwards.
            self.interrupt_driver();
            if self.tally.has_batch() {
                self.tally.end_batch(self.batch_since.elapsed());
            }
            self.tally.report(self.lease.metrics());
            if let Err(error) = handled {
                self.fail(&error);
            }
        }
        self.change_disk(operations);
    }
}

impl Drop for Worker {
    /// Waits for what the ring and the thread of the image have, however long that takes: the kernel and that
    /// thread read and write the guest's memory until then. A driver that resets the device uses that memory for something else as soon
    /// as the write of the status register returns: that of Linux for MMIO does not look whether the
    /// reset is complete. The ring is left to the next worker, and the next disk to the owner.
    fn drop(&mut self) {
        let finished = self.finish_all();
        if let Err(error) = &finished {
            self.link
                .warn_of_host(format_args!("cannot wait for its requests: {error}"));
            // With them the kernel keeps the guest's memory, which is thus never given back.
            mem::forget(mem::take(&mut self.slots));
        }
        self.tally.report(self.lease.metrics());
        if finished.is_ok()
            && let Some(ring) = self.ring.take()
        {
            self.lease.give_back(ring);
        }
        if let Some(next) = self.next_disk.take() {
            self.lease.leave(next);
        }
    }
}

/// Returns the events of the thread of an image: edge-triggered, as the signal is taken back only to wait for the
/// next.
fn image_events(work: &ImageWork) -> Events {
    let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
    Events::with_data(work, IMAGE_EVENT, set)
}
