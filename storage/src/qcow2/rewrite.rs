//! Changes of the header of an existing image that are more than a change of one field.

use super::Qcow2;
use super::error::Error;
use super::header::{
    BackingName, EXTENSION_BACKING_FORMAT, EXTENSION_END, EXTENSION_FEATURES, Header, LENGTH,
    LENGTH_2, MAX_BACKING_NAME, be32, be64, put_extension,
};
use super::locks::lock;

/// A crash leaves a sector with its old bytes or its new ones.
const SECTOR: usize = 512;

impl Qcow2 {
    /// Has the header name another backing file, or none, on stable storage. What is open stays as it is. The caller
    /// has locked the layout.
    ///
    /// # Errors
    /// If the name is too long for the first cluster, or the host cannot write.
    pub(super) fn change_backing_name(&self, name: Option<BackingName>) -> Result<(), Error> {
        self.rewrite_header(|header| header.backing = name)
    }

    /// Changes the header by `change`, on stable storage. Only the version, the features, the width of refcounts and
    /// the backing file can be different afterwards. The caller has locked the layout.
    ///
    /// # Errors
    /// If the header does not fit into the first cluster, or the host cannot write.
    pub(super) fn rewrite_header(&self, change: impl FnOnce(&mut Header)) -> Result<(), Error> {
        let failed = || Error::io("write the header of the image");
        // It writes a field of the header too.
        let _allocator = lock(&self.allocator);
        let mut header = lock(&self.header);
        let mut new = header.clone();
        change(&mut new);
        let mut old = vec![0; 1 << header.cluster_bits];
        self.file
            .read_at(&mut old, 0)
            .map_err(Error::io("read the header of the image"))?;
        let Rewritten { sector, name } = rewrite(&old, &new)?;
        if let Some((offset, name)) = name {
            // Nothing refers to this place yet.
            let written = self.file.write_at(&name, offset);
            written.and_then(|()| self.gate.sync()).map_err(failed())?;
        }
        if let Err(error) = self.file.write_at(&sector, 0) {
            // The header may be the old one or the new one.
            self.gate.fail();
            return Err(failed()(error));
        }
        *header = new;
        drop(header);
        self.gate.sync().map_err(failed())
    }
}

/// The bytes of a header that takes the place of another.
struct Rewritten {
    /// The first sector of the file.
    sector: Vec<u8>,
    /// The name of the backing file and its offset, if it is not in that sector.
    name: Option<(u64, Vec<u8>)>,
}

/// Returns the bytes that make a header `new` of the one that is in the first cluster `old`.
///
/// All of it but a long name is in the first sector, so that it changes at one moment. The table of the names of
/// features is left out for this reason. It only serves readers that do not know a feature.
fn rewrite(old: &[u8], new: &Header) -> Result<Rewritten, Error> {
    let old_length = match be32(old, 4) {
        2 => LENGTH_2,
        _ => be32(old, 100) as usize,
    };
    let old_name = be64(old, 8) as usize..be64(old, 8) as usize + be32(old, 16) as usize;
    let extensions_end = match old_name.start {
        0 => old.len(),
        start => start.min(old.len()),
    };
    let (extensions, old_end) = other_extensions(&old[..extensions_end], old_length);

    let mut sector = old[..old_length].to_vec();
    let new_length = match new.version {
        2 => LENGTH_2,
        _ => old_length.max(LENGTH),
    };
    sector.resize(new_length, 0);
    if new.version > 2 && old_length == LENGTH_2 {
        // The rest is what these bytes mean in version 2.
        sector[LENGTH_2..].fill(0);
    }
    sector[4..8].copy_from_slice(&new.version.to_be_bytes());
    sector[8..20].fill(0);
    if new.version > 2 {
        for (offset, features) in [
            (72, new.incompatible),
            (80, new.compatible),
            (88, new.autoclear),
        ] {
            sector[offset..offset + 8].copy_from_slice(&features.to_be_bytes());
        }
        sector[96..100].copy_from_slice(&new.refcount_order.to_be_bytes());
        sector[100..104].copy_from_slice(&(new_length as u32).to_be_bytes());
    }
    if let Some(format) = new.backing.as_ref().and_then(|it| it.format.as_ref()) {
        put_extension(&mut sector, EXTENSION_BACKING_FORMAT, format.as_bytes());
    }
    for (kind, data) in extensions {
        put_extension(&mut sector, kind, data);
    }
    put_extension(&mut sector, EXTENSION_END, &[]);
    let too_large = || {
        let error = "the name of the backing file does not fit into the first cluster";
        Error::Option(error.to_owned())
    };
    let mut elsewhere = None;
    if let Some(backing) = &new.backing {
        let name = backing.name.as_bytes();
        if name.len() > MAX_BACKING_NAME as usize || name.contains(&0) {
            let error = "the name of the backing file is too long";
            return Err(Error::Option(error.to_owned()));
        }
        let mut offset = sector.len();
        if offset + name.len() <= SECTOR {
            sector.extend_from_slice(name);
        } else {
            // Behind the old header, or between it and the old name.
            offset = [SECTOR, old_end.max(SECTOR), old_name.end.max(SECTOR)]
                .into_iter()
                .map(|offset| offset.next_multiple_of(8))
                .find(|&offset| {
                    let overlaps = |start, end| offset < end && start < offset + name.len();
                    offset + name.len() <= old.len()
                        && !overlaps(0, old_end)
                        && !overlaps(old_name.start, old_name.end)
                })
                .ok_or_else(too_large)?;
            elsewhere = Some((offset as u64, name.to_vec()));
        }
        sector[8..16].copy_from_slice(&(offset as u64).to_be_bytes());
        sector[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    }
    if sector.len() > SECTOR {
        let error = "the extensions of the header do not fit into a sector";
        return Err(Error::NotPossible(error.to_owned()));
    }
    sector.resize(SECTOR, 0);
    Ok(Rewritten {
        sector,
        name: elsewhere,
    })
}

/// Returns the extensions from `start` on that are kept as they are, and where the extensions end. The bytes have been
/// read as a header before.
fn other_extensions(bytes: &[u8], start: usize) -> (Vec<(u32, &[u8])>, usize) {
    let mut extensions = Vec::new();
    let mut next = start;
    while let Some(head) = bytes.get(next..next + 8) {
        let (kind, length) = (be32(head, 0), be32(head, 4) as usize);
        if kind == EXTENSION_END {
            return (extensions, next + 8);
        }
        let Some(data) = bytes.get(next + 8..next + 8 + length) else {
            break;
        };
        if kind != EXTENSION_BACKING_FORMAT && kind != EXTENSION_FEATURES {
            extensions.push((kind, data));
        }
        next += 8 + length.next_multiple_of(8);
    }
    (extensions, bytes.len())
}
