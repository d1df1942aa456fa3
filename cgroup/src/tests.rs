//! Groups in a folder that looks like a hierarchy. Those of this host are tested with machines.

use super::*;

fn settings() -> Vec<Setting> {
    let limits = Limits {
        memory_max: Some(1 << 20),
        ..Limits::default()
    };
    limits.settings("memory", Version::Two)
}

/// Makes a group with these processes.
fn group(folder: &Path, processes: &str) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(PROCESSES), processes).unwrap();
    fs::write(folder.join(SUBTREE), "").unwrap();
}

#[test]
fn a_group_has_its_limits_before_it_has_the_process() {
    let folder = tempfile::tempdir().unwrap();
    group(folder.path(), "");
    let mut noted = Vec::new();
    let mut note = |path: &Path| {
        noted.push(path.to_owned());
        Ok(())
    };
    let made = make(folder.path(), folder.path(), "web", &settings(), &mut note).unwrap();
    assert_eq!(noted, std::slice::from_ref(&made));
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    assert_eq!(read(&folder.path().join(SUBTREE)), "+memory");
    assert_eq!(read(&made.join("memory.max")), "1048576");
    assert_eq!(read(&made.join(PROCESSES)), process::id().to_string());
}

#[test]
fn nothing_is_made_that_is_not_noted_or_is_there() {
    let folder = tempfile::tempdir().unwrap();
    group(folder.path(), "");
    let mut fails = |_: &Path| Err(io::ErrorKind::StorageFull.into());
    let error = make(folder.path(), folder.path(), "web", &settings(), &mut fails).unwrap_err();
    assert!(error.to_string().contains("no storage space"), "{error}");
    assert!(!folder.path().join("web").exists());
    let there = folder.path().join("there");
    fs::create_dir(&there).unwrap();
    let error = make(
        folder.path(),
        folder.path(),
        "there",
        &settings(),
        &mut |_| Ok(()),
    )
    .unwrap_err();
    assert!(error.to_string().contains("systemd-run"), "{error}");
    remove(&there).unwrap();
    remove(&there).unwrap();
}
