//! Unmodified llama.cpp, driven through its C API, as a process of its own.
//!
//! Two copies of ggml must not meet in one process, so simlayer's tests start this program and talk
//! to it through files and JSON: tokens come in as JSON files, logits go out as little-endian f32,
//! and stdout carries exactly one JSON object.

mod attention;
mod llama;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use attention::{MassSums, Restriction};
use llama::{AttentionHook, Context, ContextOptions, Model, Outputs, Sampler, Token};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Show all of llama.cpp's messages, not only warnings and errors.
    #[arg(long, global = true)]
    verbose: bool,
    /// Leave weights as the file has them, as they are on a device.
    #[arg(long, global = true)]
    no_repack: bool,
}

#[derive(Subcommand)]
enum Command {
    /// What the model says of itself.
    Info {
        #[arg(short, long)]
        model: PathBuf,
    },
    /// Texts to token ids.
    Tokenize {
        #[arg(short, long)]
        model: PathBuf,
        /// JSON: a list of strings, or of lists of bytes.
        #[arg(long = "in")]
        input: PathBuf,
        /// Do not add the model's BOS and EOS.
        #[arg(long)]
        no_special: bool,
        /// Read special tokens written out in the text.
        #[arg(long)]
        parse_special: bool,
    },
    /// Token ids to texts.
    Detokenize {
        #[arg(short, long)]
        model: PathBuf,
        /// JSON: a list of lists of token ids.
        #[arg(long = "in")]
        input: PathBuf,
        /// Leave out the BOS and EOS that tokenizing adds.
        #[arg(long)]
        remove_special: bool,
        /// Write special tokens out.
        #[arg(long)]
        unparse_special: bool,
        /// Each token on its own (`llama_token_to_piece`).
        #[arg(long)]
        pieces: bool,
    },
    /// Logits after each prompt, as rows of n_vocab f32.
    Logits {
        #[command(flatten)]
        run: RunArgs,
        /// JSON: a list of prompts, each a list of token ids.
        #[arg(long = "in")]
        input: PathBuf,
        #[arg(long)]
        out: PathBuf,
        /// A row for every prompt token, not only for the last.
        #[arg(long)]
        all: bool,
        /// JSON: for each prompt a list of tokens to feed one by one after it, each giving a row.
        #[arg(long)]
        decode: Option<PathBuf>,
    },
    /// Logits of rows of embeddings among tokens, and of each token behind them, as rows of n_vocab f32.
    Given {
        #[command(flatten)]
        run: RunArgs,
        /// JSON: `before` and `after`, lists of token ids; `positions` of the rows, all first ones, then all second ones and
        /// so on, and `next`, the position of the first token behind them; `non_causal`.
        #[arg(long = "in")]
        input: PathBuf,
        /// The rows, little-endian f32.
        #[arg(long)]
        rows: PathBuf,
        #[arg(long)]
        out: PathBuf,
    },
    /// Greedy continuations; end-of-generation tokens do not stop them.
    Greedy {
        #[command(flatten)]
        run: RunArgs,
        #[arg(long = "in")]
        input: PathBuf,
        /// Tokens to generate for each prompt.
        #[arg(short, long, default_value_t = 64)]
        n_predict: usize,
    },
    /// This process's memory after it did what llama-simple does.
    Rss {
        #[arg(short, long)]
        model: PathBuf,
        /// Tokens to generate.
        #[arg(short, long, default_value_t = 10)]
        n_predict: usize,
        #[arg(short, long, default_value = "Hello my name is")]
        prompt: String,
        #[arg(short, long)]
        threads: Option<usize>,
    },
    /// Attention mass on sink and window, per layer, of the last prompt tokens.
    Scores {
        #[command(flatten)]
        run: RunArgs,
        /// JSON: a list of token ids.
        #[arg(long)]
        tokens: PathBuf,
        #[arg(long, default_value_t = 4)]
        sinks: usize,
        #[arg(long, value_delimiter = ',', default_value = "1024")]
        windows: Vec<usize>,
        /// How many of the last prompt tokens are scored.
        #[arg(long, value_delimiter = ',', default_value = "32")]
        lasts: Vec<usize>,
    },
    /// Perplexity of a continuation, some layers restricted to sink and window.
    Restricted {
        #[command(flatten)]
        run: RunArgs,
        /// JSON: a list of token ids, at least `prefill + score` of them.
        #[arg(long)]
        tokens: PathBuf,
        #[arg(long)]
        prefill: usize,
        #[arg(long)]
        score: usize,
        /// `none`, `all`, or indices like 1,2,7.
        #[arg(long, default_value = "none")]
        layers: String,
        #[arg(long, default_value_t = 4)]
        sink: usize,
        #[arg(long, default_value_t = 1024)]
        window: usize,
        /// The first query that is restricted.
        #[arg(long, value_enum, default_value_t = From::PrefillEnd)]
        from: From,
        /// Writes the logits that predict the scored tokens, as rows of n_vocab f32.
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum From {
    PrefillEnd,
    Start,
}

#[derive(Args)]
struct RunArgs {
    #[arg(short, long)]
    model: PathBuf,
    /// Default: what the input needs.
    #[arg(short, long)]
    ctx_size: Option<usize>,
    /// Default: upstream's.
    #[arg(short, long)]
    batch_size: Option<usize>,
    /// Default: upstream's (512). Also -ub.
    #[arg(long)]
    ubatch_size: Option<usize>,
    /// Default: as many as the machine runs at once.
    #[arg(short, long)]
    threads: Option<usize>,
    /// Default: auto, as upstream. Also -fa.
    #[arg(long, value_enum)]
    flash_attn: Option<OnOff>,
    /// Also -ctk.
    #[arg(long, default_value = "f16")]
    cache_type_k: String,
    /// Also -ctv.
    #[arg(long, default_value = "f16")]
    cache_type_v: String,
    /// LoRA adapters, each with what it is multiplied by: FILE:SCALE.
    #[arg(long, value_parser = scaled)]
    lora_scaled: Vec<(PathBuf, f32)>,
}

fn scaled(text: &str) -> Result<(PathBuf, f32), String> {
    let (path, scale) = text.rsplit_once(':').ok_or("it must be FILE:SCALE")?;
    Ok((path.into(), scale.parse().map_err(|error| format!("{scale}: {error}"))?))
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

impl RunArgs {
    /// `needed`: the longest sequence that will be decoded, in tokens.
    fn options(&self, needed: usize) -> Result<ContextOptions, String> {
        // llama.cpp rounds the context up to this as well.
        let needed = needed.next_multiple_of(256);
        let mut options = ContextOptions::new(self.ctx_size.unwrap_or(needed));
        options.n_batch = self.batch_size;
        options.n_ubatch = self.ubatch_size;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        options.n_threads = Some(self.threads.unwrap_or(cores));
        options.flash_attn = self.flash_attn.map(|fa| fa == OnOff::On);
        options.type_k = llama::type_by_name(&self.cache_type_k)?;
        options.type_v = llama::type_by_name(&self.cache_type_v)?;
        options.adapters = self.lora_scaled.clone();
        Ok(options)
    }

    /// The options for a run that looks at attention probabilities.
    fn options_for_hook(&self, needed: usize) -> Result<ContextOptions, String> {
        if self.flash_attn == Some(OnOff::On) {
            return Err("flash attention never shows its probabilities; leave -fa on out".into());
        }
        let mut options = self.options(needed)?;
        options.flash_attn = Some(false);
        Ok(options)
    }
}

fn main() -> ExitCode {
    // clap knows one-letter shorts only; these are spelled as llama.cpp spells them.
    let args = std::env::args_os().map(|arg| match arg.to_str() {
        Some("-ub") => "--ubatch-size".into(),
        Some("-fa") => "--flash-attn".into(),
        Some("-ctk") => "--cache-type-k".into(),
        Some("-ctv") => "--cache-type-v".into(),
        _ => arg,
    });
    let cli = Cli::parse_from(args);
    llama::init_logging(cli.verbose);
    match run(cli.command, !cli.no_repack) {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("upstream-ref: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, repack: bool) -> Result<Value, String> {
    let load = |path: &Path| Model::load(path, repack);
    match command {
        Command::Info { model } => info(&load(&model)?),
        Command::Tokenize { model, input, no_special, parse_special } => {
            tokenize(&load(&model)?, &input, !no_special, parse_special)
        }
        Command::Detokenize { model, input, remove_special, unparse_special, pieces } => {
            detokenize(&load(&model)?, &input, remove_special, unparse_special, pieces)
        }
        Command::Logits { run, input, out, all, decode } => {
            logits(&load(&run.model)?, &run, &input, &out, all, decode.as_deref())
        }
        Command::Given { run, input, rows, out } => given(&load(&run.model)?, &run, &input, &rows, &out),
        Command::Greedy { run, input, n_predict } => greedy(&load(&run.model)?, &run, &input, n_predict),
        Command::Rss { model, n_predict, prompt, threads } => rss(&load(&model)?, n_predict, &prompt, threads),
        Command::Scores { run, tokens, sinks, windows, lasts } => {
            scores(&load(&run.model)?, &run, &tokens, sinks, windows, lasts)
        }
        Command::Restricted { run, tokens, prefill, score, layers, sink, window, from, out } => {
            let model = load(&run.model)?;
            let tokens = read_tokens(&tokens)?;
            if prefill == 0 || score == 0 || tokens.len() < prefill + score {
                return Err(format!(
                    "{} tokens: not enough to prefill {prefill} and score {score}, each at least 1",
                    tokens.len()
                ));
            }
            let layers = parse_layers(&layers, model.n_layer())?;
            let tokens = &tokens[..prefill + score];
            let mut rows = out.as_deref().map(RowWriter::create).transpose()?;
            if !layers.contains(&true) {
                let options = run.options(tokens.len())?;
                let ctx = Context::new(&model, &options)?;
                return perplexity(ctx, tokens, prefill, rows.as_mut());
            }
            let from = if from == From::Start { 0 } else { prefill };
            let hook = Restriction { layers, sink, window, from };
            let ctx = Context::with_hook(&model, &run.options_for_hook(tokens.len())?, hook)?;
            perplexity(ctx, tokens, prefill, rows.as_mut())
        }
    }
}

fn info(model: &Model) -> Result<Value, String> {
    let special: serde_json::Map<String, Value> = model
        .special_tokens()
        .into_iter()
        .map(|(name, id)| (name.to_string(), json!((id >= 0).then_some(id))))
        .collect();
    let n_vocab = model.n_vocab();
    let eog: Vec<Token> = (0..n_vocab as Token).filter(|&t| model.is_eog(t)).collect();
    Ok(json!({
        "n_vocab": n_vocab,
        "n_layer": model.n_layer(),
        "n_ctx_train": model.n_ctx_train(),
        "add_bos": model.adds_bos(),
        "special": special,
        "eog": eog,
        "offloads": llama::offloads(),
    }))
}

fn given(model: &Model, run: &RunArgs, input: &Path, rows: &Path, out: &Path) -> Result<Value, String> {
    let given = read_json(input)?;
    let list = |key: &str| -> Result<Vec<i32>, String> {
        serde_json::from_value(given[key].clone()).map_err(|e| format!("{}: {key}: {e}", input.display()))
    };
    let (before, positions, after) = (list("before")?, list("positions")?, list("after")?);
    let bytes = std::fs::read(rows).map_err(|e| format!("{}: {e}", rows.display()))?;
    let (rows, _) = bytes.as_chunks::<4>();
    let rows: Vec<f32> = rows.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let n = before.len() + after.len() + rows.len() / model.n_embd_input();
    let mut ctx = Context::new(model, &run.options(n)?)?;
    let mut out = RowWriter::create(out)?;
    ctx.decode(&before, Outputs::Last, |_| {})?;
    let non_causal = given["non_causal"] == true;
    ctx.decode_rows(&rows, &positions, non_causal, |row| out.push(row))?;
    ctx.go_on_at(given["next"].as_u64().unwrap_or(0) as usize);
    ctx.decode(&after, Outputs::All, |row| out.push(row))?;
    Ok(json!({ "rows": out.finish()?, "n_vocab": model.n_vocab() }))
}

fn tokenize(model: &Model, input: &Path, add: bool, parse: bool) -> Result<Value, String> {
    let texts = read_json(input)?;
    let texts = texts.as_array().ok_or_else(|| format!("{}: not a list", input.display()))?;
    let mut tokens = Vec::with_capacity(texts.len());
    for text in texts {
        let bytes = match text {
            Value::String(s) => s.as_bytes().to_vec(),
            other => serde_json::from_value::<Vec<u8>>(other.clone())
                .map_err(|e| format!("{}: neither text nor bytes: {e}", input.display()))?,
        };
        tokens.push(model.tokenize(&bytes, add, parse)?);
    }
    Ok(json!({ "tokens": tokens }))
}

fn detokenize(
    model: &Model,
    input: &Path,
    remove_special: bool,
    unparse_special: bool,
    pieces: bool,
) -> Result<Value, String> {
    let lists = read_token_lists(input)?;
    if pieces {
        let pieces = lists
            .iter()
            .map(|list| list.iter().map(|&t| model.token_to_piece(t, unparse_special)).collect())
            .collect::<Result<Vec<Vec<Vec<u8>>>, _>>()?;
        return Ok(json!({ "pieces": pieces }));
    }
    let bytes = lists
        .iter()
        .map(|list| model.detokenize(list, remove_special, unparse_special))
        .collect::<Result<Vec<Vec<u8>>, _>>()?;
    let texts: Vec<_> = bytes.iter().map(|b| String::from_utf8_lossy(b)).collect();
    Ok(json!({ "texts": texts, "bytes": bytes }))
}

fn logits(
    model: &Model,
    run: &RunArgs,
    input: &Path,
    out: &Path,
    all: bool,
    decode: Option<&Path>,
) -> Result<Value, String> {
    let prompts = read_token_lists(input)?;
    let mut continuations = match decode {
        Some(path) => read_token_lists(path)?,
        None => Vec::new(),
    };
    if decode.is_some() && continuations.len() != prompts.len() {
        return Err(format!("{} prompts, {} continuations", prompts.len(), continuations.len()));
    }
    continuations.resize(prompts.len(), Vec::new());
    let longest = prompts.iter().zip(&continuations).map(|(p, c)| p.len() + c.len()).max();
    let mut ctx = Context::new(model, &run.options(longest.unwrap_or(0))?)?;
    let mut writer = RowWriter::create(out)?;
    let outputs = if all { Outputs::All } else { Outputs::Last };
    let mut per_prompt = Vec::new();
    for (prompt, continuation) in prompts.iter().zip(&continuations) {
        let before = writer.rows;
        ctx.clear();
        ctx.decode(prompt, outputs, |row| writer.push(row))?;
        for &token in continuation {
            ctx.decode(&[token], Outputs::Last, |row| writer.push(row))?;
        }
        per_prompt.push(writer.rows - before);
    }
    let rows = writer.finish()?;
    Ok(json!({ "n_vocab": model.n_vocab(), "rows": rows, "rows_per_prompt": per_prompt }))
}

fn greedy(model: &Model, run: &RunArgs, input: &Path, n_predict: usize) -> Result<Value, String> {
    let prompts = read_token_lists(input)?;
    let longest = prompts.iter().map(|p| p.len()).max().unwrap_or(0);
    let mut ctx = Context::new(model, &run.options(longest + n_predict)?)?;
    let mut results = Vec::new();
    for prompt in &prompts {
        ctx.clear();
        let mut top = [(0, 0.0); 2];
        ctx.decode(prompt, Outputs::Last, |row| top = top2(row))?;
        let mut tokens = Vec::new();
        let mut tops = Vec::new();
        for step in 0..n_predict {
            tokens.push(top[0].0);
            tops.push(top);
            if step + 1 < n_predict {
                ctx.decode(&[top[0].0], Outputs::Last, |row| top = top2(row))?;
            }
        }
        results.push(json!({ "tokens": tokens, "top2": tops }));
    }
    Ok(json!({ "results": results }))
}

/// The two largest logits; of equal ones the first, as upstream's greedy sampler takes it.
fn top2(row: &[f32]) -> [(Token, f32); 2] {
    let mut top = [(-1, f32::NEG_INFINITY); 2];
    for (id, &logit) in row.iter().enumerate() {
        if logit > top[0].1 {
            top = [(id as Token, logit), top[0]];
        } else if logit > top[1].1 {
            top[1] = (id as Token, logit);
        }
    }
    top
}

/// What llama-simple does: a context just large enough, one batch for the prompt, greedy sampling.
fn rss(model: &Model, n: usize, prompt: &str, threads: Option<usize>) -> Result<Value, String> {
    let tokens = model.tokenize(prompt.as_bytes(), true, true)?;
    if tokens.is_empty() || n == 0 {
        return Err("the prompt and -n must give at least one token".into());
    }
    let mut options = ContextOptions::new(tokens.len() + n - 1);
    options.n_batch = Some(tokens.len());
    options.n_threads = threads;
    let mut ctx = Context::new(model, &options)?;
    let sampler = Sampler::greedy();
    let mut generated = Vec::new();
    ctx.decode(&tokens, Outputs::Last, |_| ())?;
    while generated.len() < n {
        let token = ctx.sample_greedy(&sampler);
        generated.push(token);
        if generated.len() < n {
            ctx.decode(&[token], Outputs::Last, |_| ())?;
        }
    }
    let mut answer = memory()?;
    answer["prompt_tokens"] = json!(tokens.len());
    answer["tokens"] = json!(generated);
    Ok(answer)
}

/// This process's memory in bytes, from /proc.
fn memory() -> Result<Value, String> {
    let path = "/proc/self/status";
    let status = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let mut answer = json!({});
    for key in ["VmRSS", "RssAnon", "RssFile", "VmHWM"] {
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .ok_or_else(|| format!("{path}: no {key}"))?;
        answer[key] = json!(kib * 1024);
    }
    Ok(answer)
}

fn scores(
    model: &Model,
    run: &RunArgs,
    tokens: &Path,
    sink: usize,
    windows: Vec<usize>,
    lasts: Vec<usize>,
) -> Result<Value, String> {
    let tokens = read_tokens(tokens)?;
    let hook = MassSums::new(model.n_layer(), tokens.len(), sink, windows, lasts);
    let mut ctx = Context::with_hook(model, &run.options_for_hook(tokens.len())?, hook)?;
    ctx.decode(&tokens, Outputs::Last, |_| ())?;
    check_seen(&ctx)?;
    let scores: Vec<Value> = ctx
        .hook()
        .means()
        .map(|(window, last, layers)| json!({ "sink": sink, "window": window, "last": last, "layers": layers }))
        .collect();
    Ok(json!({ "scores": scores }))
}

/// Prefills `tokens[..prefill]` and scores the rest: the token at position `prefill - 1` predicts
/// the one at `prefill`, and so on. `nll` is the mean in nats.
fn perplexity<H: AttentionHook>(
    mut ctx: Context<H>,
    tokens: &[Token],
    prefill: usize,
    mut rows: Option<&mut RowWriter>,
) -> Result<Value, String> {
    let mut targets = tokens[prefill..].iter();
    let mut total = 0.0;
    let mut score = |row: &[f32]| {
        if let Some(&target) = targets.next() {
            total -= log_prob(row, target);
            if let Some(rows) = &mut rows {
                rows.push(row);
            }
        }
    };
    // Two calls, so that no ubatch holds tokens of both.
    ctx.decode(&tokens[..prefill], Outputs::Last, &mut score)?;
    ctx.decode(&tokens[prefill..tokens.len() - 1], Outputs::All, &mut score)?;
    if ctx.is_hooked() && tokens.len() - 1 > prefill {
        check_seen(&ctx)?;
    }
    let n = tokens.len() - prefill;
    let nll = total / n as f64;
    if let Some(rows) = rows {
        rows.flush()?;
    }
    Ok(json!({ "tokens_scored": n, "nll": nll, "perplexity": nll.exp() }))
}

fn check_seen<H: AttentionHook>(ctx: &Context<H>) -> Result<(), String> {
    if ctx.layers_seen() == 0 {
        return Err("no kq_soft_max tensor was seen: this model cannot be looked into".into());
    }
    Ok(())
}

/// The natural logarithm of the probability that `row` gives to `target`.
fn log_prob(row: &[f32], target: Token) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = row.iter().map(|&l| (l as f64 - max).exp()).sum();
    row[target as usize] as f64 - max - sum.ln()
}

fn parse_layers(text: &str, n_layer: usize) -> Result<Vec<bool>, String> {
    let mut layers = vec![text == "all"; n_layer];
    if !matches!(text, "all" | "none") {
        for index in text.split(',') {
            let index: usize = index.trim().parse().map_err(|_| format!("--layers: {index:?} is no index"))?;
            let layer = layers
                .get_mut(index)
                .ok_or_else(|| format!("--layers: {index}: the model has 0 to {}", n_layer - 1))?;
            *layer = true;
        }
    }
    Ok(layers)
}

fn read_json(path: &Path) -> Result<Value, String> {
    let text = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))
}

fn read_tokens(path: &Path) -> Result<Vec<Token>, String> {
    serde_json::from_value(read_json(path)?).map_err(|e| format!("{}: {e}", path.display()))
}

fn read_token_lists(path: &Path) -> Result<Vec<Vec<Token>>, String> {
    let lists: Vec<Vec<Token>> =
        serde_json::from_value(read_json(path)?).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(lists)
}

/// Writes rows of f32, little-endian.
struct RowWriter {
    file: BufWriter<File>,
    path: PathBuf,
    rows: usize,
    /// The first failure; reported when the rows are flushed.
    error: Option<std::io::Error>,
}

impl RowWriter {
    fn create(path: &Path) -> Result<Self, String> {
        let file = File::create(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { file, path: path.to_path_buf(), rows: 0, error: None })
    }

    fn push(&mut self, row: &[f32]) {
        let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
        if let Err(e) = self.file.write_all(&bytes) {
            self.error.get_or_insert(e);
        }
        self.rows += 1;
    }

    fn flush(&mut self) -> Result<(), String> {
        let result = match self.error.take() {
            Some(e) => Err(e),
            None => self.file.flush(),
        };
        result.map_err(|e| format!("{}: {e}", self.path.display()))
    }

    fn finish(mut self) -> Result<usize, String> {
        self.flush()?;
        Ok(self.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top2_takes_the_first_of_equals() {
        assert_eq!(top2(&[1.0, 3.0, 3.0, 2.0]), [(1, 3.0), (2, 3.0)]);
        assert_eq!(top2(&[5.0, 3.0, 4.0]), [(0, 5.0), (2, 4.0)]);
    }

    #[test]
    fn log_prob_is_a_log_softmax() {
        let row = [0.0_f32, 1.0, 2.0];
        let sum: f64 = (0..3).map(|i| log_prob(&row, i).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        assert!((log_prob(&row, 2) - log_prob(&row, 1) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn layers_are_parsed_and_checked() {
        assert_eq!(parse_layers("none", 2), Ok(vec![false, false]));
        assert_eq!(parse_layers("all", 2), Ok(vec![true, true]));
        assert_eq!(parse_layers("1", 2), Ok(vec![false, true]));
        assert!(parse_layers("2", 2).is_err());
        assert!(parse_layers("x", 2).is_err());
    }
}
