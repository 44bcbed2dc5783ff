//! Fits the map that `--prune` goes by, and writes it.

use std::{io::Write, time::Instant};

use serde_json::json;
use simlayer::{
    lazy::PruneMap,
    quality::{PRUNING_TEXTS, Repeated, fit_pruning},
};

use crate::{args::CalibrateArgs, failure::Failure, interrupt, options, options::Run, progress::Progress, report};

/// Pieces of text that are read, when nothing is said.
const PIECES: usize = 8;

pub fn run(args: CalibrateArgs) -> Result<(), Failure> {
    let mut run = Run::settle(args.common)?;
    let own = args.file.as_deref().map(options::text).transpose()?;
    let texts = options::texts(own.as_deref(), &PRUNING_TEXTS);
    let (model, load) = run.load()?;
    let n_ctx = model.hparams().n_ctx_train;
    let pieces = Repeated::pieces(model.vocab(), &texts, n_ctx, args.chunks.unwrap_or(PIECES))?;
    let n_tokens: usize = pieces.iter().map(Repeated::n_tokens).sum();

    let start = Instant::now();
    interrupt::watch();
    let progress = Progress::new(format!("{n_tokens} tokens and their repetition"));
    let fitted = fit_pruning(&model, &run.session, &pieces, &mut |share| progress.set(share));
    drop(progress);
    let (map, fitted) = fitted?;
    let output = options::output(args.output_file, PruneMap::path_for(&run.model_path, model.identity()))?;
    map.write(&output).map_err(Failure::run)?;
    let took = start.elapsed();

    let mut out = interrupt::stdout();
    if args.output.json {
        let object = json!({
            "layers": fitted,
            "bound": map.bound,
            "kept": map.kept,
            "tokens": n_tokens,
            "model": model.name(),
            "file": output,
            "timings": { "load_ms": report::milliseconds(load), "calibrate_ms": report::milliseconds(took) },
        });
        report::write_json(&mut out, &object)?;
    } else {
        writeln!(out, "{:>5} {:>7} {:>7}", "layer", "R²", "kept")?;
        for layer in &fitted {
            writeln!(out, "{:>5} {:>7.3} {:>5.0} %", layer.index, layer.r2, 100.0 * layer.kept)?;
        }
        let kept = 100.0 * map.kept;
        writeln!(out, "\n--prune auto is --prune {:.3}: {kept:.0} % of these {n_tokens} tokens' rows", map.bound)?;
    }
    out.flush()?;
    eprintln!("{} written in {:.0} s", output.display(), took.as_secs_f64());
    Ok(())
}
