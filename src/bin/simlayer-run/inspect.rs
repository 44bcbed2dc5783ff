//! Scores each layer on a prompt and says what would be kept.

use std::io::Write;

use indicatif::HumanBytes;
use serde_json::json;
use simlayer::{
    KvReport, Model, Session,
    lazy::{Policy, default_threshold},
};

use crate::{
    args::InspectArgs,
    failure::Failure,
    generate, interrupt,
    options::{self, Run},
    plot::{self, Bar, Scores},
    report, stream,
};

pub fn run(args: InspectArgs) -> Result<(), Failure> {
    if let Some(path) = &args.plot {
        plot::check_name(path)?;
    }
    let mut run = Run::settle(args.common)?;
    let prompt = options::prompt(args.prompt)?;
    let (model, _) = run.load()?;
    let tokens = generate::tokenize(model.vocab(), &prompt)?;
    let mut session = run.session(&model)?;
    let policy = session.policy().clone();
    // Some rules need no scores; they are of interest all the same.
    let scores: Option<Vec<Option<f32>>> = match policy {
        Policy::Threshold(_) | Policy::Budget(_) | Policy::Output(_) | Policy::Kl(_) | Policy::Auto => None,
        _ => {
            let mut params = run.session.clone();
            params.lazy.policy = Policy::Threshold(Some(1.0));
            let mut scoring = Session::new(&model, params)?;
            stream::prefill(&mut scoring, &tokens)?;
            Some(scoring.layers(0).iter().map(|layer| layer.score).collect())
        }
    };
    stream::prefill(&mut session, &tokens)?;
    let mut layers = session.layers(0);
    for (layer, score) in layers.iter_mut().zip(scores.into_iter().flatten()) {
        layer.score = score;
    }
    let kv = session.kv();
    let threshold = threshold(&policy, &model);

    let mut out = interrupt::stdout();
    if args.output.json {
        let object = json!({
            "layers": layers,
            "kv": kv,
            "model": model.name(),
            "lazy": policy.to_string(),
            "threshold": threshold,
            "prompt_tokens": tokens.len(),
        });
        report::write_json(&mut out, &object)?;
    } else {
        let has_states = layers.iter().any(|layer| layer.state_bytes > 0);
        let state_title = if has_states { "state" } else { "" };
        writeln!(out, "{:>5} {:>7}  {:<11} {:>11} {state_title:>11}", "layer", "score", "kind", "cache")?;
        for layer in &layers {
            let score = layer.score.map_or("–".to_owned(), |score| format!("{score:.4}"));
            let bytes = HumanBytes(layer.kv_bytes as u64).to_string();
            let state = if has_states { HumanBytes(layer.state_bytes as u64).to_string() } else { String::new() };
            let kind = match layer.shares {
                Some(owner) => format!("{} ({owner})", layer.kind),
                None => layer.kind.to_string(),
            };
            writeln!(out, "{:>5} {score:>7}  {kind:<11} {bytes:>11} {state:>11}", layer.index)?;
        }
    }
    out.flush()?;
    if layers.iter().all(|layer| layer.score.is_none()) {
        eprintln!("the prompt is within sink and window: nothing would be dropped, so no layer is scored");
    }
    eprintln!(
        "{policy}: {} of {} layers lazy{}, KV cache {} for {} tokens (full f16: {}, {})",
        kv.lazy_layers,
        layers.len(),
        report::foretold(&kv),
        HumanBytes(kv.allocated_bytes as u64),
        kv.context_tokens,
        HumanBytes(kv.f16_bytes as u64),
        report::compression(kv.compression),
    );
    if let Some(path) = &args.plot {
        let picture = Scores {
            title: title(&model, &policy, &kv),
            bars: layers.iter().map(|layer| Bar { score: layer.score, lazy: layer.lazy }).collect(),
            threshold,
            measure: policy.measure(),
        };
        plot::write(path, &picture)?;
    }
    Ok(())
}

fn title(model: &Model, policy: &Policy, kv: &KvReport) -> String {
    let policy = match policy {
        Policy::Layers(_) => "a known set".to_owned(),
        policy => policy.to_string(),
    };
    let name = model.name().unwrap_or("model");
    let saved = match kv.compression {
        1.0.. => format!("{:.2} × smaller", kv.compression),
        _ => "nothing saved yet".to_owned(),
    };
    format!("{name}: {policy}, {} tokens, {} lazy, {saved}", kv.context_tokens, kv.lazy_layers)
}

/// The τ above which a layer is lazy, where that is the rule.
fn threshold(policy: &Policy, model: &Model) -> Option<f32> {
    let hparams = model.hparams();
    let default = || default_threshold(&hparams.architecture, model.name(), hparams.rope.freq_base);
    match policy {
        Policy::Threshold(given) => Some(given.unwrap_or_else(default)),
        _ => None,
    }
}
