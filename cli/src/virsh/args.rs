//! virsh's command lines: options that may be given by name or by place, and several commands in one argument.

use anyhow::{anyhow, bail};
use bantam_libvirt::unit_factor;

use super::commands::Command;

/// An option of a command.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// Its name, without dashes.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
}

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: it is given or not.
    Flag,
    /// A value, by name or by place, without which there is no command.
    Needed,
    /// A value, by name or by place.
    Value,
    /// A value, by name only.
    Named,
    /// All values that are left.
    Rest,
}

/// What was given to a command.
#[derive(Debug, Default)]
pub struct Arguments {
    given: Vec<(&'static str, String)>,
}

impl Arguments {
    /// Reads the words after the name of a command. The errors are virsh's own.
    ///
    /// # Errors
    /// If they are not options of the command, or one that it needs is not there.
    pub fn parse(command: &Command, words: &[String]) -> anyhow::Result<Arguments> {
        let mut arguments = Arguments::default();
        let mut words = words.iter();
        let mut only_values = false;
        while let Some(word) = words.next() {
            if word == "--" && !only_values {
                only_values = true;
                continue;
            }
            match word.strip_prefix("--").filter(|_| !only_values) {
                Some(option) => {
                    let (option, value) = match option.split_once('=') {
                        Some((option, value)) => (option, Some(value)),
                        None => (option, None),
                    };
                    let Some(found) = command.options.iter().find(|it| it.name == option) else {
                        bail!(
                            "command '{}' doesn't support option --{option}",
                            command.name
                        );
                    };
                    if found.kind != Kind::Rest && arguments.has(found.name) {
                        bail!("option --{option} already seen");
                    }
                    let value = match (found.kind, value) {
                        (Kind::Flag, Some(_)) => bail!("invalid '=' after option --{option}"),
                        (Kind::Flag, None) => String::new(),
                        (_, Some(value)) => value.to_owned(),
                        (_, None) => words
                            .next()
                            .cloned()
                            .ok_or_else(|| anyhow!("expected syntax: --{option} <string>"))?,
                    };
                    arguments.given.push((found.name, value));
                }
                None => {
                    let next = command.options.iter().find(|it| match it.kind {
                        Kind::Needed | Kind::Value => !arguments.has(it.name),
                        Kind::Rest => true,
                        Kind::Flag | Kind::Named => false,
                    });
                    let next = next.ok_or_else(|| anyhow!("unexpected data '{word}'"))?;
                    arguments.given.push((next.name, word.clone()));
                }
            }
        }
        let missing = |it: &&Opt| it.kind == Kind::Needed && !arguments.has(it.name);
        if let Some(missing) = command.options.iter().find(missing) {
            bail!(
                "command '{}' requires <{}> option",
                command.name,
                missing.name
            );
        }
        Ok(arguments)
    }

    /// Whether the option was given.
    pub fn has(&self, name: &str) -> bool {
        self.given.iter().any(|(given, _)| *given == name)
    }

    /// Returns the value of an option, if it was given.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values(name).next()
    }

    /// Returns the value of an option that the command needs.
    ///
    /// # Errors
    /// If it was not given.
    pub fn needed(&self, name: &str) -> anyhow::Result<&str> {
        let value = self.value(name);
        value.ok_or_else(|| anyhow!("missing option --{name}"))
    }

    /// Returns all values of an option.
    pub fn values<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        let found = self.given.iter().filter(move |(given, _)| *given == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Splits an argument that is a script into commands, each of them words: separated by spaces, by `;` and by ends of lines,
/// with quotes as in a shell.
///
/// # Errors
/// If a quote does not end.
pub fn split_script(script: &str) -> anyhow::Result<Vec<Vec<String>>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = script.chars();
    let end_word = |word: &mut Option<String>, commands: &mut Vec<Vec<String>>| {
        if let (Some(word), Some(command)) = (word.take(), commands.last_mut()) {
            command.push(word);
        }
    };
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => {
                let Some(escaped) = characters.next() else {
                    bail!("dangling \\");
                };
                word.get_or_insert_default().push(escaped);
            }
            (None, ';' | '\n') => {
                end_word(&mut word, &mut commands);
                commands.push(Vec::new());
            }
            (None, _) if character.is_whitespace() => end_word(&mut word, &mut commands),
            _ => word.get_or_insert_default().push(character),
        }
    }
    if let Some(open) = quote {
        bail!("missing {open}");
    }
    end_word(&mut word, &mut commands);
    commands.retain(|command| !command.is_empty());
    Ok(commands)
}

/// Reads a size with virsh's units, and returns bytes: a number alone counts `unit` bytes, `k` and `KiB` are 1024, `KB` is
/// 1000, and so on.
///
/// # Errors
/// If it is not a size, or too large. `option` is the one that it was given to.
pub fn scaled(text: &str, unit: u64, option: &str) -> anyhow::Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => Some(unit),
        suffix => unit_factor(suffix),
    };
    let number = digits.parse::<u64>().ok();
    let size = number.and_then(|number| number.checked_mul(factor?));
    size.ok_or_else(|| {
        anyhow!("Scaled numeric value '{text}' for <{option}> option is malformed or out of range")
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::commands::find;
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        let words = split_script(line).unwrap().remove(0);
        let command = find(&words[0]).unwrap();
        Arguments::parse(command, &words[1..]).map_err(|error| error.to_string())
    }

    #[test]
    fn options_are_given_by_name_or_by_place() {
        for line in [
            "setmem web 512M --live",
            "setmem --domain web --size 512M --live",
            "setmem --size=512M --live web",
            "setmem --live --domain=web -- 512M",
        ] {
            let arguments = parse(line).unwrap();
            assert_eq!(arguments.value("domain"), Some("web"), "{line}");
            assert_eq!(arguments.value("size"), Some("512M"), "{line}");
            assert!(arguments.has("live"), "{line}");
        }
    }

    #[test]
    fn mistakes_are_reported_in_virshs_words() {
        for (line, error) in [
            ("start", "command 'start' requires <domain> option"),
            (
                "start --foo web",
                "command 'start' doesn't support option --foo",
            ),
            ("list extra", "unexpected data 'extra'"),
            ("domstate --domain", "expected syntax: --domain <string>"),
            (
                "start --domain a --domain b",
                "option --domain already seen",
            ),
            ("start --console=3 a", "invalid '=' after option --console"),
        ] {
            assert_eq!(parse(line).unwrap_err(), error);
        }
    }

    #[test]
    fn a_script_is_commands_of_words() {
        assert_eq!(
            split_script("start web; domstate 'a b'\"c\\\"\" ;\n;list --all").unwrap(),
            [
                vec!["start", "web"],
                vec!["domstate", "a bc\""],
                vec!["list", "--all"]
            ]
        );
        assert!(split_script("domstate 'web").is_err());
        assert!(split_script("list \\").is_err());
    }

    #[test]
    fn sizes_have_virshs_units() {
        let size = |text| scaled(text, 1024, "size").ok();
        assert_eq!(size("10"), Some(10240));
        assert_eq!(size("10b"), Some(10));
        assert_eq!(size("1k"), Some(1024));
        assert_eq!(size("2MiB"), Some(2 << 20));
        assert_eq!(size("2MB"), Some(2_000_000));
        assert_eq!(size("3G"), Some(3 << 30));
        for text in ["", "abc", "G", "1X", "1kk", "-1", "99999999999E", "1\u{e9}"] {
            assert_eq!(size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,40}") {
            let _ = scaled(&text, 1024, "size");
            let _ = split_script(&text);
        }
    }
}
