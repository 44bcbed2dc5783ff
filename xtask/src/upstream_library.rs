//! The whole of unmodified llama.cpp as a library beside ours, `libsimlayer-upstream.so`: what simlayer does not run is run
//! there. It is compiled from the package that ggml comes from and shares ggml's libraries.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::prepare::Env;
use crate::sh;

/// Files of models that are compiled at once, as upstream's build does: their headers take longer than they.
const BATCH: usize = 40;

/// Compiles llama.cpp's `src` with the given compiler, unless that has been done, and returns the objects. `headers` is the
/// folder with `llama-version.h`.
pub fn objects(
    env: &Env,
    compiler: impl Fn() -> Command + Sync,
    source: &Path,
    headers: &Path,
) -> Result<Vec<PathBuf>> {
    let work = env.target_dir()?.join("upstream-library");
    let command = |input: &Path, object: &Path| {
        let mut command = compiler();
        // Numbers are ggml's business: this code is as fast for any processor.
        command.args(["-std=gnu++17", "-O2", "-fPIC", "-ffunction-sections", "-fdata-sections", "-w"]);
        command.args(["-DNDEBUG", "-D_GNU_SOURCE"]);
        for include in [&source.join("src"), &source.join("include"), &source.join("ggml/include"), headers] {
            command.arg("-I").arg(include);
        }
        command.arg("-c").arg(input).arg("-o").arg(object);
        command
    };
    let units = units(source)?;

    // What the objects were made by and of, written when all are there.
    let stamp = work.join("made-by.txt");
    let newest = newest(&[source.join("src"), source.join("include"), source.join("ggml/include")])?;
    let newest = newest.duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
    let version =
        std::fs::read_to_string(headers.join("llama-version.h")).context("ggml-sys writes llama-version.h")?;
    let made_by = format!("{}\n{version}{newest}\n{units:#?}\n", sh::shown(&command(Path::new("…"), Path::new("…"))));
    let objects: Vec<PathBuf> = units.iter().map(|unit| work.join(&unit.name).with_extension("o")).collect();
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == made_by) && objects.iter().all(|file| file.is_file())
    {
        return Ok(objects);
    }
    if work.exists() {
        std::fs::remove_dir_all(&work).with_context(|| work.display().to_string())?;
    }
    std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;

    eprintln!("compiling llama.cpp as a library of its own: {} objects", units.len());
    let queue = Mutex::new(units.iter().zip(&objects));
    let failed = Mutex::new(None);
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no thread panics with it").next();
                    let Some((unit, object)) = next else { break };
                    let compiled = unit.write(&work).and_then(|input| sh::output(&mut command(&input, object)));
                    if let Err(error) = compiled {
                        *failed.lock().expect("no thread panics with it") = Some(error);
                        break;
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().expect("the threads have ended") {
        return Err(error);
    }
    std::fs::write(&stamp, made_by)?;
    Ok(objects)
}

/// What is compiled in one go.
#[derive(Debug)]
struct Unit {
    name: String,
    files: Vec<PathBuf>,
}

impl Unit {
    /// A file that includes the unit's.
    fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(&self.name).with_extension("cpp");
        let text: String = self.files.iter().map(|file| format!("#include \"{}\"\n", file.display())).collect();
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

/// The files of `src` one by one, since some have functions of their own by the same names, and those of `src/models`
/// together.
fn units(source: &Path) -> Result<Vec<Unit>> {
    let own_name = |file: PathBuf| {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Unit { name, files: vec![file] }
    };
    let mut units: Vec<Unit> = sources(&source.join("src"))?.into_iter().map(own_name).collect();
    let models: Vec<PathBuf> = sources(&source.join("src/models"))?.into_iter().collect();
    let together = |(i, files): (usize, &[PathBuf])| Unit { name: format!("models-{i}"), files: files.to_vec() };
    units.extend(models.chunks(BATCH).enumerate().map(together));
    Ok(units)
}

/// The C++ files of a folder.
fn sources(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let paths: BTreeSet<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    Ok(paths.into_iter().filter(|path| path.extension() == Some(OsStr::new("cpp"))).collect())
}

/// When the newest file of the folders was written.
fn newest(folders: &[PathBuf]) -> Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for folder in folders {
        for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            newest = newest.max(match entry.file_type()?.is_dir() {
                true => self::newest(&[entry.path()])?,
                false => entry.metadata()?.modified()?,
            });
        }
    }
    Ok(newest)
}
