//! Handles that C holds: numbers of living objects, looked up in a table before they are used.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{border::Result, upstream};

/// The living objects of one kind.
pub(crate) struct Registry<T> {
    what: &'static str,
    living: RwLock<Option<HashMap<usize, Arc<T>>>>,
}

/// Handles look like aligned pointers, but are none: nothing else is told of an object, and no number comes twice, so
/// that one that was freed is known for good. Where pointers have 64 bits they are such as no object has, so that
/// unmodified llama.cpp's, which are pointers, are never one of them.
static NEXT: AtomicUsize = AtomicUsize::new(0x1000 + if usize::BITS == 64 { 0x51 << (usize::BITS - 8) } else { 0 });

impl<T> Registry<T> {
    pub const fn new(what: &'static str) -> Registry<T> {
        Registry { what, living: RwLock::new(None) }
    }

    /// Hands an object out. The handle is valid until [`Registry::remove`].
    pub fn insert<C>(&self, object: T) -> *mut C {
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        let mut living = self.living.write().unwrap_or_else(PoisonError::into_inner);
        living.get_or_insert_default().insert(handle, Arc::new(object));
        std::ptr::without_provenance_mut(handle)
    }

    /// The object behind a handle; it lives on while the result is held, even if another thread frees it.
    pub fn get<C>(&self, handle: *const C) -> Result<Arc<T>> {
        if handle.is_null() {
            fail!("{}: a null pointer", self.what);
        }
        let living = self.living.read().unwrap_or_else(PoisonError::into_inner);
        match living.as_ref().and_then(|living| living.get(&handle.addr())) {
            Some(object) => Ok(Arc::clone(object)),
            None if upstream::is_upstreams(handle) => {
                fail!("{}: it runs in unmodified llama.cpp, where no layer is lazy", self.what)
            }
            None => fail!("{}: {handle:p} is none, or was freed", self.what),
        }
    }

    /// Takes back the handles of the objects for which `goes` holds.
    pub fn remove_where(&self, goes: impl Fn(&T) -> bool) {
        let mut living = self.living.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(living) = living.as_mut() {
            living.retain(|_, object| !goes(object));
        }
    }

    /// Takes a handle back. A null pointer is none and no error, as for `free`.
    pub fn remove<C>(&self, handle: *const C) -> Result<Option<Arc<T>>> {
        if handle.is_null() {
            return Ok(None);
        }
        let mut living = self.living.write().unwrap_or_else(PoisonError::into_inner);
        match living.as_mut().and_then(|living| living.remove(&handle.addr())) {
            Some(object) => Ok(Some(object)),
            None => fail!("{}: {handle:p} is none, or was freed already", self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;

    #[test]
    fn a_freed_handle_stays_freed() {
        let registry = Registry::new("thing");
        let first: *mut c_void = registry.insert(1);
        assert_eq!(*registry.get(first).unwrap(), 1);
        assert_eq!(registry.remove(first).unwrap().as_deref(), Some(&1));
        let second: *mut c_void = registry.insert(2);
        assert!(registry.get(first).is_err() && registry.remove(first).is_err());
        assert_eq!(*registry.get(second).unwrap(), 2);
        assert!(registry.get::<c_void>(std::ptr::null()).is_err());
        assert!(registry.remove::<c_void>(std::ptr::null()).unwrap().is_none());
    }
}
