//! Running other programs, and saying so.

use std::ffi::OsStr;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use wait4::Wait4;

/// What has the system end a program as soon as the thread that started it is no more, however that ended.
const ENDS_WITH_US: [&str; 3] = ["setpriv", "--pdeathsig", "TERM"];

/// A command that ends when we do: a server would otherwise outlive a chore that is killed. That is where Linux's setpriv is;
/// elsewhere it is the program alone.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    static HAS_SETPRIV: OnceLock<bool> = OnceLock::new();
    let [setpriv, options @ ..] = ENDS_WITH_US;
    let has_setpriv = || succeeds(Command::new(setpriv).args(options).arg("true"));
    if !HAS_SETPRIV.get_or_init(has_setpriv) {
        return Command::new(program);
    }
    let mut command = Command::new(setpriv);
    command.args(options).arg(program);
    command
}

/// The command line as one would type it, for messages.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|w| w.to_string_lossy().into_owned()).collect();
    let words = if words.starts_with(&ENDS_WITH_US.map(str::to_owned)) { &words[ENDS_WITH_US.len()..] } else { &words };
    words.join(" ")
}

/// Prints the command and runs it; its output goes where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// Runs the command and returns what it writes to stdout; stderr is shown only when it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    if !out.status.success() {
        let stderr = String::from_utf8_lossy(&out.stderr);
        bail!("`{line}` failed: {}\n{}", out.status, stderr.trim_end());
    }
    String::from_utf8(out.stdout).with_context(|| format!("`{line}` wrote no UTF-8"))
}

/// What the command writes to stdout, and the most memory that it had resident, in bytes; stderr is shown only when
/// it fails.
pub fn output_and_peak(command: &mut Command) -> Result<(String, u64)> {
    let line = shown(command);
    let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = started.with_context(|| format!("cannot start `{line}`"))?;
    let stderr = child.stderr.take();
    // Beside stdout, so that neither pipe is ever full.
    let told = std::thread::spawn(move || {
        let mut told = Vec::new();
        let _ = stderr.map(|mut stderr| stderr.read_to_end(&mut told));
        told
    });
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut text).with_context(|| format!("`{line}` wrote no UTF-8"))?;
    }
    let used = child.wait4().with_context(|| format!("`{line}` was lost"))?;
    if !used.status.success() {
        let told = told.join().unwrap_or_default();
        bail!("`{line}` failed: {}\n{}", used.status, String::from_utf8_lossy(&told).trim_end());
    }
    Ok((text, used.rusage.maxrss))
}

/// Whether the command can be started and succeeds, silently.
pub fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Whether `program` is found on the PATH.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Runs one named part of a chore, prints what it took, and names it where it fails.
pub fn step<T>(name: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("\n== {name}");
    let start = Instant::now();
    let result = body();
    let took = start.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("== {name}: done in {took:.1} s"),
        Err(_) => eprintln!("== {name}: FAILED after {took:.1} s"),
    }
    result.with_context(|| format!("step `{name}` failed"))
}

/// The bytes of a file as lower-case hexadecimal SHA-256.
pub fn sha256(path: &Path) -> Result<String> {
    use sha2::Digest;
    let mut file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut hash = sha2::Sha256::new();
    std::io::copy(&mut file, &mut hash).with_context(|| path.display().to_string())?;
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// How busy the machine is: the mean number of running tasks over the last minute.
pub fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Figures taken on a busy machine are worth little; says so.
pub fn warn_if_busy() {
    if let Some(load) = load_average().filter(|&load| load > 0.3) {
        eprintln!("warning: the load average is {load:.2}; other work will disturb the figures");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The thread that starts it stands for a chore that is killed: the system looks at threads.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_program_ends_with_what_started_it() {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(shown(command("sleep").arg("600")), "sleep 600");
        let start = || {
            let mut child = command("sh").args(["-c", "echo; exec sleep 600"]).stdout(Stdio::piped()).spawn().unwrap();
            // By then it has asked to be ended.
            child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
            child
        };
        let mut child = std::thread::spawn(start).join().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(15));
    }

    #[test]
    fn output_comes_with_the_peak_of_memory() {
        let mut command = Command::new("python3");
        let (text, small) = output_and_peak(command.args(["-c", "print('done')"])).unwrap();
        assert_eq!(text, "done\n");
        let mut command = Command::new("python3");
        let (_, large) = output_and_peak(command.args(["-c", "b'x' * (320 << 20)"])).unwrap();
        // The peak of a program that was forked begins with what the other tests have in memory then.
        assert!(large > small + (160 << 20), "{large} and {small}");
        let mut command = Command::new("sh");
        let error = output_and_peak(command.args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("why") && error.contains('3'), "{error}");
    }
}
