//! Which devices a model's layers go to: what `llama_model_params` says of it, with llama.cpp's meanings.

use ggml_sys as sys;
use simlayer::{ModelParams, TensorOverride, ggml::Device};

use crate::{
    border::{Result, c_str, slice},
    log,
};

/// As upstream has it: a `tensor_split` has as many entries.
pub(crate) const MAX_DEVICES: usize = 16;

/// Takes over devices, the number of layers on them and their shares, and tensors that are elsewhere.
///
/// # Safety
/// `devices` is null or ends with a null pointer; `tensor_split` is null or has [`MAX_DEVICES`] entries; `tensor_buft_overrides`
/// is null or ends with an entry without a pattern.
pub(crate) unsafe fn place(params: &sys::llama_model_params, engine: &mut ModelParams) -> Result<()> {
    let mut devices = match params.devices.is_null() {
        true => all(),
        // SAFETY: the caller's promise.
        false => unsafe { listed(params.devices) }?,
    };
    match params.split_mode {
        sys::LLAMA_SPLIT_MODE_LAYER => {}
        sys::LLAMA_SPLIT_MODE_ROW => {
            log::warn_once("simlayer", "split_mode: rows are not split over devices: each has whole layers instead");
        }
        // A negative number is the processor, as any number is where there is no device.
        sys::LLAMA_SPLIT_MODE_NONE => match usize::try_from(params.main_gpu) {
            Err(_) => devices.clear(),
            Ok(_) if devices.is_empty() => {}
            Ok(main) => match devices.get(main) {
                Some(&device) => devices = vec![device],
                None => fail!("main_gpu: there is no device {main} among {}", devices.len()),
            },
        },
        sys::LLAMA_SPLIT_MODE_TENSOR => fail!("split_mode: splitting tensors over devices is not supported"),
        other => fail!("split_mode: {other} is none"),
    }
    if !params.tensor_split.is_null() {
        // SAFETY: the caller's promise.
        let shares = unsafe { slice(params.tensor_split, MAX_DEVICES, "tensor_split") }?;
        if let Some(share) = shares.iter().take(devices.len()).find(|share| !share.is_finite() || **share < 0.0) {
            fail!("tensor_split: {share} is no share");
        }
        engine.tensor_split = shares.to_vec();
    }
    // SAFETY: the caller's promise.
    engine.tensor_overrides = unsafe { tensor_overrides(params.tensor_buft_overrides) }?;
    engine.gpu_layers = usize::try_from(params.n_gpu_layers).ok();
    engine.devices = Some(devices);
    Ok(())
}

/// As many entries `tensor_buft_overrides` has at most: what `llama_max_tensor_buft_overrides` says.
pub(crate) const MAX_OVERRIDES: usize = 4096;

/// The devices that ggml knows, with their kinds. Which one a pointer is, is told without following it.
fn registered() -> Vec<(sys::ggml_backend_dev_t, sys::ggml_backend_dev_type, Device)> {
    let raw = |(i, device)| {
        // SAFETY: devices never go away, so that the index is below the count.
        let raw = unsafe { sys::ggml_backend_dev_get(i) };
        // SAFETY: a device of the registry.
        (raw, unsafe { sys::ggml_backend_dev_type(raw) }, device)
    };
    Device::all().into_iter().enumerate().map(raw).collect()
}

/// # Safety
/// The list is null or ends with an entry whose pattern is null; patterns are C strings.
unsafe fn tensor_overrides(list: *const sys::llama_model_tensor_buft_override) -> Result<Vec<TensorOverride>> {
    let mut overrides = Vec::new();
    if list.is_null() {
        return Ok(overrides);
    }
    for i in 0..MAX_OVERRIDES {
        // SAFETY: the entries before had patterns.
        let entry = unsafe { &*list.add(i) };
        if entry.pattern.is_null() {
            return Ok(overrides);
        }
        // SAFETY: the caller's promise.
        let pattern = unsafe { c_str(entry.pattern, "tensor_buft_overrides") }?.to_string_lossy().into_owned();
        match device_of(entry.buft) {
            Some(device) => overrides.push(TensorOverride { pattern, device }),
            None => fail!("tensor_buft_overrides: entry {i} ({pattern}) has no memory of a device that ggml knows"),
        }
    }
    fail!("tensor_buft_overrides: more than {MAX_OVERRIDES} entries, or no end")
}

/// The device that has this kind of memory; memory of the processor that devices write to is the processor's. Told without
/// following the pointer.
fn device_of(buft: sys::ggml_backend_buffer_type_t) -> Option<Device> {
    if buft.is_null() {
        return None;
    }
    let of = |raw| {
        // SAFETY: a device of the registry.
        unsafe { (sys::ggml_backend_dev_buffer_type(raw), sys::ggml_backend_dev_host_buffer_type(raw)) }
    };
    let found = registered().into_iter().find_map(|(raw, _, device)| match of(raw) {
        (own, _) if own == buft => Some(device),
        (_, host) if host == buft => Some(Device::cpu()),
        _ => None,
    });
    // SAFETY: it takes nothing.
    found.or_else(|| (unsafe { sys::ggml_backend_cpu_buffer_type() } == buft).then(Device::cpu))
}

/// In ggml's order, in which frontends list them; a processor's own graphics only where this machine has no card.
fn all() -> Vec<Device> {
    let of = |kind| registered().into_iter().filter(move |found| found.1 == kind).map(|found| found.2);
    let mut devices: Vec<Device> = of(sys::GGML_BACKEND_DEVICE_TYPE_GPU).collect();
    if devices.iter().all(|device| device.backend().starts_with("RPC")) {
        devices.extend(of(sys::GGML_BACKEND_DEVICE_TYPE_IGPU));
    }
    devices
}

/// # Safety
/// The list ends with a null pointer.
unsafe fn listed(list: *const sys::ggml_backend_dev_t) -> Result<Vec<Device>> {
    let registered = registered();
    let mut devices = Vec::new();
    let mut next = list;
    // SAFETY: the entries before were not null.
    while let raw = unsafe { *next }
        && !raw.is_null()
    {
        match registered.iter().find(|found| found.0 == raw) {
            Some(found) => devices.push(found.2),
            None => fail!("devices: entry {} is no device that is registered with ggml", devices.len()),
        }
        next = next.wrapping_add(1);
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn tensors_places_are_read() {
        // SAFETY: takes nothing; lives as long as the process.
        let cpu = unsafe { sys::ggml_backend_cpu_buffer_type() };
        let entry = |pattern: *const _, buft| sys::llama_model_tensor_buft_override { pattern, buft };
        let end = entry(ptr::null(), ptr::null_mut());
        let read = |list: &[sys::llama_model_tensor_buft_override]| {
            // SAFETY: each list ends with `end`.
            unsafe { tensor_overrides(list.as_ptr()) }
        };
        let found = read(&[entry(c"exps".as_ptr(), cpu), entry(c"a|b".as_ptr(), cpu), end]);
        let found = found.unwrap_or_else(|failure| panic!("{}", failure.0));
        assert_eq!(found.iter().map(|tensors| tensors.pattern.as_str()).collect::<Vec<_>>(), ["exps", "a|b"]);
        assert!(found.iter().all(|tensors| tensors.device == Device::cpu()));
        assert!(read(&[end]).is_ok_and(|found| found.is_empty()));
        // SAFETY: null is no list.
        assert!(unsafe { tensor_overrides(ptr::null()) }.is_ok_and(|found| found.is_empty()));
        // Memory of nobody's, which is not looked at.
        let nobodys = ptr::without_provenance_mut(0x1000);
        let failure = read(&[entry(c"exps".as_ptr(), nobodys), end]).expect_err("a failure");
        assert!(failure.0.contains("entry 0 (exps) has no memory"), "{}", failure.0);
        assert!(read(&[entry(c"exps".as_ptr(), ptr::null_mut()), end]).is_err());
    }
}
