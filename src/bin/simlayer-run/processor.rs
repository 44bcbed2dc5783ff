//! The machine: how many threads are worth their while, and how much memory there is.

use std::{collections::BTreeSet, fs, path::Path, thread};

/// Memory that programs can still have, as the system counts it: caches of files are given up for them.
pub fn available_memory() -> Option<usize> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}

/// Cores that this process may use, each counted once however many threads it has at a time: a second thread on a core
/// adds little to products of matrices.
pub fn physical_cores() -> usize {
    let usable = thread::available_parallelism().map_or(4, usize::from);
    match cores(Path::new("/sys/devices/system/cpu"), &allowed()) {
        0 => usable,
        cores => cores.min(usable),
    }
}

/// The processors that the system lets this process run on, by their numbers; empty where it does not say.
fn allowed() -> BTreeSet<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.map(|list| numbers(list.trim())).unwrap_or_default()
}

/// Numbers as the kernel lists them: `0-3,8`.
fn numbers(list: &str) -> BTreeSet<usize> {
    let run = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    };
    list.split(',').filter_map(run).flatten().collect()
}

/// How many cores these processors are on, as the kernel's folder tells; 0 where it does not.
fn cores(folder: &Path, processors: &BTreeSet<usize>) -> usize {
    let part = |processor: usize, name: &str| {
        let file = folder.join(format!("cpu{processor}/topology/{name}"));
        fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
    };
    let core = |&processor: &usize| Some((part(processor, "physical_package_id")?, part(processor, "core_id")?));
    processors.iter().filter_map(core).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_a_core_count_once() {
        let folder = tempfile::tempdir().unwrap();
        // Two packages of two cores with two threads each.
        for processor in 0..8usize {
            let topology = folder.path().join(format!("cpu{processor}/topology"));
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("physical_package_id"), format!("{}\n", processor / 4)).unwrap();
            fs::write(topology.join("core_id"), format!("{}\n", processor % 2)).unwrap();
        }
        assert_eq!(cores(folder.path(), &numbers("0-7")), 4);
        assert_eq!(cores(folder.path(), &numbers("0,2,5")), 2);
        assert_eq!(cores(folder.path(), &numbers("")), 0);
        assert_eq!(numbers("0-2,7,x"), [0, 1, 2, 7].into());
        let usable = thread::available_parallelism().unwrap().get();
        assert!((1..=usable).contains(&physical_cores()));
    }
}
