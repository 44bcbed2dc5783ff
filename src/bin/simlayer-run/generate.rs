//! The default command: continue a prompt.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use serde_json::json;
use simlayer::{AddBos, Sampler, SeqId, Session, Special, Token, Vocab};

use crate::{
    args::GenerateArgs,
    failure::Failure,
    interrupt,
    options::{self, Run},
    report,
    stream::{self, Stop, Until},
};

pub fn run(args: GenerateArgs) -> Result<(), Failure> {
    let limit = limit(args.n_predict)?;
    let json = args.output.json;
    let mut run = Run::settle(args.common)?;
    let prompt = options::prompt(args.prompt)?;
    let (model, load) = run.load()?;
    let mut session = run.session(&model)?;

    let tokens = tokenize(model.vocab(), &prompt)?;
    let n_ctx = session.n_ctx();
    if tokens.len() > n_ctx {
        return Err(Failure::run(format!(
            "the prompt has {} tokens, but the context holds only {n_ctx} (n_ctx): give a larger -c",
            tokens.len()
        )));
    }
    let mut sampler = Sampler::new(model.vocab(), &options::sampling(args.sampling, model.sampler_params(), n_ctx)?)?;
    // The penalties count the prompt as well.
    for &token in &tokens {
        sampler.accept(token)?;
    }

    let cache = args.prompt_cache.as_deref();
    let n_known = cache.map_or(Ok(0), |file| known(&mut session, file, &tokens))?;
    let mut out = interrupt::stdout();
    if args.display_prompt && !json {
        out.write_all(&prompt)?;
    }
    let keep = |session: &Session, wanted: bool| match cache.filter(|_| wanted && !args.prompt_cache_ro) {
        Some(file) => save(session, file),
        None => Ok(()),
    };
    let answer = stream::answer(
        &model,
        &mut session,
        &mut sampler,
        &tokens[n_known..],
        &Until { limit, stops: &args.reverse_prompt },
        |session| keep(session, !args.prompt_cache_all),
        |text| {
            if json {
                return Ok(());
            }
            out.write_all(text.as_bytes())?;
            out.flush()
        },
    )?;
    keep(&session, args.prompt_cache_all)?;
    // Nothing is at work any more.
    interrupt::unwatch();
    let kv = session.kv();
    if json {
        let object = json!({
            "prompt_tokens": tokens.len(),
            "read_tokens": tokens.len() - n_known,
            "generated_tokens": answer.tokens.len(),
            "text": answer.text,
            "tokens": answer.tokens,
            "stop": answer.stop,
            "seed": sampler.seed(),
            "kv": kv,
            "timings": report::timings_json(load, &answer.timings),
        });
        serde_json::to_writer(&mut out, &object)?;
    }
    if json || !answer.text.ends_with('\n') {
        writeln!(out)?;
    }
    out.flush()?;
    if answer.stop == Stop::Context {
        eprintln!("the context of {n_ctx} tokens is full; give a larger -c for more");
    }
    report::print(&answer.timings, &kv);
    if answer.stop == Stop::Interrupted { Err(Failure::Interrupted) } else { Ok(()) }
}

/// Takes up what the file has of the prompt, if it is there: how many of the prompt's tokens need not be read. The last one
/// is read in any case, since its logits are not in the file.
fn known(session: &mut Session, file: &Path, prompt: &[Token]) -> Result<usize, Failure> {
    let state = match fs::read(file) {
        Ok(state) => state,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Failure::run(format!("--prompt-cache {}: {error}", file.display()))),
    };
    let loaded = session.sequence(SeqId::default()).load(&state);
    loaded.map_err(|error| Failure::run(format!("--prompt-cache {}: {error}", file.display())))?;
    let sequence = session.sequence(SeqId::default());
    let common = sequence.tokens().iter().zip(prompt).take_while(|(a, b)| a == b).count();
    let n = common.min(prompt.len() - 1);
    if session.truncate(n) {
        return Ok(n);
    }
    // A lazy layer has dropped what would be needed.
    session.clear();
    Ok(0)
}

/// Writes what the session holds, whole or not at all.
fn save(session: &Session, file: &Path) -> Result<(), Failure> {
    let mut part = file.as_os_str().to_owned();
    part.push(".part");
    let write = || {
        let mut to = io::BufWriter::new(fs::File::create(&part)?);
        session.save_seq(SeqId::default(), &mut to)?;
        to.flush()?;
        fs::rename(&part, file)
    };
    write().map_err(|error| Failure::run(format!("--prompt-cache {}: {error}", file.display())))
}

/// The number of tokens to generate at most; `None` for no limit.
pub fn limit(n_predict: i64) -> Result<Option<u64>, Failure> {
    match n_predict {
        // -2 is llama.cpp's "until the context is full"; the context is never shifted here, so it is the same.
        -1 | -2 => Ok(None),
        n => u64::try_from(n).map(Some).map_err(|_| Failure::usage(format!("-n {n}: it must be -1 or more"))),
    }
}

/// The prompt's tokens, special ones included. An empty prompt is the token that begins a text.
pub fn tokenize(vocab: &Vocab, prompt: &[u8]) -> Result<Vec<Token>, Failure> {
    let mut tokens = vocab.tokenize_bytes(prompt, AddBos::Yes, Special::Parse)?;
    if tokens.is_empty() {
        let bos = vocab.bos().filter(|_| vocab.adds_bos());
        tokens.push(bos.ok_or_else(|| Failure::run("the prompt is empty"))?);
    }
    Ok(tokens)
}
