//! How well the model predicts a text after a prompt, and how far the compressed run is from the uncompressed one.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    time::Instant,
};

use serde_json::{Value, json};
use simlayer::{
    AddBos, Model, Session, Special, Token, Vocab,
    lazy::Policy,
    quality::{self, Compared, Contender, Scorer, Summary, Tally},
};

use crate::{
    args::PerplexityArgs,
    failure::Failure,
    interrupt,
    options::{self, Run},
    plot::{self, LinePanel, Lines},
    progress::Progress,
    report,
    stream::Timings,
};

pub fn run(args: PerplexityArgs) -> Result<(), Failure> {
    let mut run = Run::settle(args.common)?;
    let text = options::text(&args.file)?;
    let (model, load) = run.load()?;
    if let Some(path) = &args.plot {
        plot::check_name(path)?;
    }
    if !args.compare.is_empty() {
        let extent = (args.skip, args.score, args.score_batch);
        let comparison = Comparison { rules: &args.compare, plot: args.plot.as_deref(), json: args.output.json };
        return compare(&run, &model, &text, extent, &comparison);
    }
    let mut session = run.session(&model)?;
    let mut base = match args.kl {
        true => Some(Session::new(&model, quality::uncompressed(&run.session))?),
        false => None,
    };
    let tokens = model.vocab().tokenize_bytes(&text, AddBos::Yes, Special::Text)?;
    let (skip, score) = extent(args.skip, args.score, tokens.len(), session.n_ctx())?;
    let chunks = chunks(model.vocab(), &tokens, skip + score, args.chunks)?;

    let mut tally = Tally::default();
    let mut timings = Timings::default();
    let progress = Progress::new(format!("{} tokens", chunks.len() * (skip + score)));
    let n_chunks = chunks.len() as f32;
    for (i, chunk) in chunks.iter().enumerate() {
        // Reading the prompt takes most of the time; with --kl it is read twice.
        let show = |from: f32, part: f32, share: f32| progress.set((i as f32 + from + part * share) / n_chunks);
        let mut base_run = match &mut base {
            Some(base) => Some(Scorer::start(base, chunk, skip, args.score_batch, &mut |share| show(0.0, 0.4, share))?),
            None => None,
        };
        let read = if base_run.is_some() { 0.4 } else { 0.8 };
        let start = Instant::now();
        let mut scored = Scorer::start(&mut session, chunk, skip, args.score_batch, &mut |share| {
            show(0.8 - read, read, share);
        })?;
        timings.prefill += start.elapsed();
        let start = Instant::now();
        tally.score(&mut scored, base_run.as_mut(), &mut |share| show(0.8, 0.2, share))?;
        timings.decode += start.elapsed();
        timings.prefilled += skip;
        timings.decoded += score;
    }
    drop(progress);

    let summary = tally.summary();
    let kv = session.kv();
    let mut out = interrupt::stdout();
    if args.output.json {
        let lazy: Vec<usize> = session.layers(0).iter().filter(|layer| layer.lazy).map(|layer| layer.index).collect();
        let mut object = serde_json::to_value(&summary)?;
        if let Value::Object(fields) = &mut object {
            fields.insert("skip".to_owned(), skip.into());
            fields.insert("score".to_owned(), score.into());
            fields.insert("chunks".to_owned(), chunks.len().into());
            fields.insert("model".to_owned(), json!(model.name()));
            fields.insert("lazy".to_owned(), run.session.lazy.policy.to_string().into());
            fields.insert("lazy_layers".to_owned(), json!(lazy));
            fields.insert("kv".to_owned(), json!(kv));
            fields.insert("timings".to_owned(), report::timings_json(load, &timings));
        }
        report::write_json(&mut out, &object)?;
    } else {
        print(&mut out, &summary)?;
    }
    out.flush()?;
    report::print(&timings, &kv);
    Ok(())
}

/// What is compared, and how it is shown.
struct Comparison<'a> {
    rules: &'a [Contender],
    plot: Option<&'a Path>,
    json: bool,
}

/// Tokens to skip and to score as they were asked for, and how many are fed at once.
type Extent = (Option<usize>, Option<usize>, usize);

/// One text under several rules.
fn compare(
    run: &Run,
    model: &Model,
    text: &[u8],
    (skip, score, batch): Extent,
    args: &Comparison<'_>,
) -> Result<(), Failure> {
    let Comparison { rules, plot, json } = *args;
    let tokens = model.vocab().tokenize_bytes(text, AddBos::Yes, Special::Text)?;
    let n_ctx = match run.session.n_ctx {
        0 => model.hparams().n_ctx_train,
        n => n,
    };
    let (skip, score) = extent(skip, score, tokens.len(), n_ctx)?;
    interrupt::watch();
    let progress = Progress::new(format!("{} tokens under {} rules", skip + score, rules.len()));
    let compared =
        quality::compare(model, &run.session, rules, (&tokens[..skip + score], skip, batch), &mut |share| {
            progress.set(share)
        })?;
    drop(progress);
    if let Some(path) = plot {
        plot::write(path, &picture(model, rules, &compared))?;
    }
    let mut out = interrupt::stdout();
    if json {
        let object = json!({
            "runs": compared,
            "skip": skip,
            "score": score,
            "model": model.name(),
        });
        return report::write_json(&mut out, &object);
    }
    let width = compared.iter().map(|run| run.lazy.len()).max().unwrap_or(0).max(4);
    writeln!(
        out,
        "{:width$} {:>5} {:>12} {:>6} {:>11} {:>9} {:>9} {:>9} {:>9}",
        "rule", "lazy", "KV bytes", "×", "perplexity", "KL", "±", "99.9 %", "same top"
    )?;
    for run in &compared {
        let Summary { kl_mean, kl_stderr, kl_p999, .. } = run.summary;
        let [kl, stderr, p999] = [kl_mean, kl_stderr, kl_p999].map(|value| value.unwrap_or(0.0));
        writeln!(
            out,
            "{:width$} {:>5} {:>12} {:>6} {:>11.4} {kl:>9.5} {stderr:>9.5} {p999:>9.4} {:>7.2} %",
            run.lazy,
            run.lazy_layers.len(),
            run.kv_bytes,
            report::times(run.compression),
            run.summary.perplexity,
            run.summary.same_top.unwrap_or(1.0) * 100.0,
        )?;
    }
    Ok(())
}

/// Memory and loss against τ where thresholds were compared, else loss against memory, with a line for each kind of rule.
fn picture(model: &Model, rules: &[Contender], compared: &[Compared]) -> Lines {
    let parameter = |rule: &Contender| match &rule.policy {
        Policy::Threshold(Some(threshold)) => Some(f64::from(*threshold)),
        _ => None,
    };
    let thresholds: Option<Vec<f64>> = rules.iter().map(parameter).collect();
    let mib = |run: &Compared| run.kv_bytes as f64 / f64::from(1 << 20);
    let kl = |run: &Compared| run.summary.kl_mean.unwrap_or(0.0);
    let perplexity = |run: &Compared| run.summary.perplexity;
    let lines = |x: &dyn Fn(usize) -> f64, y: &dyn Fn(&Compared) -> f64| {
        let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for (i, run) in compared.iter().enumerate() {
            let kind = run.lazy.split(':').next().unwrap_or_default().to_owned();
            lines.entry(kind).or_default().push((x(i), y(run)));
        }
        for points in lines.values_mut() {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        lines.into_iter().collect()
    };
    let panel = |name: &str, x: &dyn Fn(usize) -> f64, y: &dyn Fn(&Compared) -> f64| LinePanel {
        y_name: name.to_owned(),
        lines: lines(x, y),
    };
    let (x_name, panels) = match &thresholds {
        Some(thresholds) => {
            let x = |i: usize| thresholds[i];
            let panels = vec![
                panel("KV cache, MiB", &x, &mib),
                panel("perplexity", &x, &perplexity),
                panel("KL divergence", &x, &kl),
            ];
            ("threshold τ", panels)
        }
        None => {
            let x = |i: usize| mib(&compared[i]);
            ("KV cache, MiB", vec![panel("KL divergence", &x, &kl), panel("perplexity", &x, &perplexity)])
        }
    };
    let name = model.name().unwrap_or("model");
    let base = compared.first().and_then(|run| run.summary.base_perplexity);
    let base = base.map_or(String::new(), |base| format!(" (uncompressed perplexity {base:.3})"));
    Lines { title: format!("{name}{base}"), x_name: x_name.to_owned(), panels }
}

fn print(out: &mut impl Write, summary: &Summary) -> io::Result<()> {
    let Summary { tokens_scored, nll, perplexity, perplexity_stderr, .. } = summary;
    writeln!(out, "tokens scored  {tokens_scored}")?;
    writeln!(out, "nll            {nll:.5}")?;
    writeln!(out, "perplexity     {perplexity:.4} ± {perplexity_stderr:.4}")?;
    if let Some(base) = summary.base_perplexity {
        writeln!(out, "uncompressed   {base:.4} ({:+.2} %)", (perplexity / base - 1.0) * 100.0)?;
    }
    if let (Some(mean), Some(stderr)) = (summary.kl_mean, summary.kl_stderr)
        && let (Some(p999), Some(max)) = (summary.kl_p999, summary.kl_max)
    {
        writeln!(out, "KL divergence  {mean:.6} ± {stderr:.6}, 99.9 % at most {p999:.4}, all at most {max:.4}")?;
    }
    if let Some(same) = summary.same_top {
        writeln!(out, "same top token {:.2} %", same * 100.0)?;
    }
    Ok(())
}

/// Tokens to skip and to score of each chunk.
fn extent(skip: Option<usize>, score: Option<usize>, n: usize, n_ctx: usize) -> Result<(usize, usize), Failure> {
    let room = n.min(n_ctx);
    let skip = skip.unwrap_or(room.saturating_sub(score.unwrap_or(room / 2)));
    let score = score.unwrap_or(room.saturating_sub(skip));
    if skip == 0 || score == 0 || skip + score > n {
        let needed = skip.max(1) + score.max(1);
        return Err(Failure::run(format!(
            "the text has {n} tokens, too few to skip {skip} and score {score}: give one of at least {needed}, or other \
             --skip and --score"
        )));
    }
    if skip + score > n_ctx {
        return Err(Failure::run(format!(
            "--skip {skip} and --score {score} need a context of {} tokens, but it holds {n_ctx}: give -c",
            skip + score
        )));
    }
    Ok((skip, score))
}

/// The text's first chunks of `size` tokens. Each begins with the token that begins a text, in place of its own first
/// token, where the model wants one (as llama-perplexity does).
fn chunks(vocab: &Vocab, tokens: &[Token], size: usize, n: usize) -> Result<Vec<Vec<Token>>, Failure> {
    let whole = tokens.len() / size;
    if n > whole {
        return Err(Failure::run(format!(
            "the text has {} tokens, enough for {whole} chunks of {size}, not for {n}",
            tokens.len()
        )));
    }
    let bos = vocab.bos().filter(|_| vocab.adds_bos());
    let chunk = |chunk: &[Token]| match bos {
        Some(bos) => std::iter::once(bos).chain(chunk[1..].iter().copied()).collect(),
        None => chunk.to_vec(),
    };
    Ok(tokens.chunks_exact(size).take(n).map(chunk).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_skipped_and_scored() {
        let extent = |skip, score, n, n_ctx| extent(skip, score, n, n_ctx).ok();
        assert_eq!(extent(Some(3), Some(2), 10, 100), Some((3, 2)));
        assert_eq!(extent(None, None, 10, 100), Some((5, 5)));
        assert_eq!(extent(None, None, 100, 10), Some((5, 5)));
        assert_eq!(extent(Some(4), None, 10, 100), Some((4, 6)));
        assert_eq!(extent(None, Some(3), 10, 100), Some((7, 3)));
        assert_eq!(extent(Some(8), Some(3), 10, 100), None);
        assert_eq!(extent(Some(8), Some(2), 10, 9), None);
        assert_eq!(extent(None, Some(10), 10, 100), None);
        assert_eq!(extent(None, None, 1, 100), None);
    }
}
