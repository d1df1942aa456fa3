//! The worker of a balloon: it takes pages, and asks for statistics when they are due.

use std::fmt::Display;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bantam_state::{SaveError, Section};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::BalloonState;
use super::discard::{DiscardQueue, Naming, check_page_numbers};
use super::{GuestStatistics, Shared, WorkerError, feature, lock};
use crate::virtio::queue::progress_of;
use crate::virtio::{Activation, Chain, DriverLink, VirtQueue};
use crate::worker::{QueueProgress, VirtioWorker};

/// The event token of each source.
mod event {
    pub const INFLATE: u32 = 0;
    pub const DEFLATE: u32 = 1;
    pub const STATISTICS: u32 = 2;
    pub const TIMER: u32 = 3;
    pub const HINTING: u32 = 4;
    /// Token of the first reporting queue; those of the others follow.
    pub const REPORTING: u32 = 5;
}

/// The queue on which the driver provides statistics (section 5.5.6.3).
struct StatisticsQueue {
    queue: VirtQueue,
    chain: Chain,
    /// The driver's buffer, which is returned to ask for new statistics.
    held: Option<u16>,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    link: Arc<DriverLink>,
    queue_count: usize,
    inflate: DiscardQueue,
    deflate: VirtQueue,
    deflate_chain: Chain,
    statistics: Option<StatisticsQueue>,
    hinting: Option<DiscardQueue>,
    reporting: Vec<DiscardQueue>,
}

impl Worker {
    /// Makes a worker for the negotiated features.
    ///
    /// In the standard, hinting has queue 3 and reporting queue 4, whatever other features there are.
    /// Drivers, including Linux, count only the queues of features that they have accepted, and some count
    /// those of the features offered. So hinting gets the first queue after the others that the driver has
    /// set up, and every queue after that is for reporting; the driver sets up the one that it means.
    pub(super) fn new(shared: Arc<Shared>, activation: Activation) -> Result<Worker, String> {
        let Activation {
            memory,
            features,
            queues,
            link,
            state: _,
        } = activation;
        let queue_count = queues.len();
        let mut queues = queues.into_iter();
        let (Some(inflate), Some(deflate)) = (queues.next(), queues.next()) else {
            return Err("a balloon has two queues at least".to_string());
        };
        let discard_queue =
            |naming, queue| DiscardQueue::new(naming, queue, &memory, shared.clone());
        let inflate = discard_queue(Naming::Numbers, inflate);
        let statistics = if features & feature::STATS_VQ != 0 {
            queues.next()
        } else {
            None
        };
        let hinting = if features & feature::FREE_PAGE_HINT != 0 {
            queues
                .find(VirtQueue::is_set_up)
                .map(|queue| discard_queue(Naming::Hints, queue))
        } else {
            None
        };
        let reporting = if features & feature::REPORTING != 0 {
            queues
                .map(|queue| discard_queue(Naming::Buffers, queue))
                .collect()
        } else {
            Vec::new()
        };
        let worker = Worker {
            queue_count,
            inflate,
            deflate,
            deflate_chain: Chain::new(&memory),
            statistics: statistics.map(|queue| StatisticsQueue {
                queue,
                chain: Chain::new(&memory),
                held: None,
            }),
            hinting,
            reporting,
            shared,
            link,
        };
        // The driver sends the first statistics unasked.
        worker.restart_timer().map_err(|error| error.to_string())?;
        Ok(worker)
    }

    /// Returns the queue that an event belongs to, if any.
    fn queue(&self, event: u32) -> Option<&VirtQueue> {
        match event {
            event::INFLATE => Some(self.inflate.queue()),
            event::DEFLATE => Some(&self.deflate),
            event::STATISTICS => self.statistics.as_ref().map(|statistics| &statistics.queue),
            event::HINTING => self.hinting.as_ref().map(DiscardQueue::queue),
            _ => {
                let index = event.checked_sub(event::REPORTING)?;
                self.reporting.get(index as usize).map(DiscardQueue::queue)
            }
        }
    }

    /// Sets the timer to expire when the driver is to be asked next.
    fn restart_timer(&self) -> Result<(), WorkerError> {
        match &self.shared.schedule {
            Some(schedule) => lock(schedule).restart().map_err(WorkerError::Timer),
            None => Ok(()),
        }
    }

    fn serve(&mut self, event: u32) -> Result<(), WorkerError> {
        match event {
            event::INFLATE => self.inflate.serve(&self.link),
            event::DEFLATE => self.serve_deflate(),
            event::STATISTICS => self.take_statistics(),
            event::TIMER => {
                self.request_statistics();
                Ok(())
            }
            _ => {
                let queue = match event.checked_sub(event::REPORTING) {
                    Some(index) => self.reporting.get_mut(index as usize),
                    None => self.hinting.as_mut(),
                };
                queue.map_or(Ok(()), |queue| queue.serve(&self.link))
            }
        }
    }

    /// Acknowledges requests to deflate. The driver may take its pages back in any case.
    fn serve_deflate(&mut self) -> Result<(), WorkerError> {
        let metrics = &self.shared.metrics;
        self.deflate
            .serve(&mut self.deflate_chain, &self.link, |chain| {
                check_page_numbers(chain)?;
                metrics.deflate_count.add(1);
                Ok(0)
            })
    }

    /// Takes the statistics that the driver has sent, and keeps their buffer.
    fn take_statistics(&mut self) -> Result<(), WorkerError> {
        let Some(StatisticsQueue { queue, chain, held }) = &mut self.statistics else {
            return Ok(());
        };
        // A second buffer is an error, so this ends soon.
        while queue.pop(chain)? {
            let (head, writable) = (chain.head, chain.writable.len());
            if let Some(held) = *held {
                return Err(WorkerError::SecondStatistics { head, held });
            }
            if writable > 0 {
                return Err(WorkerError::Statistics { head, writable });
            }
            *lock(&self.shared.statistics) = GuestStatistics::read(&mut chain.readable);
            let metrics = &self.shared.metrics;
            metrics.stats_updates_count.add(1);
            if !chain.readable.is_empty() {
                metrics.stats_update_fails.add(1);
            }
            *held = Some(head);
        }
        if queue.enable_doorbell()? {
            queue.ring_doorbell();
        }
        Ok(())
    }

    /// Asks the driver for new statistics by returning its buffer. If the driver has its buffer already, it
    /// is about to send some.
    fn request_statistics(&mut self) {
        let Some(StatisticsQueue { queue, held, .. }) = &mut self.statistics else {
            return;
        };
        if let Some(head) = held.take() {
            queue.add_used(head, 0);
            queue.notify_driver(&self.link);
        }
    }

    fn register(&self, operations: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        let mut events = vec![
            event::INFLATE,
            event::DEFLATE,
            event::STATISTICS,
            event::HINTING,
        ];
        events.extend((event::REPORTING..).take(self.reporting.len()));
        for event in events {
            if let Some(queue) = self.queue(event) {
                operations.add(Events::with_data(queue, event, EventSet::IN))?;
            }
        }
        if let (Some(_), Some(schedule)) = (&self.statistics, &self.shared.schedule) {
            let timer = lock(schedule).timer.as_raw_fd();
            operations.add(Events::with_data_raw(timer, event::TIMER, EventSet::IN))?;
        }
        Ok(())
    }

    fn fail(&self, error: &dyn Display) {
        self.shared.metrics.event_fails.add(1);
        self.link.need_reset(error);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.has_driver.store(false, Ordering::Release);
    }
}

impl VirtioWorker for Worker {
    fn pause(&mut self) -> io::Result<()> {
        let discard_queues = [&mut self.inflate].into_iter();
        for queue in discard_queues
            .chain(&mut self.hinting)
            .chain(&mut self.reporting)
        {
            queue.put_back();
        }
        Ok(())
    }

    fn progress(&self) -> Vec<QueueProgress> {
        let discard_queues = [&self.inflate].into_iter();
        let queues = discard_queues
            .chain(&self.hinting)
            .chain(&self.reporting)
            .map(DiscardQueue::queue)
            .chain([&self.deflate]);
        let mut progress = progress_of(self.queue_count, queues);
        if let Some(StatisticsQueue { queue, held, .. }) = &self.statistics
            && let Some(progress) = progress.get_mut(usize::from(queue.index()))
        {
            *progress = queue.progress();
            // This worker goes on with the buffer that it holds. Another worker takes it again.
            if held.is_some() {
                progress.next_available = progress.next_available.wrapping_sub(1);
            }
        }
        progress
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        let hinting = lock(&self.shared.hinting).clone();
        Section::of(&BalloonState { hinting }).map(Some)
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        if let Err(error) = self.register(operations) {
            self.fail(&error);
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        let event = events.data();
        if let Some(queue) = self.queue(event) {
            queue.clear_doorbell();
        }
        // The timer must be silent until the next time too, whatever the outcome of this one.
        if event == event::TIMER
            && let Err(error) = self.restart_timer()
        {
            self.fail(&error);
            // Otherwise its event would be reported without end.
            let _ = operations.remove(events);
        }
        if self.link.needs_reset() {
            return;
        }
        if let Err(error) = self.serve(event) {
            self.fail(&error);
        }
    }
}
