//! What is installed here and whether it goes together: this program, the C library, frontends, devices, memory.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use indicatif::HumanBytes;
use simlayer::ggml::Device;

use crate::{args::DoctorArgs, build::Build, devices, failure::Failure, interrupt, options, processor};

/// Releases of llama-cpp-python whose structs are ours (docs/c-abi.md, "Versions").
const MATCHING: &[&str] = &["0.3.36"];

/// Programs of llama.cpp's that a libllama.so.0 could serve.
const FRONTENDS: &[&str] = &["llama-server", "llama-cli", "llama-completion", "llama-simple", "llama-bench"];

pub fn run(args: DoctorArgs) -> Result<(), Failure> {
    let mut lines = Vec::new();
    let build = Build::this();
    lines.push(format!("simlayer-run {} ({})", build.version, build.revision));
    lines.push(format!("  llama.cpp {}, ggml {}", build.llama_cpp, build.ggml));
    lines.push(format!("  features {}, for {}", build.features.join(", "), build.target));
    if let Some(path) = env::current_exe().ok().and_then(|path| path.to_str().map(str::to_owned)) {
        lines.push(format!("  {path}"));
    }
    libraries(&args, build.llama_cpp, &mut lines);
    frontends(&mut lines);
    python(&mut lines);
    lines.push("devices".to_owned());
    lines.extend(Device::all().iter().map(|device| {
        let (free, total) = device.memory();
        format!("  {} {}: {} free of {}", device.name(), device.description(), bytes(free), bytes(total))
    }));
    lines.push(format!("  {} physical cores may be used", processor::physical_cores()));
    if let Some(available) = processor::available_memory() {
        lines.push(format!("  {} of memory are available", bytes(available)));
    }
    if let Some(model) = args.model {
        lines.push(model.display().to_string());
        lines.extend(devices::fitting(&options::Run::of_model(model)?)?.into_iter().map(|line| format!("  {line}")));
    }
    use std::io::Write;
    let mut out = interrupt::stdout();
    for line in lines {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// The places where a libllama.so.0 of ours may be, and what each says of itself.
fn libraries(args: &DoctorArgs, llama_cpp: &str, lines: &mut Vec<String>) {
    lines.push("libllama.so.0".to_owned());
    let mut folders: Vec<(String, PathBuf)> = Vec::new();
    if let Some(dir) = &args.lib {
        folders.push(("--lib".to_owned(), dir.clone()));
    }
    for variable in ["LLAMA_CPP_LIB_PATH", "LD_LIBRARY_PATH"] {
        let paths = env::var_os(variable).unwrap_or_default();
        let dirs = env::split_paths(&paths).filter(|dir| !dir.as_os_str().is_empty());
        folders.extend(dirs.map(|dir| (variable.to_owned(), dir)));
    }
    let beside = env::current_exe().ok().and_then(|program| Some(program.parent()?.parent()?.to_owned()));
    for part in ["lib", "lib/simlayer"] {
        folders.extend(beside.iter().map(|dir| ("beside this program".to_owned(), dir.join(part))));
    }
    let mut n_found = 0;
    for (why, dir) in folders {
        let file = ["libllama.so.0", "libllama.so"].map(|name| dir.join(name)).into_iter().find(|file| file.is_file());
        let Some(file) = file else {
            if why != "beside this program" {
                lines.push(format!("  {why}: {} has none", dir.display()));
            }
            continue;
        };
        n_found += 1;
        let verdict = match version(&file) {
            Some(version) if version.ends_with(&format!("llama.cpp {llama_cpp}")) => {
                format!("{version}, as this program")
            }
            Some(version) => format!("{version}: ANOTHER REVISION than this program's {llama_cpp}"),
            None => "not simlayer's".to_owned(),
        };
        lines.push(format!("  {why}: {}: {verdict}", file.display()));
    }
    if n_found == 0 {
        lines.push("  none found: `cargo xtask dist` makes one, packages bring one".to_owned());
    }
}

/// What a library of ours calls itself. It is looked for in the file: to load it would run it.
fn version(library: &Path) -> Option<String> {
    let bytes = fs::read(library).ok()?;
    let begin = b"simlayer ";
    let end = b" llama.cpp ";
    let candidates = bytes.windows(begin.len()).enumerate().filter(|(_, window)| window == begin);
    candidates.into_iter().find_map(|(at, _)| {
        let text: Vec<u8> =
            bytes[at..].iter().copied().take(120).take_while(|byte| (b' '..=b'~').contains(byte)).collect();
        let is_version = text[begin.len()..].first().is_some_and(u8::is_ascii_digit);
        let text = String::from_utf8(text).ok().filter(|_| is_version)?;
        // Constants lie one behind the other; the version ends with the source in brackets.
        text.as_bytes().windows(end.len()).any(|window| window == end).then_some(())?;
        let close = text.find(')')?;
        Some(text[..=close].to_owned())
    })
}

/// llama.cpp's programs on the PATH, and the library that each would load.
fn frontends(lines: &mut Vec<String>) {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut found = Vec::new();
    for name in FRONTENDS {
        let Some(program) = env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()) else {
            continue;
        };
        let linked = Command::new("ldd").arg(&program).output().map(|output| output.stdout).unwrap_or_default();
        let linked = String::from_utf8_lossy(&linked).into_owned();
        let library = linked.lines().find(|line| line.trim().starts_with("libllama.so")).map(|line| {
            let file = line.split("=>").nth(1).unwrap_or("").split(" (").next().unwrap_or("").trim().to_owned();
            match version(Path::new(&file)) {
                Some(version) => format!("{file}: {version}"),
                None => format!("{file}: not simlayer's"),
            }
        });
        let library = library.unwrap_or_else(|| "has its library inside: it cannot run on another".to_owned());
        found.push(format!("  {}: {library}", program.display()));
    }
    if !found.is_empty() {
        lines.push("llama.cpp's programs".to_owned());
        lines.extend(found);
    }
}

/// llama-cpp-python, as the Python on the PATH has it.
fn python(lines: &mut Vec<String>) {
    const SCRIPT: &str = "from importlib import metadata\nfor name in ('llama-cpp-python', 'simlayer'):\n    try:\n        \
                          print(name, metadata.version(name))\n    except metadata.PackageNotFoundError:\n        pass";
    let Ok(output) = Command::new("python3").args(["-c", SCRIPT]).output() else { return };
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let verdict = match line.split_once(' ') {
            Some(("llama-cpp-python", version)) if MATCHING.contains(&version) => "matches",
            Some(("llama-cpp-python", _)) => "does NOT match: see docs/c-abi.md, \"Versions\"",
            _ => "",
        };
        lines.push(format!("{line} {verdict}").trim_end().to_owned());
    }
}

fn bytes(n: usize) -> HumanBytes {
    HumanBytes(n as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_says_its_version() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libllama.so.0");
        fs::write(&file, b"\x7fELF simlayer is built for simlayer 0.1.0, llama.cpp 0.6.0 (source-1.2)next constant")
            .unwrap();
        assert_eq!(version(&file).as_deref(), Some("simlayer 0.1.0, llama.cpp 0.6.0 (source-1.2)"));
        fs::write(&file, b"\x7fELF another library").unwrap();
        assert_eq!(version(&file), None);
    }
}
