//! The devices that there are, and what would go where.

use std::io::Write;

use indicatif::HumanBytes;
use serde_json::{Value, json};
use simlayer::{
    DevicePlan, Fit, Model, PlannedCache, TensorPlace,
    ggml::{Device, DeviceKind, Type},
    gguf::Gguf,
    lazy::{Policy, Target},
    plan,
};

use crate::{
    args::{DevicesArgs, NO_MODEL},
    failure::Failure,
    interrupt,
    options::{Run, tensor_line},
    processor, report,
};

pub fn run(args: DevicesArgs) -> Result<(), Failure> {
    let run = Run::settle(args.common)?;
    if args.plan && run.model_path.as_os_str() == NO_MODEL {
        return Err(Failure::usage("--plan needs a model: give -m FILE"));
    }
    let plans = if args.plan { plan(&run.model_path, &run.model, &run.session)? } else { Vec::new() };
    let mut out = interrupt::stdout();
    if args.output.json {
        let devices: Vec<Value> = Device::all().into_iter().map(device_json).collect();
        let mut object = json!({ "backends": Device::backends(), "devices": devices });
        if args.plan {
            object["plan"] = serde_json::to_value(&plans)?;
            object["tensors"] = Model::tensors_of(&run.model_path, &run.model)?.iter().map(tensor_json).collect();
            object["fit"] = run.fitted()?.map_or(Value::Null, |fit| fit_json(&fit));
        }
        report::write_json(&mut out, &object)?;
        return Ok(());
    }
    writeln!(out, "backends: {}", Device::backends().join(", "))?;
    for device in Device::all() {
        let (free, total) = device.memory();
        let (name, description) = (device.name(), device.description());
        writeln!(out, "{name:<8} {} free of {}  {description}", bytes(free), bytes(total))?;
    }
    for plan in &plans {
        writeln!(out, "{}", plan_text(plan))?;
        for line in cache_lines(&plan.caches) {
            writeln!(out, "{:<8} {line}", "")?;
        }
    }
    if args.plan {
        for line in fitting(&run)? {
            writeln!(out, "{line}")?;
        }
        if let Some(fit) = run.fitted()? {
            writeln!(out, "{}", fit_line(&fit))?;
        }
        if run.verbose {
            for place in Model::tensors_of(&run.model_path, &run.model)? {
                writeln!(out, "{}", tensor_line(&place))?;
            }
        }
    }
    Ok(())
}

/// The longest contexts that fit the free memory, under the rule that was asked for and some others.
pub fn fitting(run: &Run) -> Result<Vec<String>, Failure> {
    let trained = trained(run)?;
    let mut settings = Vec::new();
    for (name, policy, narrow) in [
        ("--lazy off, f16", Policy::Off, false),
        ("--lazy off -ctk q8_0 -ctv q4_0", Policy::Off, true),
        ("--lazy budget:0.5 -ctk q8_0 -ctv q4_0", Policy::Budget(0.5), true),
        ("--lazy profile:0.8 -ctk q8_0 -ctv q4_0", Policy::Profile(Target::Share(0.8)), true),
    ] {
        let mut session = run.session.clone();
        session.lazy.policy = policy;
        (session.type_k, session.type_v) = if narrow { (Type::Q8_0, Type::Q4_0) } else { (Type::F16, Type::F16) };
        settings.push((name, session));
    }
    let mut lines = vec![
        "longest context that fits the free memory (caches and weights; what is computed with comes on top):"
            .to_owned(),
    ];
    for (name, mut session) in settings {
        let mut fits = |n_ctx: usize| -> Result<bool, Failure> {
            session.n_ctx = n_ctx;
            let plans = plan(&run.model_path, &run.model, &session)?;
            Ok(plans.iter().all(|plan| plan.needed_bytes() <= free(plan)))
        };
        let longest = match longest(trained, &mut fits) {
            // Where no profile is known, that is what there is to say.
            Err(Failure::Run(why)) if name.contains("profile") => {
                lines.push(format!("  {name:<40} {why}"));
                continue;
            }
            longest => longest?,
        };
        let text = match longest {
            0 => "does not fit".to_owned(),
            n if n == trained => format!("-c {n}, all that the model was trained with"),
            n => format!("-c {n}"),
        };
        lines.push(format!("  {name:<40} {text}"));
    }
    Ok(lines)
}

/// What is free on a plan's device; of the processor, as the system counts it.
fn free(plan: &DevicePlan) -> usize {
    let of_system = processor::available_memory().filter(|_| plan.device == Device::cpu().name());
    of_system.map_or(plan.free_bytes, |available| available.min(plan.free_bytes))
}

/// Tokens that the model was trained with.
fn trained(run: &Run) -> Result<usize, Failure> {
    let file = Gguf::open(&run.model_path).map_err(simlayer::model::Error::from)?;
    Ok(simlayer::Hparams::of(&file)?.n_ctx_train)
}

/// The longest multiple of 256 that fits, at most `most`; 0 where none does.
fn longest(most: usize, fits: &mut dyn FnMut(usize) -> Result<bool, Failure>) -> Result<usize, Failure> {
    const STEP: usize = 256;
    if fits(most)? {
        return Ok(most);
    }
    let (mut good, mut bad) = (0, most.div_ceil(STEP));
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        if fits(middle * STEP)? {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Ok(good * STEP)
}

fn fit_line(fit: &Fit) -> String {
    match (fit.fits, &fit.options[..]) {
        (true, []) => "all of this fits the devices".to_owned(),
        (true, options) => format!("best that fits the devices: {}", options.join(" ")),
        (false, []) => "this does not fit the devices, and where things go was given".to_owned(),
        (false, options) => format!("nothing fits the devices, not even {}", options.join(" ")),
    }
}

fn fit_json(fit: &Fit) -> Value {
    json!({
        "fits": fit.fits,
        "options": fit.options,
        "n_ctx": fit.session.n_ctx,
        "gpu_layers": fit.model.gpu_layers,
        "experts_of_first": fit.experts_of_first,
    })
}

fn tensor_json(place: &TensorPlace) -> Value {
    json!({
        "name": place.name,
        "type": place.ty.to_string(),
        "bytes": place.bytes,
        "device": place.device.name(),
        "memory": place.memory,
        "overridden": place.overridden,
    })
}

fn device_json(device: Device) -> Value {
    let (free, total) = device.memory();
    let kind = match device.kind() {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Gpu => "gpu",
        DeviceKind::Accelerator => "accelerator",
    };
    json!({
        "name": device.name(),
        "description": device.description(),
        "backend": device.backend(),
        "kind": kind,
        "free_bytes": free,
        "total_bytes": total,
    })
}

fn plan_text(plan: &DevicePlan) -> String {
    let layers = match (plan.layers.first(), plan.layers.last()) {
        (Some(first), Some(last)) if first != last => format!("layers {first} to {last}"),
        (Some(only), _) => format!("layer {only}"),
        _ => "no layers".to_owned(),
    };
    let output = if plan.output { " and the output" } else { "" };
    let lazy = match plan.lazy_kv_bytes {
        Some(lazy) => format!("{} of it behind a full prompt", bytes(lazy)),
        None => "less as the prompt lets layers become lazy".to_owned(),
    };
    let fits = if plan.needed_bytes() > free(plan) { "; THIS DOES NOT FIT" } else { "" };
    format!(
        "{:<8} {layers}{output}: weights {}, cache {} ({lazy}); free {}{fits}",
        plan.device,
        bytes(plan.weight_bytes),
        bytes(plan.kv_bytes),
        bytes(free(plan)),
    )
}

/// What layers keep, those that are alike in one line.
fn cache_lines(caches: &[PlannedCache]) -> Vec<String> {
    let mut groups: Vec<Vec<&PlannedCache>> = Vec::new();
    let what =
        |cache: &PlannedCache| (cache.kind, cache.shares, [cache.kv_bytes, cache.lazy_kv_bytes, cache.state_bytes]);
    for cache in caches {
        match groups.iter_mut().find(|group| what(group[0]) == what(cache)) {
            Some(group) => group.push(cache),
            None => groups.push(vec![cache]),
        }
    }
    let line = |group: Vec<&PlannedCache>| {
        let indices: Vec<usize> = group.iter().map(|cache| cache.index).collect();
        let PlannedCache { kind, shares, kv_bytes, lazy_kv_bytes, state_bytes, .. } = *group[0];
        if let Some(owner) = shares {
            return format!("{kind} with {owner}: {}", ranges(&indices));
        }
        let lazy = if lazy_kv_bytes < kv_bytes { format!(", {} lazy", bytes(lazy_kv_bytes)) } else { String::new() };
        let state = match state_bytes {
            0 => String::new(),
            _ if state_bytes == kv_bytes => ", whatever the context".to_owned(),
            _ => format!(", a recurrent state of {} among them", bytes(state_bytes)),
        };
        format!("{kind}: {} each{lazy}{state}: {}", bytes(kv_bytes), ranges(&indices))
    };
    groups.into_iter().map(line).collect()
}

/// Numbers in ascending order as `0-3, 5`.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let run = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    runs.into_iter().map(run).collect::<Vec<_>>().join(", ")
}

fn bytes(n: usize) -> HumanBytes {
    HumanBytes(n as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_context_is_found() {
        let fitting = |most: usize, limit: usize| longest(most, &mut |n| Ok(n <= limit)).unwrap();
        assert_eq!((fitting(8192, 8192), fitting(8192, 5000), fitting(8192, 255)), (8192, 4864, 0));
        assert_eq!((fitting(1000, 999), fitting(100, 10)), (768, 0));
    }
}
