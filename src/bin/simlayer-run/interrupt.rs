//! Ctrl-C and SIGTERM: they stop the session that is at work, and end the program where there is none, or where it waits
//! for others.

use std::{
    io::{self, IsTerminal, StdoutLock, Write},
    process::{self, Command},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use crate::failure::Failure;

/// Whether it came; sessions look at it while they are at work.
static PRESSED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// Whether a session is there that looks.
static WATCHED: AtomicBool = AtomicBool::new(false);
/// Odd while the program waits for a reader or writer.
static WAITS: AtomicUsize = AtomicUsize::new(0);

/// A pipe that is written to is ready before this, or somebody has stopped reading.
const PATIENCE: Duration = Duration::from_millis(200);

/// Takes over Ctrl-C (and the request to terminate).
pub fn install() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        // A second one means that the first did not help.
        let again = PRESSED.swap(true, Ordering::SeqCst);
        if again || !WATCHED.load(Ordering::SeqCst) {
            end();
        }
        if !again {
            // Without a thread a second Ctrl-C helps.
            let _ = thread::Builder::new().spawn(end_when_stuck);
        }
    })
    .map_err(Failure::run)
}

/// Nobody looks at the flag who waits for a line, or for room in a pipe, now or when all is said that was to be said.
fn end_when_stuck() {
    let mut before = WAITS.load(Ordering::SeqCst);
    while pressed() {
        thread::sleep(PATIENCE);
        let now = WAITS.load(Ordering::SeqCst);
        if now % 2 == 1 && now == before && pressed() {
            end();
        }
        before = now;
    }
}

fn end() -> ! {
    if io::stdin().is_terminal() {
        // The line editor may have changed how the terminal behaves. Without this program it stays as it is.
        let _ = Command::new("stty").arg("sane").status();
    }
    process::exit(130)
}

/// Waits for others: for input, or until output is taken. Meanwhile Ctrl-C ends the program.
///
/// # Errors
/// [`Failure::Interrupted`] when Ctrl-C came before; else those of `wait`.
pub fn while_waiting<T>(wait: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    WAITS.fetch_add(1, Ordering::SeqCst);
    let result = if pressed() { Err(Failure::Interrupted) } else { wait() };
    WAITS.fetch_add(1, Ordering::SeqCst);
    result
}

/// Standard output, where Ctrl-C ends the program while nobody takes what is written. Before that it takes the last words
/// of an interrupted run.
pub fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

pub struct Stdout(StdoutLock<'static>);

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while_writing(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        while_writing(|| self.0.flush())
    }
}

fn while_writing<T>(write: impl FnOnce() -> T) -> T {
    WAITS.fetch_add(1, Ordering::SeqCst);
    let result = write();
    WAITS.fetch_add(1, Ordering::SeqCst);
    result
}

/// The flag that Ctrl-C sets: for sessions' parameters.
pub fn flag() -> Arc<AtomicBool> {
    Arc::clone(&PRESSED)
}

/// Lets Ctrl-C stop the sessions that have [`flag`], instead of ending the program.
pub fn watch() {
    WATCHED.store(true, Ordering::SeqCst);
}

/// Lets Ctrl-C end the program again.
pub fn unwatch() {
    WATCHED.store(false, Ordering::SeqCst);
}

pub fn pressed() -> bool {
    PRESSED.load(Ordering::SeqCst)
}

/// Forgets that Ctrl-C was pressed: the session can work again.
pub fn reset() {
    PRESSED.store(false, Ordering::SeqCst);
}
