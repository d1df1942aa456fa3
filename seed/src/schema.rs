//! What cloud-init itself says of user data, if the host has it.

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::thread;

use crate::error::Error;
use crate::user_data::UserData;

/// The status of `cloud-init schema` for what it refuses. One that has no such command ends with another.
const REFUSED: i32 = 1;

/// How much of what cloud-init says is in an error, in characters.
const MAX_REASON: usize = 400;

/// Asks `cloud-init schema` whether it accepts user data, which `what` is called in errors. If the host has no cloud-init, or
/// the data is not `#cloud-config`, nothing is asked.
///
/// # Errors
/// If cloud-init refuses it.
pub fn check_with_cloud_init(what: &str, data: &UserData) -> Result<(), Error> {
    check_with("cloud-init", what, data)
}

fn check_with(program: &str, what: &str, data: &UserData) -> Result<(), Error> {
    let Some(text) = data.as_cloud_config() else {
        return Ok(());
    };
    match ask(program, text) {
        Ok(Some(reason)) => Err(Error::Schema {
            what: what.to_owned(),
            reason,
        }),
        // A host without cloud-init, or with one that cannot be asked, is no worse than one whose answer is yes.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Returns why cloud-init refuses `text`, if it does.
fn ask(program: &str, text: &str) -> io::Result<Option<String>> {
    let mut asked = Command::new(program)
        .args(["schema", "--config-file", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let input = asked.stdin.take();
    let output = thread::scope(|scope| {
        scope.spawn(move || {
            // It may have seen enough before the end.
            let _ = input.map(|mut input| input.write_all(text.as_bytes()));
        });
        asked.wait_with_output()
    })?;
    if output.status.code() != Some(REFUSED) {
        return Ok(None);
    }
    let said = [output.stderr, output.stdout].concat();
    let said = String::from_utf8_lossy(&said);
    let words: Vec<_> = said.split_whitespace().collect();
    Ok(Some(words.join(" ").chars().take(MAX_REASON).collect()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    fn program(folder: &tempfile::TempDir, script: &str) -> PathBuf {
        let path = folder.path().join("cloud-init");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn ask(script: &str, data: &str) -> Result<(), Error> {
        let folder = tempfile::tempdir().unwrap();
        let program = program(&folder, script);
        let data = UserData::new("it", data.as_bytes().to_vec()).unwrap();
        check_with(program.to_str().unwrap(), "the user data", &data)
    }

    #[test]
    fn what_cloud_init_refuses_is_an_error_of_one_line() {
        let script =
            "grep -q bad /dev/stdin && { echo 'Error:'; echo '  bad: wrong'; exit 1; }; exit 0";
        let error = ask(script, "#cloud-config\nbad: 1").unwrap_err();
        let expected = "cloud-init refuses the user data: Error: bad: wrong";
        assert_eq!(error.to_string(), expected);
        ask(script, "#cloud-config\ngood: 1").unwrap();
    }

    #[test]
    fn a_host_whose_cloud_init_cannot_be_asked_is_good_enough() {
        let data = "#cloud-config\na: 1";
        ask("exit 2", data).unwrap();
        ask("kill -9 $$", data).unwrap();
        ask("exit 1", "#!/bin/sh\n").unwrap();
        let data = UserData::new("it", data.into()).unwrap();
        check_with("/nowhere/cloud-init", "it", &data).unwrap();
    }

    #[test]
    fn one_that_does_not_read_to_the_end_holds_up_nobody() {
        let data = format!("#cloud-config\na: {}", "x".repeat(1 << 20));
        ask("exit 0", &data).unwrap();
    }
}
