//! The data that the Linux agent's random work leaves on a disk.

// The workload looks for it beside itself.
use crate::pattern::agent as pattern;

#[allow(dead_code, missing_docs)]
#[path = "../agent/src/workload.rs"]
mod agent;

use agent::{AREAS, Area};

/// Returns the content of a disk of `size` bytes, in blocks of `block_size`, that held the pattern
/// of `seed` before the agent's command `disk-verify-random` with this seed and number of
/// `operations`.
pub fn after_random_work(seed: u64, operations: u32, block_size: usize, size: usize) -> Vec<u8> {
    let mut content = crate::pattern(seed, 0, size);
    for number in 0..AREAS {
        let mut area = Area::new(number, size as u64, block_size, seed);
        for _ in 0..operations {
            area.next_step();
        }
        let start = area.start() as usize;
        area.fill(area.start(), &mut content[start..start + area.size()]);
    }
    content
}
