//! Swap areas: the UUID is in the header. Layout: `union swap_header` in the kernel's include/linux/swap.h.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Identity, read_at};
use crate::identifiers::uuid_text;

const PAGE: usize = 4096;
const SIGNATURE: &[u8; 10] = b"SWAPSPACE2";
/// What takes the place of the signature while a system is hibernated.
const HIBERNATED: &[u8; 10] = b"S1SUSPEND\0";
const UUID: u64 = 1024 + 12;

pub(super) fn is_swap(head: &[u8]) -> bool {
    let end = head[..PAGE].last_chunk();
    end == Some(SIGNATURE) || end == Some(HIBERNATED)
}

pub(super) fn identity(device: &File) -> io::Result<Identity> {
    let uuid: [u8; 16] = read_at(device, UUID)?;
    let id = uuid_text(&uuid);
    let signature: [u8; 10] = read_at(device, (PAGE - SIGNATURE.len()) as u64)?;
    Ok(if signature == *HIBERNATED {
        Identity::Fixed {
            id: Some(id),
            reason: "a system is hibernated in it; start that and shut it down first".to_owned(),
        }
    } else if uuid == [0; 16] {
        Identity::None
    } else {
        Identity::Changeable { id }
    })
}

pub(super) fn change(device: &File, new: &[u8; 16]) -> io::Result<()> {
    device.write_all_at(new, UUID)
}
