//! The devices that there are, and what would go where.

use std::io::Write;

use indicatif::HumanBytes;
use serde_json::{Value, json};
use simlayer::{
    DevicePlan, PlannedCache,
    ggml::{Device, DeviceKind},
    plan,
};

use crate::{
    args::{DevicesArgs, NO_MODEL},
    failure::Failure,
    interrupt,
    options::Run,
};

pub fn run(args: DevicesArgs) -> Result<(), Failure> {
    if args.plan && args.common.model.as_os_str() == NO_MODEL {
        return Err(Failure::usage("--plan needs a model: give -m FILE"));
    }
    let run = Run::settle(args.common)?;
    let plans = if args.plan { plan(&run.model_path, &run.model, &run.session)? } else { Vec::new() };
    let mut out = interrupt::stdout();
    if args.output.json {
        let devices: Vec<Value> = Device::all().into_iter().map(device_json).collect();
        let mut object = json!({ "backends": Device::backends(), "devices": devices });
        if args.plan {
            object["plan"] = serde_json::to_value(&plans)?;
        }
        serde_json::to_writer(&mut out, &object)?;
        writeln!(out)?;
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
    Ok(())
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
    let fits = if plan.needed_bytes() > plan.free_bytes { "; THIS DOES NOT FIT" } else { "" };
    format!(
        "{:<8} {layers}{output}: weights {}, cache {} ({lazy}); free {}{fits}",
        plan.device,
        bytes(plan.weight_bytes),
        bytes(plan.kv_bytes),
        bytes(plan.free_bytes),
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
