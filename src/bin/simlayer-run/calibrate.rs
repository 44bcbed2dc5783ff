//! Measures what each layer's shrinking costs, and writes the model's profile.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::json;
use simlayer::{
    AddBos, Model, SessionParams, Special,
    lazy::{Cut, Profile},
    quality::{self, BUILT_IN_TEXTS, Excerpts, Extent, Journal},
};

use crate::{
    args::CalibrateArgs,
    failure::Failure,
    interrupt,
    options::{self, Run},
    progress::Progress,
    report,
};

/// Tokens of the text that are scored in each excerpt, when nothing is said.
const N_SCORE: usize = 160;
/// Tokens of a prompt, when nothing is said and the context holds them.
const N_PROMPT: usize = 8_000;
/// Excerpts of a text, when nothing is said and it is as long.
const MAX_CHUNKS: usize = 2;
/// What a question and its answer take of the context, at most.
const QUESTION: usize = 80;

pub fn run(args: CalibrateArgs) -> Result<(), Failure> {
    let wanted = Wanted::of(&args)?;
    let mut run = Run::settle(args.common)?;
    let (model, load) = run.load()?;
    let excerpts = wanted.excerpts(&model, &run.session)?;
    let output = options::output(args.output_file, Profile::path_for(&run.model_path, model.identity()))?;

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
        report::write_json(&mut out, &object)?;
    } else {
        print(&mut out, &profile)?;
    }
    out.flush()?;
    eprintln!("{} written in {:.0} s", output.display(), took.as_secs_f64());
    tell_of_another(&run.model_path, &output);
    Ok(())
}

/// Says so where the profile that was written is not the one that will be taken.
pub fn tell_of_another(model: &Path, output: &Path) {
    let beside = Profile::path_beside(model);
    if beside.is_file() && beside != output {
        eprintln!("{} lies beside the model, and is taken before it", beside.display());
    }
}

/// What is asked of the excerpts.
pub struct Wanted {
    /// In place of the built-in texts.
    own: Option<Vec<u8>>,
    asked: (Option<usize>, Option<usize>, Option<usize>),
    n_questions: usize,
}

impl Wanted {
    pub fn of(args: &CalibrateArgs) -> Result<Wanted, Failure> {
        let own = args.file.as_deref().map(options::text).transpose()?;
        Ok(Wanted { own, asked: (args.skip, args.score, args.chunks), n_questions: args.questions })
    }

    pub fn excerpts(&self, model: &Model, params: &SessionParams) -> Result<Excerpts, Failure> {
        let texts = options::texts(self.own.as_deref(), &BUILT_IN_TEXTS);
        let n_ctx = if params.n_ctx == 0 { model.hparams().n_ctx_train } else { params.n_ctx };
        let mut lengths = Vec::new();
        for text in &texts {
            lengths.push(model.vocab().tokenize_bytes(text, AddBos::Yes, Special::Text)?.len());
        }
        let shortest = lengths.into_iter().min().unwrap_or(0);
        let extent = extent(self.asked, self.n_questions, shortest, n_ctx);
        Ok(Excerpts::compose(model.vocab(), &texts, extent)?)
    }
}

/// Where measurements are kept until the profile is written.
fn part(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

fn journal(output: &Path, model: &Model, params: &SessionParams, excerpts: &Excerpts) -> Journal {
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
    writeln!(out, "{:>5} {:>10} {:>10} {:>7}", "layer", "harm (KL)", "answers", "mass")?;
    for &index in &profile.order {
        if let Some(layer) = profile.layers.iter().find(|layer| layer.index == index) {
            let answers = nats(layer.harm_nll);
            writeln!(out, "{index:>5} {:>10.5} {answers:>10} {:>7.3}", layer.harm_kl, layer.mass)?;
        }
    }
    writeln!(out, "\nwhat can be had:")?;
    writeln!(out, "{:>5} {:>10} {:>10} {:>12}", "lazy", "KL", "answers", "compression")?;
    for cut in &profile.cuts {
        let (answers, times) = (nats(cut.nll_mean), report::times(cut.compression));
        write!(out, "{:>5} {:>10.5} {answers:>10} {times:>10} ×", cut.lazy, cut.kl_mean)?;
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

/// The rise of answers' negative log-likelihood, where there are answers.
pub fn nats(rise: Option<f64>) -> String {
    rise.map_or(String::new(), |nats| format!("{nats:+.4}"))
}

/// How many layers of a cut have which window.
fn windows(cut: &Cut) -> String {
    let sizes: BTreeSet<usize> = cut.windows.iter().copied().collect();
    let count = |size| cut.windows.iter().filter(|&&window| window == size).count();
    let counts: Vec<String> = sizes.into_iter().map(|size| format!("{} × {size}", count(size))).collect();
    format!("windows {}", counts.join(", "))
}

/// What is read of a text of `n` tokens in a context of `n_ctx`, where prompt, score and excerpts may be asked for.
fn extent(asked: (Option<usize>, Option<usize>, Option<usize>), n_questions: usize, n: usize, n_ctx: usize) -> Extent {
    let (skip, score, chunks) = asked;
    let n_score = score.unwrap_or(N_SCORE.min(n / 4));
    let room = n_ctx.saturating_sub(n_score + QUESTION * n_questions).min(N_PROMPT);
    let n_prompt = skip.unwrap_or(match n_questions {
        0 => (n / chunks.unwrap_or(1)).saturating_sub(n_score).min(room),
        _ => room,
    });
    let text = if n_questions == 0 { n_prompt } else { n_prompt / 2 };
    let n_excerpts = chunks.unwrap_or((n / (text + n_score).max(1)).clamp(1, MAX_CHUNKS));
    Extent { n_prompt, n_score, n_excerpts, n_questions }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents() {
        let extent = |asked, n_questions, n| {
            let Extent { n_prompt, n_score, n_excerpts, .. } = extent(asked, n_questions, n, 8_192);
            (n_prompt, n_score, n_excerpts)
        };
        // A prompt is half notes, so that a short text does; without questions it is the text alone.
        assert_eq!(extent((None, None, None), 4, 2_965), (7_712, 160, 1));
        assert_eq!(extent((None, None, None), 4, 20_000), (7_712, 160, 2));
        assert_eq!(extent((None, None, None), 0, 2_965), (2_805, 160, 1));
        assert_eq!(extent((None, None, None), 0, 20_000), (8_000, 160, 2));
        assert_eq!(extent((None, None, Some(2)), 0, 2_000), (840, 160, 2));
        assert_eq!(extent((Some(100), Some(20), None), 0, 250), (100, 20, 2));
        assert_eq!(extent((Some(100), Some(20), Some(3)), 8, 250), (100, 20, 3));
    }
}
