//! llama-server's own API: /health, /props, /slots, /metrics, /tokenize, /detokenize, /apply-template, /completion.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use simlayer::{AddBos, Special};

use super::{
    app::App,
    dialogue,
    error::ApiError,
    http::{Asked, json},
    openai::{kv, logprob, mixed, prompts, timings, wanted, working},
    sampling::{self, member},
    status::Slot,
    stream::{Answer, Render, collect, sse, stream},
    task::{End, Event, Usage},
};

pub async fn health() -> Response {
    json(&json!({ "status": "ok" }))
}

pub async fn props(State(app): State<Arc<App>>) -> Response {
    let vocab = app.model.vocab();
    let name = |token: Option<simlayer::Token>| token.map(|token| vocab.name(token)).unwrap_or_default();
    let policy = app.settings.policy.as_str();
    json(&json!({
        "default_generation_settings": { "n_ctx": app.engine.n_ctx, "params": settings(&app) },
        "total_slots": app.engine.limits.parallel,
        "model_alias": app.name(),
        "model_path": app.settings.model_path.display().to_string(),
        "modalities": { "vision": false, "audio": false },
        "chat_template": app.settings.template_text,
        "bos_token": name(vocab.bos()),
        "eos_token": name(vocab.eos()),
        "build_info": concat!("simlayer ", env!("CARGO_PKG_VERSION")),
        "model": app.name(),
        "kv_mem": app.engine.limits.kv_mem,
        "lazy": policy,
        "parked": app.settings.parking.as_ref().map(|parking| parking.stats()),
    }))
}

/// What requests get that do not say otherwise.
fn settings(app: &App) -> Value {
    let params = &app.settings.defaults;
    json!({
        "seed": params.seed,
        "temperature": params.temperature,
        "dynatemp_range": params.dynatemp_range,
        "dynatemp_exponent": params.dynatemp_exponent,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "top_n_sigma": params.top_n_sigma,
        "xtc_probability": params.xtc_probability,
        "xtc_threshold": params.xtc_threshold,
        "repeat_last_n": params.repeat_last_n,
        "repeat_penalty": params.repeat_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "dry_multiplier": params.dry_multiplier,
        "dry_base": params.dry_base,
        "dry_allowed_length": params.dry_allowed_length,
        "dry_penalty_last_n": params.dry_penalty_last_n,
        "mirostat": params.mirostat.version(),
        "n_predict": app.settings.limit.map_or(-1, |limit| limit as i64),
    })
}

/// The conversations in memory: those that are being answered first.
pub async fn slots(State(app): State<Arc<App>>) -> Response {
    let status = app.engine.shared.status();
    let of = |slot: &Slot| {
        json!({
            "id": slot.id,
            "id_task": slot.task,
            "n_ctx": app.engine.n_ctx,
            "is_processing": slot.task.is_some(),
            "state": match (slot.task.is_some(), slot.is_reading) {
                (false, _) => "idle",
                (true, true) => "reading",
                (true, false) => "writing",
            },
            "tokens": slot.n_past,
            "n_prompt_tokens": slot.n_prompt,
            "next_token": { "n_decoded": slot.n_generated },
            "kv": { "allocated_bytes": slot.kv_bytes, "f16_bytes": slot.f16_bytes, "context_tokens": slot.n_past },
            "layers": slot.layers,
        })
    };
    json(&status.running.iter().chain(&status.idle).map(of).collect())
}

/// Prometheus's text format.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let (counts, status) = (app.engine.shared.counts(), app.engine.shared.status());
    let parked = app.settings.parking.as_ref().map(|parking| parking.stats()).unwrap_or_default();
    let idle_bytes: usize = status.idle.iter().map(|slot| slot.kv_bytes).sum();
    let idle_tokens: usize = status.idle.iter().map(|slot| slot.n_past).sum();
    let most_lazy = status.running.iter().chain(&status.idle);
    let lazy: usize = most_lazy.map(|slot| slot.layers.iter().filter(|layer| layer.lazy).count()).sum();
    let metrics: [(&str, &str, &str, f64); 25] = [
        // llama-server's.
        ("llamacpp:prompt_tokens_total", "counter", "Tokens of prompts that were read.", counts.prompt_tokens as f64),
        ("llamacpp:tokens_predicted_total", "counter", "Tokens that were generated.", counts.generated_tokens as f64),
        ("llamacpp:n_decode_total", "counter", "Batches that were run.", counts.steps as f64),
        ("llamacpp:requests_processing", "gauge", "Answers that are being given.", status.running.len() as f64),
        ("llamacpp:requests_deferred", "gauge", "Requests that wait.", app.engine.shared.waiting() as f64),
        // Ours.
        ("simlayer:prompts_total", "counter", "Prompts that were begun.", counts.begun as f64),
        ("simlayer:answers_total", "counter", "Answers that were given to their end.", counts.answers as f64),
        ("simlayer:cancelled_total", "counter", "Answers whose client had gone.", counts.cancelled as f64),
        (
            "simlayer:cached_tokens_total",
            "counter",
            "Tokens of prompts that need not be read again.",
            counts.cached_tokens as f64,
        ),
        (
            "simlayer:reread_tokens_total",
            "counter",
            "Tokens that were read again though a conversation in memory began with them: a lazy layer had dropped what they need.",
            counts.reread_tokens as f64,
        ),
        ("simlayer:evicted_total", "counter", "Idle conversations whose memory was needed.", counts.evicted as f64),
        (
            "simlayer:idle_conversations",
            "gauge",
            "Conversations in memory that nobody is answered in.",
            status.idle.len() as f64,
        ),
        ("simlayer:idle_kv_bytes", "gauge", "What their caches take.", idle_bytes as f64),
        ("simlayer:idle_tokens", "gauge", "Their tokens.", idle_tokens as f64),
        ("simlayer:kv_bytes", "gauge", "What all caches take.", status.kv_bytes as f64),
        ("simlayer:kv_peak_bytes", "gauge", "The most that all caches ever took.", status.kv_peak_bytes as f64),
        ("simlayer:kv_f16_bytes", "gauge", "What all caches would take in f16, uncompressed.", status.f16_bytes as f64),
        ("simlayer:kv_mem_bytes", "gauge", "What all caches may take (--kv-mem).", app.engine.limits.kv_mem as f64),
        ("simlayer:kv_tokens", "gauge", "Tokens in all caches.", status.context_tokens as f64),
        ("simlayer:lazy_layers", "gauge", "Lazy layers, summed over all conversations in memory.", lazy as f64),
        ("simlayer:parked_conversations", "gauge", "Conversations on disk (--kv-disk).", parked.entries as f64),
        ("simlayer:parked_bytes", "gauge", "What these take there.", parked.bytes as f64),
        (
            "simlayer:parked_queued_bytes",
            "gauge",
            "What waits in memory to be written there.",
            parked.queued_bytes as f64,
        ),
        ("simlayer:restored_total", "counter", "Conversations that were restored from there.", parked.restored as f64),
        ("simlayer:parking_failed_total", "counter", "Conversations that could not be written.", parked.failed as f64),
    ];
    let mut out = String::new();
    for (name, kind, help, value) in metrics {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], out).into_response()
}

pub async fn tokenize(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let app = asked.app;
    let with = Arc::clone(&app);
    let tokens = working(move || {
        let vocab = with.model.vocab();
        let adds = sampling::boolean(&body, "add_special")?.unwrap_or(false);
        let parses = sampling::boolean(&body, "parse_special")?.unwrap_or(true);
        let add_bos = if adds { AddBos::Yes } else { AddBos::No };
        let special = if parses { Special::Parse } else { Special::Text };
        let tokens = match body.get("content") {
            Some(Value::String(text)) => vocab.tokenize(text, add_bos, special)?,
            Some(Value::Array(items)) => mixed(&with, items, "content")?,
            _ => return Err(ApiError::param("content", "it must be a string, or a list of strings and tokens")),
        };
        if !sampling::boolean(&body, "with_pieces")?.unwrap_or(false) {
            return Ok(json!(tokens));
        }
        let piece = |token| match String::from_utf8(vocab.piece(token, true)) {
            Ok(text) => json!(text),
            Err(bytes) => json!(bytes.into_bytes()),
        };
        Ok(tokens.into_iter().map(|token| json!({ "id": token, "piece": piece(token) })).collect())
    });
    Ok(json(&json!({ "tokens": tokens.await? })))
}

pub async fn detokenize(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let app = asked.app;
    let items = body.get("tokens").and_then(Value::as_array);
    let items = items.ok_or_else(|| ApiError::param("tokens", "it must be a list of tokens"))?;
    let tokens = mixed(&app, items, "tokens")?;
    Ok(json(&json!({ "content": app.model.vocab().detokenize(&tokens, true)? })))
}

pub async fn apply_template(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let app = asked.app;
    let with = Arc::clone(&app);
    let prepared = working(move || {
        let dialogue = super::openai::dialogue(&body)?;
        dialogue::prepare(&with, dialogue, &mut with.settings.defaults.clone())
    });
    Ok(json(&json!({ "prompt": prepared.await?.prompt.text })))
}

pub async fn completion(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let Asked { app, client, log, .. } = asked;
    let streams = sampling::boolean(&body, "stream")?.unwrap_or(false);
    let returns_tokens = sampling::boolean(&body, "return_tokens")?.unwrap_or(false);
    let (id, with) = (app.number(), Arc::clone(&app));
    let (answers, several) = working(move || {
        let n_probs = sampling::integer(&body, "n_probs")?.filter(|&n| n > 0).map(|n| n.min(100) as usize);
        let mut wanted = wanted(&with, &body, &["n_predict", "max_tokens"], n_probs)?;
        wanted.prompts = prompts(&with, body.get("prompt"))?;
        if let Some(schema) = member(&body, "json_schema") {
            dialogue::constrain(&Some(schema.clone()), &mut wanted.params)?;
        }
        let several = wanted.prompts.len() * wanted.n > 1;
        Ok((with.submit(id, client.0, wanted)?, several))
    })
    .await?;
    if streams {
        let render = CompletionStream { returns_tokens, model: app.name().to_owned() };
        return stream(answers, render, app.settings.ping, log).await;
    }
    let answers = collect(answers, &log).await?;
    let object = |(index, answer): (usize, &Answer)| {
        let mut object = ended(index, &answer.end, &answer.usage, app.name());
        object.insert("content".to_owned(), answer.text.clone().into());
        object.insert("tokens".to_owned(), if returns_tokens { json!(answer.tokens) } else { json!([]) });
        if !answer.probs.is_empty() {
            let probs = answer.probs.iter().map(logprob).collect();
            object.insert("completion_probabilities".to_owned(), probs);
        }
        Value::Object(object)
    };
    let mut objects: Vec<Value> = answers.iter().enumerate().map(object).collect();
    match several {
        true => Ok(json(&objects.into())),
        false => Ok(json(&objects.pop().unwrap_or_default())),
    }
}

/// How an answer of /completion ended.
fn ended(index: usize, end: &End, usage: &Usage, model: &str) -> Map<String, Value> {
    let (kind, word) = match end {
        End::Eos => ("eos", ""),
        End::Stop(word) => ("word", word.as_str()),
        End::Limit | End::Context | End::Memory | End::Shutdown => ("limit", ""),
    };
    let members = [
        ("index", json!(index)),
        ("stop", json!(true)),
        ("model", json!(model)),
        ("tokens_predicted", json!(usage.generated_tokens)),
        ("tokens_evaluated", json!(usage.prompt_tokens)),
        ("tokens_cached", json!(usage.prompt_tokens + usage.generated_tokens.saturating_sub(1))),
        ("truncated", json!(*end == End::Context)),
        ("stop_type", json!(kind)),
        ("stopping_word", json!(word)),
        ("generation_settings", json!({ "seed": usage.seed })),
        ("timings", timings(usage)),
        ("kv", kv(&[usage])),
    ];
    members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A raw completion, piece by piece.
struct CompletionStream {
    returns_tokens: bool,
    model: String,
}

impl Render for CompletionStream {
    const CONTENT_TYPE: &'static str = "text/event-stream";
    const PING: &'static str = ":\n\n";

    fn event(&mut self, event: Event) -> String {
        match event {
            Event::Started | Event::Failed(_) => String::new(),
            Event::Token { probs: None, text, .. } if text.is_empty() && !self.returns_tokens => String::new(),
            Event::Token { answer, text, token, probs } => {
                let tokens = if self.returns_tokens { vec![token] } else { Vec::new() };
                let mut object = json!({ "index": answer, "content": text, "tokens": tokens, "stop": false });
                if let Some(probs) = probs {
                    object["completion_probabilities"] = json!([logprob(&probs)]);
                }
                sse(&object)
            }
            Event::Ended { answer, text, end, usage } => {
                let mut object = ended(answer, &end, &usage, &self.model);
                object.insert("content".to_owned(), text.into());
                object.insert("tokens".to_owned(), json!([]));
                sse(&Value::Object(object))
            }
        }
    }

    fn error(&mut self, error: &ApiError) -> String {
        sse(&json!({ "error": error.object() }))
    }

    fn end(&mut self) -> String {
        String::new()
    }
}
