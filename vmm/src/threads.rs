//! Threads of a machine.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use crate::error::Error;
use crate::hooks::{ThreadHook, ThreadRole};

/// Starts a thread called `name` that does `role` by calling `work`. If there is a `hook`, the thread calls it
/// first, and this waits until it has.
///
/// # Errors
/// If the host gives no thread, or the hook refuses. `work` is not called then.
pub(crate) fn spawn(
    name: &str,
    role: &ThreadRole,
    hook: Option<&Arc<dyn ThreadHook>>,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, Error> {
    let builder = thread::Builder::new().name(name.to_owned());
    let with_name = |source| Error::Thread {
        name: name.to_owned(),
        source,
    };
    let Some(hook) = hook else {
        return builder.spawn(work).map_err(with_name);
    };
    let (hook, role) = (hook.clone(), role.clone());
    let (entering, entered) = mpsc::channel();
    let thread = builder
        .spawn(move || {
            let result = hook.enter(&role);
            let enters = result.is_ok();
            // The starter waits for it.
            let _ = entering.send(result);
            if enters {
                work();
            }
        })
        .map_err(with_name)?;
    let refusal = match entered.recv() {
        Ok(Ok(())) => return Ok(thread),
        Ok(Err(source)) => source,
        Err(_) => io::Error::other("the program's hook panicked"),
    };
    // What the work owns is free when this returns. A panic is in the error already.
    let _ = thread.join();
    Err(with_name(refusal))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Hook {
        entered: Mutex<Vec<(ThreadRole, Option<String>)>>,
        refuses: bool,
    }

    impl ThreadHook for Hook {
        fn enter(&self, role: &ThreadRole) -> io::Result<()> {
            let name = thread::current().name().map(str::to_owned);
            self.entered.lock().unwrap().push((role.clone(), name));
            match self.refuses {
                true => Err(io::Error::other("it must not run")),
                false => Ok(()),
            }
        }
    }

    #[test]
    fn the_hook_is_called_on_the_thread_before_its_work() {
        let hook = Arc::new(Hook {
            entered: Mutex::default(),
            refuses: false,
        });
        let dynamic: Arc<dyn ThreadHook> = hook.clone();
        let (sender, receiver) = mpsc::channel();
        let seen = hook.clone();
        let work = move || sender.send(seen.entered.lock().unwrap().len()).unwrap();
        let thread = spawn("worker", &ThreadRole::Vcpu(3), Some(&dynamic), work).unwrap();
        thread.join().unwrap();
        assert_eq!(receiver.recv().unwrap(), 1);
        let entered = hook.entered.lock().unwrap();
        assert_eq!(*entered, [(ThreadRole::Vcpu(3), Some("worker".to_owned()))]);
    }

    #[test]
    fn a_hook_that_refuses_keeps_the_thread_from_its_work() {
        let hook: Arc<dyn ThreadHook> = Arc::new(Hook {
            entered: Mutex::default(),
            refuses: true,
        });
        let work = || unreachable!("the hook has refused");
        let error = spawn("worker", &ThreadRole::Devices, Some(&hook), work).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot start thread 'worker': it must not run"
        );
    }
}
