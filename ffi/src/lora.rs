//! The LoRA adapters that a frontend has loaded.

use std::{
    ffi::{CStr, CString},
    sync::{Mutex, PoisonError},
};

use ggml_sys as sys;
use simlayer::LoraAdapter;

use crate::{border::Result, handles::Registry};

pub(crate) static ADAPTERS: Registry<Adapter> = Registry::new("LoRA adapter");

/// What a `llama_adapter_lora` handle stands for.
pub(crate) struct Adapter {
    /// The model's handle: an adapter goes with its model.
    model: usize,
    pub engine: LoraAdapter,
    /// The same for models that contexts have loaded once more, with RoPE of their own.
    others: Mutex<Vec<LoraAdapter>>,
    /// Keys with scalar values, as text, in alphabetical order.
    pub meta: Vec<(CString, CString)>,
}

impl Adapter {
    pub fn new(model: *const sys::llama_model, engine: LoraAdapter, meta: Vec<(CString, CString)>) -> Adapter {
        Adapter { model: model.addr(), engine, others: Mutex::default(), meta }
    }

    /// The adapter of a context's model.
    pub fn of(&self, model: &simlayer::Model) -> Result<LoraAdapter> {
        if self.engine.fits(model) {
            return Ok(self.engine.clone());
        }
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = others.iter().find(|other| other.fits(model)) {
            return Ok(other.clone());
        }
        let other = LoraAdapter::load(model, self.engine.path())?;
        others.push(other.clone());
        Ok(other)
    }

    pub fn value(&self, key: &CStr) -> Option<&CString> {
        self.meta.iter().find(|(other, _)| other.as_c_str() == key).map(|(_, value)| value)
    }

    pub fn at(&self, i: i32) -> Option<&(CString, CString)> {
        usize::try_from(i).ok().and_then(|i| self.meta.get(i))
    }
}

/// Frees the adapters of a model that goes.
pub(crate) fn forget_adapters(model: *const sys::llama_model) {
    ADAPTERS.remove_where(|adapter| adapter.model == model.addr());
}
