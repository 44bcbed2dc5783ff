//! How many long conversations servers hold at one budget of memory for caches so that none is read again: `simlayer-run serve`
//! against llama-server. Each is begun, and asked again when all are.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::prepare::Env;
use crate::serving::{Served, Serving, prompt};
use crate::upstream;

/// Tokens of an answer, and of what is asked then.
const ANSWER: usize = 8;
const AGAIN: usize = 8;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    served: Served,
    /// Memory for the caches, in MiB.
    #[arg(long, default_value_t = 640)]
    kv_mem: usize,
    /// Tokens of each conversation's first prompt.
    #[arg(long, default_value_t = 6000)]
    tokens: usize,
    /// Ways to run `simlayer-run serve`, as its options.
    #[arg(
        long,
        allow_hyphen_values = true,
        default_values = ["--lazy auto -ctk auto -ctv q4_0", "--lazy profile:0.75 -ctk auto -ctv q4_0"]
    )]
    ours: Vec<String>,
    /// Types of llama-server's caches.
    #[arg(long, default_values = ["f16", "q4_0"])]
    theirs: Vec<String>,
    /// A llama-server that is built already.
    #[arg(long)]
    llama_server: Option<PathBuf>,
}

/// What a server held.
struct Held {
    what: String,
    /// Conversations that were begun, and those of which nothing was read again.
    begun: usize,
    known: usize,
    /// Bytes of the caches.
    bytes: usize,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    let (program, model) = args.served.ready(&mut env)?;
    let llama_server = args.llama_server.clone().map_or_else(|| upstream::tool("llama-server"), Ok)?;
    let budget = args.kv_mem << 20;
    let mut all = Vec::new();
    for ty in &args.theirs {
        let held = theirs(&env, &llama_server, &model, ty, args)?;
        ensure!(held.bytes <= budget, "its caches take {} bytes, more than {budget}", held.bytes);
        tell(&held);
        all.push(held);
    }
    for options in &args.ours {
        let context = (args.tokens + 64).to_string();
        let kv_mem = format!("{}M", args.kv_mem);
        let fixed = ["--kv-mem", &kv_mem, "-c", &context, "--parallel", "1"];
        let options: Vec<&str> = options.split(' ').chain(fixed).collect();
        let server = Serving::start(&env, &program, &model, &options, false)?;
        let held = ours(&server, &options.join(" "), args.tokens)?;
        tell(&held);
        all.push(held);
    }
    println!("\n{} MiB, conversations of {} tokens:\n", args.kv_mem, args.tokens);
    println!("| | held | in MiB | to f16 |\n|---|---|---|---|");
    let f16 = all.first().map_or(1, |held| held.known.max(1));
    for Held { what, known, bytes, .. } in &all {
        println!("| {what} | {known} | {} | {:.1} |", bytes >> 20, *known as f64 / f16 as f64);
    }
    Ok(())
}

fn tell(Held { what, begun, known, bytes }: &Held) {
    println!("{what}: of {begun} conversations {known} were not read again, {} MiB", bytes >> 20);
}

/// As many conversations as fit are begun: until the first one has to go.
fn ours(server: &Serving, what: &str, tokens: usize) -> Result<Held> {
    let mut conversations = Vec::new();
    let in_memory = || -> Result<(usize, usize)> {
        let slots = server.get("/slots")?;
        let slots = slots.as_array().context("no slots")?;
        let bytes = |slot: &Value| slot["kv"]["allocated_bytes"].as_u64().unwrap_or(0) as usize;
        Ok((slots.len(), slots.iter().map(bytes).sum()))
    };
    loop {
        conversations.push(begin(server, conversations.len(), tokens)?);
        if in_memory()?.0 < conversations.len() {
            break;
        }
    }
    // The first one has gone.
    let known = again(server, &conversations[1..], tokens)?;
    let (held, bytes) = in_memory()?;
    ensure!(known <= held, "{known} were known, {held} are held");
    Ok(Held { what: what.to_owned(), begun: conversations.len(), known, bytes })
}

/// Slots that are as many as fit, each as long as a conversation.
fn theirs(env: &Env, program: &Path, model: &Path, ty: &str, args: &Args) -> Result<Held> {
    let slot = (args.tokens + ANSWER + AGAIN + ANSWER).next_multiple_of(256);
    let log = env.target_dir()?.join("llama-server.log");
    let start = |slots: usize| -> Result<(Serving, usize)> {
        let mut command = env.command(&program.display().to_string());
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        command.arg("-m").arg(model).args(["--port", &port.to_string(), "-np", &slots.to_string()]);
        command.args(["-c", &(slots * slot).to_string(), "-fa", "on", "-ctk", ty, "-ctv", ty]);
        // What it would keep of idle slots besides is memory that does not count. At this verbosity it says the caches' size.
        command.args(["--cache-ram", "0", "--log-colors", "off", "-lv", "4"]);
        let server = Serving::start_other(command, format!("http://127.0.0.1:{port}"), &log)?;
        let bytes = kv_bytes(&fs::read_to_string(&log)?).context("llama-server says no size of its KV cache")?;
        Ok((server, bytes))
    };
    let one = start(1)?.1;
    let slots = (args.kv_mem << 20) / one;
    ensure!(slots > 0, "one conversation takes {one} bytes: give a larger --kv-mem");
    let (server, bytes) = start(slots)?;
    let conversations = (0..slots).map(|index| begin(&server, index, args.tokens)).collect::<Result<Vec<_>>>()?;
    let known = again(&server, &conversations, args.tokens)?;
    Ok(Held { what: format!("llama-server, {ty}, {slots} slots"), begun: slots, known, bytes })
}

/// The sizes that llama-server's log names, together.
fn kv_bytes(log: &str) -> Option<usize> {
    let sizes = log.lines().filter(|line| line.contains("llama_kv_cache") && line.contains(" layers,"));
    let mib = |line: &str| line.split_once("size =")?.1.split_whitespace().next()?.parse::<f64>().ok();
    let bytes: f64 = sizes.filter_map(mib).sum::<f64>() * f64::from(1 << 20);
    (bytes > 0.0).then_some(bytes as usize)
}

/// A conversation's first turn: its tokens.
fn begin(server: &Serving, number: usize, tokens: usize) -> Result<Vec<Value>> {
    let text = format!("Conversation {number}.{}", prompt(number as u64 + 1, tokens));
    let given = server.post("/tokenize", &json!({ "content": text }))?;
    let mut conversation = given["tokens"].as_array().context("no tokens")?.clone();
    ensure!(conversation.len() >= tokens, "{} tokens: fewer than {tokens}", conversation.len());
    conversation.truncate(tokens);
    let answer = turn(server, &conversation)?;
    conversation.extend(answer["tokens"].as_array().context("no tokens")?.iter().cloned());
    Ok(conversation)
}

/// How many conversations go on without that anything of their first prompts is read again.
fn again(server: &Serving, conversations: &[Vec<Value>], tokens: usize) -> Result<usize> {
    let mut known = 0;
    for conversation in conversations {
        let next = &conversation[1..=AGAIN];
        let answer = turn(server, &[conversation.as_slice(), next].concat())?;
        let cached = answer["timings"]["cache_n"].as_u64().context("no cache_n")?;
        known += usize::from(cached >= tokens as u64);
    }
    Ok(known)
}

fn turn(server: &Serving, prompt: &[Value]) -> Result<Value> {
    let body = json!({
        "prompt": prompt, "n_predict": ANSWER, "temperature": 0, "ignore_eos": true, "return_tokens": true,
        "cache_prompt": true,
    });
    server.post("/completion", &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_from_the_log() {
        let log = "llama_kv_cache:        CPU KV buffer size =   135.00 MiB\n\
                   llama_kv_cache: size =  135.00 MiB (  6144 cells,  30 layers,  1/1 seqs), K (f16):   67.50 MiB";
        assert_eq!(kv_bytes(log), Some(135 << 20));
        assert_eq!(kv_bytes("nothing"), None);
    }
}
