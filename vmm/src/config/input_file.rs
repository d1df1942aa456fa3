//! Reads text that describes a machine, from a file or a pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Maximum number of bytes in a file.
const MAX_SIZE: usize = 1 << 20;

/// How long a named pipe may be without a writer.
const WRITER_LIMIT: Duration = Duration::from_secs(1);

/// How long a writer may write nothing.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// Reads a file of at most 1 MiB of UTF-8, without the byte order mark that it may start with.
///
/// It may be a pipe, such as `/dev/stdin` or the `<(...)` of a shell: this waits up to a second for a
/// writer, and then up to ten seconds each time that the writer writes nothing.
///
/// # Errors
///
/// If it cannot be read, is too large or not UTF-8, or if one of these times runs out.
pub fn read_text_file(path: &Path) -> io::Result<String> {
    let mut file = OpenOptions::new()
        .read(true)
        // A pipe is waited for below, with a limit.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let bytes = read_patiently(&mut file, WRITER_LIMIT, SILENCE_LIMIT)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))?;
    match text.strip_prefix('\u{feff}') {
        Some(rest) => Ok(rest.to_owned()),
        None => Ok(text),
    }
}

/// Reads `file`, which is in non-blocking mode, to its end.
fn read_patiently(
    file: &mut File,
    writer_limit: Duration,
    silence_limit: Duration,
) -> io::Result<Vec<u8>> {
    let is_pipe = file.metadata()?.file_type().is_fifo();
    let opened = Instant::now();
    let mut bytes = Vec::new();
    // An empty pipe reads as ended as long as no process has it open for writing.
    let mut has_writer = !is_pipe;
    let mut chunk = vec![0; 64 << 10];
    loop {
        match file.read(&mut chunk) {
            Ok(0) if has_writer => return Ok(bytes),
            Ok(0) => {
                let left = writer_limit.saturating_sub(opened.elapsed());
                if left.is_zero() {
                    return Err(timed_out("it is a pipe that nobody writes to".to_owned()));
                }
                wait_for_input(file, left)?;
            }
            Ok(count) => {
                has_writer = true;
                bytes.extend(&chunk[..count]);
                if bytes.len() > MAX_SIZE {
                    let message = "it is larger than 1 MiB";
                    return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                has_writer = true;
                if !wait_for_input(file, silence_limit)? {
                    return Err(timed_out(format!(
                        "its writer has written nothing for {} seconds",
                        silence_limit.as_secs()
                    )));
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn timed_out(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, message)
}

/// Waits until there is something to read, or the last writer has closed the pipe. Returns `false` when
/// `limit` is over.
fn wait_for_input(file: &File, limit: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let mut descriptors = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    match poll(&mut descriptors, timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::path::PathBuf;
    use std::thread;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    /// A folder that is removed with its contents.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let name = format!("bantam-input-{name}-{}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir(&folder).unwrap();
            Self(folder)
        }

        fn pipe(&self) -> PathBuf {
            let path = self.0.join("pipe");
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
            path
        }

        fn file(&self, contents: &[u8]) -> PathBuf {
            let path = self.0.join("file");
            fs::write(&path, contents).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn open_pipe(path: &Path) -> File {
        File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .unwrap()
    }

    #[test]
    fn what_comes_through_a_pipe_is_read_whole() {
        let folder = Folder::new("written");
        let path = folder.pipe();
        let text = "text ".repeat(100_000);
        let writer = thread::spawn({
            let (path, text) = (path.clone(), text.clone());
            // Opening it waits for the reader.
            move || fs::write(path, text).unwrap()
        });
        assert!(read_text_file(&path).unwrap() == text);
        writer.join().unwrap();
    }

    #[test]
    fn a_pipe_without_a_writer_or_with_a_silent_one_is_given_up() {
        let folder = Folder::new("silent");
        let path = folder.pipe();
        let (short, forever) = (Duration::from_millis(1), Duration::from_secs(3600));
        let mut reader = open_pipe(&path);
        let error = read_patiently(&mut reader, short, forever).unwrap_err();
        assert_eq!(error.to_string(), "it is a pipe that nobody writes to");

        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"half of it").unwrap();
        let error = read_patiently(&mut reader, forever, short).unwrap_err();
        assert!(error.to_string().contains("has written nothing"), "{error}");

        drop(writer);
        let mut reader = open_pipe(&path);
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"all of it").unwrap();
        drop(writer);
        let read = read_patiently(&mut reader, short, forever).unwrap();
        assert_eq!(read, b"all of it");
    }

    #[test]
    fn a_byte_order_mark_is_not_part_of_the_text() {
        let folder = Folder::new("mark");
        let path = folder.file("\u{feff}a = 1".as_bytes());
        assert_eq!(read_text_file(&path).unwrap(), "a = 1");
    }

    #[test]
    fn files_that_are_no_text_or_too_large_are_refused() {
        let folder = Folder::new("refused");
        let refused = |path: &Path| read_text_file(path).unwrap_err().to_string();
        assert_eq!(
            refused(&folder.file(b"\xff\xfea\0")),
            "it is not UTF-8 text"
        );
        let large = folder.file(&vec![b' '; MAX_SIZE + 1]);
        assert_eq!(refused(&large), "it is larger than 1 MiB");
        assert_eq!(refused(Path::new("/dev/zero")), "it is larger than 1 MiB");
        assert_eq!(read_text_file(Path::new("/dev/null")).unwrap(), "");
        assert!(refused(Path::new("/")).starts_with("Is a directory"));
    }
}
