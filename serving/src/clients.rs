//! Limits the number of connected clients. A client that the server waits for gives up its place to another,
//! so that no client keeps others out by doing nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{self, Duration, Instant};

use crate::lock::lock;

/// Minimum time that the server waits for a client before another may take its place, so that many clients
/// that come at once do not drive out each other, or those that are about to send something. New clients
/// wait until then to be accepted.
const GRACE_TIME: Duration = Duration::from_millis(50);

/// The places for clients, and the clients that have them.
pub struct Clients {
    places: Arc<Semaphore>,
    count: u32,
    waiting: Arc<Mutex<Waiting>>,
    /// Whether all clients are to leave.
    leaving: watch::Sender<bool>,
}

/// The clients that the server waits for: to send a request, or to take an answer.
#[derive(Default)]
struct Waiting {
    /// Ordered by when the server began to wait, with that time.
    clients: BTreeMap<u64, (Instant, Arc<Notify>)>,
    last: u64,
}

impl Clients {
    /// Creates places for `count` clients.
    pub fn new(count: usize) -> Clients {
        let count = u32::try_from(count.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        Clients {
            places: Arc::new(Semaphore::new(count as usize)),
            count,
            waiting: Arc::default(),
            leaving: watch::Sender::new(false),
        }
    }

    /// Asks all clients to leave, and waits until they have.
    pub async fn leave(&self) {
        self.leaving.send_replace(true);
        // This fails only for a closed semaphore, and this one is never closed.
        let _ = self.places.acquire_many(self.count).await;
    }

    /// Asks the client that the server has waited for longest to leave, as its descriptor is needed for
    /// another. Nothing happens if the server waits for no client, or not for long.
    pub fn make_room(&self) {
        let mut waiting = lock(&self.waiting);
        if let Some(longest) = waiting.clients.first_entry()
            && longest.get().0.elapsed() >= GRACE_TIME
        {
            longest.remove().1.notify_one();
        }
    }

    /// Returns a place for a new client. If all are taken, it is the place of the client that the server has
    /// waited for longest, or `None` if the server waits for no client.
    pub async fn place(&self) -> Option<Place> {
        let permit = loop {
            if let Ok(permit) = self.places.clone().try_acquire_owned() {
                break permit;
            }
            let since = lock(&self.waiting).clients.first_entry()?.get().0;
            if since.elapsed() < GRACE_TIME {
                time::sleep_until(since + GRACE_TIME).await;
                continue;
            }
            if let Some((_, (_, leave))) = lock(&self.waiting).clients.pop_first() {
                leave.notify_one();
            }
            // That client leaves at once, because it is doing nothing.
            break self.places.clone().acquire_owned().await.ok()?;
        };
        let place = Place {
            waiting: self.waiting.clone(),
            leave: Arc::new(Notify::new()),
            leaving: self.leaving.subscribe(),
            since: AtomicU64::new(0),
            _permit: permit,
        };
        place.wait_for_client();
        Some(place)
    }
}

/// A client's place, which is free again when this is dropped.
pub struct Place {
    waiting: Arc<Mutex<Waiting>>,
    leave: Arc<Notify>,
    leaving: watch::Receiver<bool>,
    /// Its number among those that are waited for, if it is one of them.
    since: AtomicU64,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Notes that the server waits for the client from now on.
    pub fn wait_for_client(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.last += 1;
        let number = waiting.last;
        let since = Instant::now();
        waiting.clients.insert(number, (since, self.leave.clone()));
        let before = self.since.swap(number, Ordering::Relaxed);
        waiting.clients.remove(&before);
    }

    /// Notes that the client waits for the server from now on.
    pub fn work(&self) {
        let number = self.since.load(Ordering::Relaxed);
        lock(&self.waiting).clients.remove(&number);
    }

    /// Waits until all clients are asked to leave as soon as their requests are answered.
    pub async fn leaving(&self) {
        // This fails when there are no clients any more.
        let _ = self.leaving.clone().wait_for(|leaving| *leaving).await;
    }

    /// Waits until the place is needed for another client.
    pub async fn needed(&self) {
        self.leave.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.work();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    async fn is_needed(place: &Place) -> bool {
        timeout(Duration::ZERO, place.needed()).await.is_ok()
    }

    #[tokio::test]
    async fn who_is_waited_for_longest_gives_the_place_to_another() {
        let clients = Clients::new(3);
        let first = clients.place().await.unwrap();
        let second = clients.place().await.unwrap();
        let third = clients.place().await.unwrap();
        // The first has been waited for less long than the others.
        first.work();
        first.wait_for_client();
        let leaving = async {
            second.needed().await;
            drop(second);
        };
        let ((), fourth) = tokio::join!(leaving, clients.place());
        assert!(fourth.is_some());
        assert!(!is_needed(&first).await && !is_needed(&third).await);
    }

    #[tokio::test]
    async fn who_is_waited_for_longest_makes_room() {
        let clients = Clients::new(2);
        let idle = clients.place().await.unwrap();
        let served = clients.place().await.unwrap();
        served.work();
        clients.make_room();
        assert!(!is_needed(&idle).await, "it has come just now");
        time::sleep(GRACE_TIME).await;
        clients.make_room();
        assert!(is_needed(&idle).await);
        clients.make_room();
        assert!(!is_needed(&served).await);
    }

    #[tokio::test]
    async fn all_leave_before_the_end() {
        let clients = Clients::new(3);
        let [first, second] = [
            clients.place().await.unwrap(),
            clients.place().await.unwrap(),
        ];
        assert!(timeout(Duration::ZERO, first.leaving()).await.is_err());
        let leaving = async {
            first.leaving().await;
            drop(first);
            second.leaving().await;
            drop(second);
        };
        tokio::join!(leaving, clients.leave());
    }

    #[tokio::test]
    async fn who_waits_for_the_server_keeps_the_place() {
        let clients = Clients::new(1);
        let first = clients.place().await.unwrap();
        first.work();
        assert!(clients.place().await.is_none());
        assert!(!is_needed(&first).await);
        drop(first);
        assert!(clients.place().await.is_some());
    }
}
