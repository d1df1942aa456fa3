//! What is set up at the first boot, as options say it.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::key::PublicKey;
use crate::user_data::UserData;

/// The longest user name in bytes, as useradd has it.
const MAX_USER_NAME: usize = 32;

/// The longest password in bytes, as PAM has it.
const MAX_PASSWORD: usize = 512;

/// The name of a user of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName(String);

impl FromStr for UserName {
    type Err = Error;

    fn from_str(name: &str) -> Result<UserName, Error> {
        let is_start = |c: char| c.is_ascii_lowercase() || c == '_';
        let is_allowed = |c: char| is_start(c) || c.is_ascii_digit() || c == '-';
        if name.len() > MAX_USER_NAME
            || !name.starts_with(is_start)
            || !name.chars().all(is_allowed)
        {
            return Err(Error::UserName {
                name: name.chars().take(MAX_USER_NAME).collect(),
            });
        }
        Ok(UserName(name.to_owned()))
    }
}

/// A password, or its hash as crypt(3) makes it. Debug output does not show it.
#[derive(Clone, PartialEq, Eq)]
pub enum Password {
    /// The password.
    Plain(String),
    /// Its hash: `$`, the method, `$` and the rest.
    Hashed(String),
}

impl Password {
    /// Reads the first line of a file, which has no other: a hash if it looks like one, and else a password.
    ///
    /// # Errors
    /// If the line is empty or too long, or there are more.
    pub fn parse_file(text: &str) -> Result<Password, Error> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        let line = line.strip_suffix('\r').unwrap_or(line);
        let reason = match line {
            "" => Some("empty"),
            _ if line.len() > MAX_PASSWORD => Some("longer than 512 bytes"),
            _ if line.contains(['\n', '\r', '\0']) => Some("more than one line"),
            _ => None,
        };
        match reason {
            Some(reason) => Err(Error::Password { reason }),
            None if is_hash(line) => Ok(Password::Hashed(line.to_owned())),
            None => Ok(Password::Plain(line.to_owned())),
        }
    }
}

impl Password {
    /// Whether cloud-init tells by itself whether this is a password or a hash, as it has to for a user whose name is not given.
    fn is_understood(&self) -> bool {
        match self {
            Password::Plain(text) => {
                // The words stand for a random password.
                !text.starts_with('$') && !["R", "RANDOM"].contains(&text.as_str())
            }
            Password::Hashed(hash) => {
                let known = ["$1$", "$2a$", "$2y$", "$5$", "$6$"];
                known.iter().any(|start| hash.starts_with(start))
            }
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Password::Plain(_) => "Plain",
            Password::Hashed(_) => "Hashed",
        })
    }
}

/// Whether a text is `$METHOD$SALT$HASH`, with parameters before the salt for some methods.
fn is_hash(text: &str) -> bool {
    let mut parts = text.split('$');
    let is_word = |part: &str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '=' | ',');
        !part.is_empty() && part.chars().all(is_allowed)
    };
    let method = match (parts.next(), parts.next()) {
        (Some(""), Some(method)) => method,
        _ => return false,
    };
    let is_method = ["1", "2a", "2b", "2y", "5", "6", "7", "y", "gy"].contains(&method);
    let rest: Vec<_> = parts.collect();
    is_method && (1..=3).contains(&rest.len()) && rest.into_iter().all(is_word)
}

/// What is set up at the first boot of a guest. What is not given stays as the image has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirstBoot {
    /// Another name for the user that the distribution makes, with its groups and its right to use sudo.
    pub user: Option<UserName>,
    /// Keys by which that user logs in over SSH.
    pub ssh_keys: Vec<PublicKey>,
    /// The password of that user.
    pub password: Option<Password>,
    /// Packages to install.
    pub packages: Vec<String>,
    /// Commands for the shell, which are executed at the end, as root and in this order.
    pub commands: Vec<String>,
}

impl FirstBoot {
    /// Makes user data of it: `#cloud-config` in JSON, which is YAML, so there is nothing in a text that could be taken for
    /// something else.
    ///
    /// # Errors
    /// If cloud-init would take the password for a hash, or the other way round.
    pub fn to_user_data(&self) -> Result<UserData, Error> {
        let mut config = Map::new();
        let mut add = |key: &str, value: Value| {
            config.insert(key.to_owned(), value);
        };
        match (&self.user, &self.password) {
            // What is said here of the user goes before what the distribution says.
            (Some(UserName(name)), None) => add("user", json!({ "name": name })),
            (Some(UserName(name)), Some(password)) => {
                let (key, value) = match password {
                    Password::Plain(text) => ("plain_text_passwd", text),
                    Password::Hashed(text) => ("hashed_passwd", text),
                };
                add(
                    "user",
                    json!({ "name": name, "lock_passwd": false, key: value }),
                );
            }
            (None, Some(password)) if !password.is_understood() => {
                return Err(Error::Ambiguous);
            }
            (None, Some(Password::Plain(text) | Password::Hashed(text))) => {
                add("password", json!(text));
                add("chpasswd", json!({ "expire": false }));
            }
            (None, None) => {}
        }
        if !self.ssh_keys.is_empty() {
            let keys: Vec<_> = self.ssh_keys.iter().map(PublicKey::as_str).collect();
            add("ssh_authorized_keys", json!(keys));
        }
        if !self.packages.is_empty() {
            add("package_update", json!(true));
            add("packages", json!(self.packages));
        }
        if !self.commands.is_empty() {
            add("runcmd", json!(self.commands));
        }
        let text = format!("#cloud-config\n{}\n", Value::from(config));
        Ok(UserData::generated(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_of(boot: &FirstBoot) -> Value {
        let data = boot.to_user_data().unwrap();
        // What is generated would be taken if it were given.
        UserData::new("it", data.as_bytes().to_vec()).unwrap();
        let text = data.as_cloud_config().unwrap();
        serde_json::from_str(text.strip_prefix("#cloud-config\n").unwrap()).unwrap()
    }

    #[test]
    fn options_become_a_cloud_config() {
        let key =
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB5MFlRbGeGhoBxV6H7u0ND0PVLPfWA4nYgEZTlxwWtG";
        let boot = FirstBoot {
            user: Some("ada".parse().unwrap()),
            ssh_keys: PublicKey::parse_file(key).unwrap(),
            password: Some(Password::parse_file("a \"b\": c\n").unwrap()),
            packages: vec!["nginx".to_owned()],
            commands: vec!["echo 'a: b' > /x".to_owned()],
        };
        assert_eq!(
            config_of(&boot),
            json!({
                "user": { "name": "ada", "plain_text_passwd": "a \"b\": c", "lock_passwd": false },
                "ssh_authorized_keys": [key],
                "package_update": true,
                "packages": ["nginx"],
                "runcmd": ["echo 'a: b' > /x"],
            })
        );
        assert_eq!(config_of(&FirstBoot::default()), json!({}));
    }

    #[test]
    fn a_hash_is_told_from_a_password() {
        let hash = "$6$saltsalt$abcdefgh/ABC.";
        for text in [hash, "$y$j9T$abc$def", "$5$rounds=5000$a$b"] {
            let password = Password::parse_file(text).unwrap();
            assert_eq!(password, Password::Hashed(text.to_owned()));
        }
        for text in ["secret", "$6$", "$100$ is much", "a$6$b$c", "$6$a b$c"] {
            let password = Password::parse_file(text).unwrap();
            assert_eq!(password, Password::Plain(text.to_owned()));
        }
        let boot = FirstBoot {
            user: Some("ada".parse().unwrap()),
            password: Some(Password::Hashed(hash.to_owned())),
            ..FirstBoot::default()
        };
        assert_eq!(config_of(&boot)["user"]["hashed_passwd"], hash);
        assert!(!format!("{boot:?}").contains(hash));
    }

    #[test]
    fn the_user_of_the_distribution_has_a_password_or_a_hash_that_cloud_init_knows() {
        let of = |text: &str| FirstBoot {
            password: Some(Password::parse_file(text).unwrap()),
            ..FirstBoot::default()
        };
        for text in ["secret", "$6$saltsalt$abcdefgh"] {
            let expected = json!({ "password": text, "chpasswd": { "expire": false } });
            assert_eq!(config_of(&of(text)), expected);
        }
        for text in ["$y$j9T$abc$def", "$6$a b$c", "RANDOM"] {
            let error = of(text).to_user_data().unwrap_err();
            assert!(error.to_string().contains("--user"), "{error}");
        }
    }

    #[test]
    fn passwords_and_user_names_are_checked() {
        for text in ["", "\n", "a\nb", "a\n\n", &"x".repeat(513)] {
            assert!(Password::parse_file(text).is_err(), "{text:?}");
        }
        for name in ["", "Ada", "1a", "a b", "-a", "é", &"a".repeat(33)] {
            assert!(name.parse::<UserName>().is_err(), "{name}");
        }
        for name in ["ada", "_a", "a-1_b"] {
            assert!(name.parse::<UserName>().is_ok(), "{name}");
        }
    }
}
