//! Ctrl-C: it stops the session that is at work, and ends the program where there is none.

use std::{
    process,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::failure::Failure;

static PRESSED: AtomicBool = AtomicBool::new(false);
static SESSION: Mutex<Option<Arc<AtomicBool>>> = Mutex::new(None);

/// Takes over Ctrl-C (and the request to terminate).
pub fn install() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        let session = SESSION.lock().unwrap_or_else(PoisonError::into_inner);
        match &*session {
            // A second Ctrl-C means that the first did not help.
            Some(abort) if !PRESSED.swap(true, Ordering::SeqCst) => abort.store(true, Ordering::SeqCst),
            _ => process::exit(130),
        }
    })
    .map_err(Failure::run)
}

/// Lets Ctrl-C stop a session, by its abort flag, instead of ending the program.
pub fn watch(abort: Arc<AtomicBool>) {
    *SESSION.lock().unwrap_or_else(PoisonError::into_inner) = Some(abort);
}

pub fn pressed() -> bool {
    PRESSED.load(Ordering::SeqCst)
}

/// Forgets that Ctrl-C was pressed: the session can work again.
pub fn reset() {
    if let Some(abort) = &*SESSION.lock().unwrap_or_else(PoisonError::into_inner) {
        abort.store(false, Ordering::SeqCst);
    }
    PRESSED.store(false, Ordering::SeqCst);
}
