//! Reads the tables of an image as they are needed.
//!
//! A header can claim tables of any size, so they are never read whole: entries come from pages of the
//! file in a cache of fixed size.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::damaged;
use crate::ImageFile;

const PAGE: u64 = 4096;
const PAGES: u64 = 64;

/// The tables of an image, in its file.
#[derive(Debug)]
pub struct Tables {
    file: Arc<dyn ImageFile>,
    file_size: u64,
    /// A page of the file has one slot where it can be.
    slots: Mutex<Vec<Option<Page>>>,
}

#[derive(Debug)]
struct Page {
    number: u64,
    bytes: Box<[u8]>,
}

impl Tables {
    /// Reads the tables in `file`, which has `file_size` bytes.
    pub fn new(file: Arc<dyn ImageFile>, file_size: u64) -> Tables {
        Tables {
            file,
            file_size,
            slots: Mutex::new((0..PAGES).map(|_| None).collect()),
        }
    }

    /// Returns the `N` bytes from `offset` on. Entries do not cross pages if `offset` is a multiple of
    /// `N`, which divides a page; others are read from the file.
    pub fn entry<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let size = N as u64;
        match offset.checked_add(size) {
            Some(end) if end <= self.file_size => {}
            _ => return Err(damaged("a table ends beyond the end of the file")),
        }
        let mut entry = [0; N];
        let within = offset % PAGE;
        if within + size > PAGE {
            self.file.read_at(&mut entry, offset)?;
            return Ok(entry);
        }
        let number = offset / PAGE;
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut slots[(number % PAGES) as usize];
        let page = match slot {
            Some(page) if page.number == number => page,
            _ => {
                let mut bytes = vec![0; PAGE as usize].into_boxed_slice();
                self.file.read_at(&mut bytes, number * PAGE)?;
                slot.insert(Page { number, bytes })
            }
        };
        let within = within as usize;
        entry.copy_from_slice(&page.bytes[within..within + N]);
        Ok(entry)
    }
}
