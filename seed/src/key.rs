//! SSH public keys.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::error::Error;

/// What begins the names of the types of keys.
const TYPES: &[&str] = &["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-"];

/// What the names of the types of certificates contain, which are not keys.
const CERTIFICATE: &str = "-cert-v";

/// The longest line with a key in bytes.
const MAX_LEN: usize = 16 << 10;

/// A public key of OpenSSH: its type, the key and a comment, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(String);

impl PublicKey {
    /// Reads the keys of a file: one, or one in each line.
    ///
    /// # Errors
    /// If there is none, or something else; above all if it is a private key.
    pub fn parse_file(text: &str) -> Result<Vec<PublicKey>, Error> {
        if text.contains("PRIVATE KEY") {
            return Err(wrong(
                "this is a private key, which must not leave its host",
            ));
        }
        let lines = text.lines().map(str::trim);
        let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Vec<_> = keys.map(PublicKey::parse).collect::<Result<_, _>>()?;
        match keys.is_empty() {
            true => Err(wrong("there is no SSH public key")),
            false => Ok(keys),
        }
    }

    fn parse(line: &str) -> Result<PublicKey, Error> {
        let mut words = line.split_ascii_whitespace();
        let (Some(kind), Some(data)) = (words.next(), words.next()) else {
            return Err(wrong("this is not an SSH public key"));
        };
        if kind.contains(CERTIFICATE) {
            return Err(wrong("this is a certificate and not an SSH public key"));
        }
        let has_type = TYPES.iter().any(|start| kind.starts_with(start));
        if line.len() > MAX_LEN || line.contains(char::is_control) || !has_type {
            return Err(wrong("this is not an SSH public key"));
        }
        match STANDARD.decode(data).is_ok_and(|key| is_whole(kind, &key)) {
            true => Ok(PublicKey(line.to_owned())),
            false => Err(wrong(&format!(
                "the SSH public key of type {kind} is damaged"
            ))),
        }
    }

    /// Returns the line.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a key consists of its type and other fields, each after its length in four bytes (RFC 4253, section 6.6).
fn is_whole(kind: &str, key: &[u8]) -> bool {
    let mut rest = key;
    let mut fields = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some((field, after)) = after.split_at_checked(length) else {
            return false;
        };
        fields.push(field);
        rest = after;
    }
    rest.is_empty() && fields.len() > 1 && fields[0] == kind.as_bytes()
}

fn wrong(reason: &str) -> Error {
    Error::Key {
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB5MFlRbGeGhoBxV6H7u0ND0PVLPfWA4nYgEZTlxwWtG me@host";

    #[test]
    fn keys_are_read_one_in_each_line() {
        let text = format!("# mine\n{KEY}\r\n\n  {KEY}\n");
        let keys = PublicKey::parse_file(&text).unwrap();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[0].as_str(), KEY);
    }

    #[test]
    fn what_is_not_a_public_key_is_refused() {
        let private =
            "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----\n";
        let cut = &KEY[..40];
        let other_type = KEY.replace("ssh-ed25519", "ssh-rsa");
        for (text, part) in [
            (private, "private key"),
            ("", "no SSH public key"),
            ("hello", "not an SSH public key"),
            ("hello world", "not an SSH public key"),
            (cut, "damaged"),
            (&other_type, "damaged"),
            ("ssh-ed25519-cert-v01@openssh.com AAAA", "certificate"),
        ] {
            let error = PublicKey::parse_file(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*", data in "[A-Za-z0-9+/=]{0,40}") {
            let _ = PublicKey::parse_file(&text);
            let _ = PublicKey::parse_file(&format!("ssh-rsa {data}"));
        }
    }
}
