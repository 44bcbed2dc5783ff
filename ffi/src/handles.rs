//! Handles that C holds: addresses of living objects, looked up in a table before they are used.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::border::Result;

/// The living objects of one kind.
pub(crate) struct Registry<T> {
    what: &'static str,
    living: RwLock<Option<HashMap<usize, Arc<T>>>>,
}

impl<T> Registry<T> {
    pub const fn new(what: &'static str) -> Registry<T> {
        Registry { what, living: RwLock::new(None) }
    }

    /// Hands an object out. The handle is valid until [`Registry::remove`].
    pub fn insert<C>(&self, object: T) -> *mut C {
        let object = Arc::new(object);
        let address = Arc::as_ptr(&object) as usize;
        let mut living = self.living.write().unwrap_or_else(PoisonError::into_inner);
        living.get_or_insert_default().insert(address, object);
        address as *mut C
    }

    /// The object behind a handle; it lives on while the result is held, even if another thread frees it.
    pub fn get<C>(&self, handle: *const C) -> Result<Arc<T>> {
        if handle.is_null() {
            fail!("{}: a null pointer", self.what);
        }
        let living = self.living.read().unwrap_or_else(PoisonError::into_inner);
        match living.as_ref().and_then(|living| living.get(&(handle as usize))) {
            Some(object) => Ok(Arc::clone(object)),
            None => fail!("{}: {handle:p} is none, or was freed", self.what),
        }
    }

    /// Takes a handle back. A null pointer is none and no error, as for `free`.
    pub fn remove<C>(&self, handle: *const C) -> Result<Option<Arc<T>>> {
        if handle.is_null() {
            return Ok(None);
        }
        let mut living = self.living.write().unwrap_or_else(PoisonError::into_inner);
        match living.as_mut().and_then(|living| living.remove(&(handle as usize))) {
            Some(object) => Ok(Some(object)),
            None => fail!("{}: {handle:p} is none, or was freed already", self.what),
        }
    }
}
