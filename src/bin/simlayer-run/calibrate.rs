//! Measures what each layer's shrinking costs, and writes the model's profile.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::json;
use simlayer::{
    AddBos, Model, SessionParams, Special, Token,
    lazy::{Cut, Profile},
    quality::{self, BUILT_IN_TEXT, Excerpts, Journal},
};

use crate::{
    args::CalibrateArgs,
    failure::Failure,
    interrupt,
    options::{self, Run},
    progress::Progress,
    report,
};

/// Tokens that are scored of each excerpt, when nothing is said.
const N_SCORE: usize = 384;
/// Longer prompts are cut into excerpts, when nothing is said.
const N_PROMPT: usize = 3_000;
/// Excerpts that are taken at most, when nothing is said.
const MAX_CHUNKS: usize = 4;

pub fn run(args: CalibrateArgs) -> Result<(), Failure> {
    let run = Run::settle(args.common)?;
    let text = match &args.file {
        Some(path) => options::text(path)?,
        None => BUILT_IN_TEXT.trim_end().as_bytes().to_vec(),
    };
    let (model, load) = run.load()?;
    let tokens = model.vocab().tokenize_bytes(&text, AddBos::Yes, Special::Text)?;
    let (n_prompt, size, chunks) = extent(args.skip, args.score, args.chunks, tokens.len())?;
    let output = match args.output_file {
        Some(path) => path,
        None => users_place(&run.model_path, &model)?,
    };

    let excerpts: Vec<Vec<Token>> = tokens.chunks_exact(size).take(chunks).map(<[Token]>::to_vec).collect();
    let excerpts = Excerpts { text: &text, excerpts, n_prompt };
    let start = std::time::Instant::now();
    let mut journal = journal(&output, &model, &run.session, &excerpts);
    interrupt::watch();
    let progress = Progress::new("the prompt");
    let result = quality::calibrate_on(
        &model,
        &run.session,
        &excerpts,
        args.windows.as_deref().unwrap_or_default(),
        &mut journal,
        &mut |stage| {
            progress.say(stage.what);
            progress.set_with(stage.share, stage.left);
        },
    );
    drop(progress);
    let profile = match result {
        Ok(profile) => profile,
        Err(error) => {
            if journal.is_empty() {
                journal.remove()?;
            } else if journal.is_kept() {
                let (n, path) = (journal.len(), part(&output));
                eprintln!("{n} measurements are kept in {}; the same command goes on from there", path.display());
            }
            return Err(error.into());
        }
    };
    let took = start.elapsed();
    profile.write(&output).map_err(Failure::run)?;
    journal.remove()?;

    let mut out = interrupt::stdout();
    if args.output.json {
        let object = json!({
            "layers": profile.layers,
            "order": profile.order,
            "cuts": profile.cuts,
            "model": model.name(),
            "text": profile.text,
            "file": output,
            "timings": { "load_ms": report::milliseconds(load), "calibrate_ms": report::milliseconds(took) },
        });
        serde_json::to_writer(&mut out, &object)?;
        writeln!(out)?;
    } else {
        print(&mut out, &profile)?;
    }
    out.flush()?;
    eprintln!("{} written in {:.0} s", output.display(), took.as_secs_f64());
    let beside = Profile::path_beside(&run.model_path);
    if beside.is_file() && beside != output {
        eprintln!("{} lies beside the model, and is taken before it", beside.display());
    }
    Ok(())
}

/// The model's place in the user's folder of profiles, which is made.
fn users_place(model_path: &Path, model: &Model) -> Result<PathBuf, Failure> {
    let path = Profile::path_for(model_path, model.identity());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| Failure::run(format!("{}: {error}", folder.display())))?;
    }
    Ok(path)
}

/// Where measurements are kept until the profile is written.
fn part(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

fn journal(output: &Path, model: &Model, params: &SessionParams, excerpts: &Excerpts<'_>) -> Journal {
    // What goes to a pipe or a device has no place beside it.
    if output.exists() && !output.is_file() {
        return Journal::none();
    }
    let path = part(output);
    match Journal::open(&path, model, params, excerpts) {
        Ok(journal) => {
            if journal.replaced() {
                eprintln!("{} was of another calibration and is begun anew", path.display());
            } else if !journal.is_empty() {
                eprintln!("going on from {} measurements in {}", journal.len(), path.display());
            }
            journal
        }
        Err(error) => {
            eprintln!("what is measured cannot be kept: {error}");
            Journal::none()
        }
    }
}

fn print(out: &mut impl Write, profile: &Profile) -> io::Result<()> {
    writeln!(out, "layers, the least harmful first:")?;
    writeln!(out, "{:>5} {:>10} {:>7}", "layer", "harm (KL)", "mass")?;
    for &index in &profile.order {
        if let Some(layer) = profile.layers.iter().find(|layer| layer.index == index) {
            writeln!(out, "{index:>5} {:>10.5} {:>7.3}", layer.harm_kl, layer.mass)?;
        }
    }
    writeln!(out, "\nwhat can be had:")?;
    writeln!(out, "{:>5} {:>10} {:>12}", "lazy", "KL", "compression")?;
    for cut in &profile.cuts {
        write!(out, "{:>5} {:>10.5} {:>10} ×", cut.lazy, cut.kl_mean, report::times(cut.compression))?;
        if let Some(one) = cut.kl_mean_one_window {
            write!(out, "   {} (KL {one:.5} with one window)", windows(cut))?;
        }
        writeln!(out)?;
    }
    writeln!(out)?;
    for most in [0.005, 0.01, 0.02, 0.05] {
        if let Some(cut) = profile.cuts.iter().rfind(|cut| cut.kl_mean <= most) {
            let (lazy, times) = (cut.lazy, report::times(cut.compression));
            writeln!(out, "--lazy profile:kl={most}: {lazy} layers lazy, {times} × at this length")?;
        }
    }
    for least in [1.5, 2.0] {
        if let Some(cut) = profile.cuts.iter().find(|cut| cut.compression >= least) {
            let share = cut.lazy as f64 / profile.order.len() as f64;
            writeln!(out, "{least} × less memory: --lazy profile:{share:.2}, KL {:.5}", cut.kl_mean)?;
        }
    }
    Ok(())
}

/// How many layers of a cut have which window.
fn windows(cut: &Cut) -> String {
    let sizes: BTreeSet<usize> = cut.windows.iter().copied().collect();
    let count = |size| cut.windows.iter().filter(|&&window| window == size).count();
    let counts: Vec<String> = sizes.into_iter().map(|size| format!("{} × {size}", count(size))).collect();
    format!("windows {}", counts.join(", "))
}

/// Tokens of an excerpt's prompt, of an excerpt, and the number of excerpts.
fn extent(
    skip: Option<usize>,
    score: Option<usize>,
    chunks: Option<usize>,
    n: usize,
) -> Result<(usize, usize, usize), Failure> {
    let score = score.unwrap_or(N_SCORE.min(n / 4));
    let skip = skip.unwrap_or((n / chunks.unwrap_or(1)).saturating_sub(score).min(N_PROMPT));
    let size = skip + score;
    let whole = n / size.max(1);
    let wanted = chunks.unwrap_or(whole.min(MAX_CHUNKS)).max(1);
    if skip == 0 || score == 0 || wanted > whole {
        return Err(Failure::run(format!(
            "the text has {n} tokens, too few for {wanted} excerpts of {skip} and {score}: give a longer one, or other \
             --skip, --score and --chunks"
        )));
    }
    Ok((skip, size, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts() {
        let extent = |skip, score, chunks, n| extent(skip, score, chunks, n).ok();
        assert_eq!(extent(None, None, None, 2_965), Some((2_581, 2_965, 1)));
        assert_eq!(extent(None, None, None, 20_000), Some((3_000, 3_384, 4)));
        assert_eq!(extent(None, None, Some(2), 2_000), Some((616, 1_000, 2)));
        assert_eq!(extent(Some(100), Some(20), None, 250), Some((100, 120, 2)));
        assert_eq!(extent(Some(100), Some(20), Some(3), 250), None);
        assert_eq!(extent(None, None, None, 3), None);
    }
}
