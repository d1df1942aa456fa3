//! Random bytes of the host.

use crate::error::Error;

/// Returns random bytes that can be used as a seed or an identity.
///
/// # Errors
/// If the host provides none.
pub(crate) fn random<const SIZE: usize>() -> Result<[u8; SIZE], Error> {
    let mut bytes = [0; SIZE];
    getrandom::fill(&mut bytes).map_err(|source| Error::RandomSeed(source.into()))?;
    Ok(bytes)
}
