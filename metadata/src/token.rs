//! Session tokens.
//!
//! A token contains its expiry and an authentication code that only its issuer can verify. So the
//! issuer keeps no record of tokens, and a guest may ask for any number of them.

use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How long a token may be valid, in seconds.
pub(crate) const LIFETIMES: RangeInclusive<u32> = 1..=21_600;

/// The parts of a token, in bytes.
const EXPIRY_SIZE: usize = 8;
const SERIAL_SIZE: usize = 8;
const CODE_SIZE: usize = 32;
const SIZE: usize = EXPIRY_SIZE + SERIAL_SIZE + CODE_SIZE;

/// Issues tokens and verifies its own.
pub(crate) struct TokenAuthority {
    /// HMAC-SHA-256 (RFC 2104) with a secret key.
    code: Hmac<Sha256>,
    /// Expiry is relative to this time.
    start: Instant,
    /// Number of the next token, so that no two are equal.
    serial: AtomicU64,
}

impl TokenAuthority {
    /// Makes an authority with a new key.
    ///
    /// # Errors
    /// If the host provides no random numbers.
    pub(crate) fn new(start: Instant) -> io::Result<TokenAuthority> {
        let mut key = [0; 64];
        getrandom::fill(&mut key)?;
        Ok(TokenAuthority {
            code: Hmac::new(&key.into()),
            start,
            serial: AtomicU64::new(0),
        })
    }

    /// Issues a token that is valid for `lifetime` seconds from `now`; `None` if that is out of
    /// bounds.
    pub(crate) fn issue(&self, lifetime: u32, now: Instant) -> Option<String> {
        if !LIFETIMES.contains(&lifetime) {
            return None;
        }
        let expiry = self.age(now) + Duration::from_secs(lifetime.into());
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut token = Vec::with_capacity(SIZE);
        token.extend((expiry.as_millis() as u64).to_le_bytes());
        token.extend(serial.to_le_bytes());
        let code = self.code.clone().chain_update(&token).finalize();
        token.extend(code.into_bytes());
        Some(URL_SAFE_NO_PAD.encode(token))
    }

    /// Returns whether `token` was issued here and has not expired by `now`.
    pub(crate) fn is_valid(&self, token: &[u8], now: Instant) -> bool {
        // One byte more than a token can have, as the decoder requires room for whole groups.
        let mut bytes = [0; SIZE + 3];
        let Ok(size) = URL_SAFE_NO_PAD.decode_slice(token, &mut bytes) else {
            return false;
        };
        let Some((claims, code)) = bytes[..size].split_at_checked(EXPIRY_SIZE + SERIAL_SIZE) else {
            return false;
        };
        // This takes the same time for an almost correct code as for any other.
        let genuine = self.code.clone().chain_update(claims).verify_slice(code);
        let expiry = claims.first_chunk().copied().map(u64::from_le_bytes);
        genuine.is_ok()
            && expiry.is_some_and(|expiry| u128::from(expiry) > self.age(now).as_millis())
    }

    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn authority() -> (TokenAuthority, Instant) {
        let start = Instant::now();
        (TokenAuthority::new(start).unwrap(), start)
    }

    #[test]
    fn a_token_is_valid_until_it_expires() {
        let (authority, start) = authority();
        let issued = start + Duration::from_secs(100);
        for lifetime in [1, 60, 21_600] {
            let token = authority.issue(lifetime, issued).unwrap();
            assert_eq!(token.len(), 64);
            let end = issued + Duration::from_secs(lifetime.into());
            let moment = Duration::from_millis(1);
            assert!(authority.is_valid(token.as_bytes(), issued));
            assert!(authority.is_valid(token.as_bytes(), end - moment));
            assert!(!authority.is_valid(token.as_bytes(), end));
        }
        assert_eq!(authority.issue(0, issued), None);
        assert_eq!(authority.issue(21_601, issued), None);
    }

    #[test]
    fn a_token_of_another_machine_is_not_valid() {
        let (first, now) = authority();
        let (second, _) = authority();
        let token = first.issue(60, now).unwrap();
        assert!(!second.is_valid(token.as_bytes(), now));
    }

    #[test]
    fn no_token_is_issued_twice() {
        let (authority, now) = authority();
        let tokens = (0..1000).map(|_| authority.issue(60, now).unwrap());
        assert_eq!(tokens.collect::<HashSet<_>>().len(), 1000);
    }

    #[test]
    fn a_token_that_was_changed_is_not_valid() {
        let (authority, now) = authority();
        let token = authority.issue(60, now).unwrap();
        let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
        for bit in 0..SIZE * 8 {
            let mut forged = bytes.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            let forged = URL_SAFE_NO_PAD.encode(forged);
            assert!(!authority.is_valid(forged.as_bytes(), now), "bit {bit}");
        }
        for length in 0..token.len() {
            assert!(!authority.is_valid(&token.as_bytes()[..length], now));
        }
        for suffix in ["A", "AA", "AAAA", "=", " "] {
            assert!(!authority.is_valid(format!("{token}{suffix}").as_bytes(), now));
        }
        // A truncated code is not valid, even if its beginning is correct.
        let cut = URL_SAFE_NO_PAD.encode(&bytes[..SIZE - 1]);
        assert!(!authority.is_valid(cut.as_bytes(), now));
        let claims = URL_SAFE_NO_PAD.encode(&bytes[..EXPIRY_SIZE + SERIAL_SIZE]);
        assert!(!authority.is_valid(claims.as_bytes(), now));
    }

    proptest! {
        #[test]
        fn no_bytes_are_taken_for_a_token(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let (authority, now) = authority();
            prop_assert!(!authority.is_valid(&bytes, now));
            let encoded = URL_SAFE_NO_PAD.encode(&bytes);
            prop_assert!(!authority.is_valid(encoded.as_bytes(), now));
        }
    }
}
