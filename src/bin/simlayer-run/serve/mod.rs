//! An HTTP server for one model: OpenAI's API, llama-server's own, Anthropic's and Ollama's.
//!
//! A request's way: `http` (who may ask, how much, how long) → `openai`, `llama`, `anthropic`, `ollama` (what is asked) →
//! `dialogue` (the conversation becomes a prompt) → `app` → `scheduler`, a thread of its own that has the session. What comes
//! back are events, which `stream` makes an answer of, at once or piece by piece.

mod anthropic;
mod app;
mod dialogue;
mod error;
mod http;
mod llama;
mod ollama;
mod openai;
mod pace;
mod page;
mod parking;
mod probs;
mod sampling;
mod scheduler;
mod status;
mod stream;
mod task;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use axum::{
    Router,
    http::{Method, StatusCode},
    middleware,
    routing::{get, post},
};
use indicatif::HumanBytes;
use simlayer::{Model, SessionParams, Token, chat::ChatFormat};

use crate::{
    args::ServeArgs,
    failure::Failure,
    generate, interrupt,
    options::{self, Run},
    template::NamedTemplate,
};
use app::{App, Settings};
use error::ApiError;
use http::Listener;
use parking::Parking;
use scheduler::{Engine, Limits};

/// Threads that wait for clients; what takes long goes to others.
const HTTP_THREADS: usize = 2;
/// Requests that are prepared at once.
const PREPARING: usize = 4;

pub fn run(args: ServeArgs) -> Result<(), Failure> {
    let limit = generate::limit(args.n_predict)?.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let keys = keys(args.api_key, args.api_key_file.as_deref())?;
    let mut run = Run::settle(args.common)?;
    let named = NamedTemplate::read(&args.template)?;
    // Clients who find nobody listening are told so before the model is loaded.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .max_blocking_threads(PREPARING)
        .thread_name("http")
        .enable_all()
        .build()?;
    let (listener, address) = runtime.block_on(listen(&args.host, args.port))?;

    let abort = Arc::new(AtomicBool::new(false));
    run.session = SessionParams {
        // Going back to a prompt's end: answers are asked for again, and conversations go on.
        keep_prompt_end: true,
        // Others are answered meanwhile.
        layer_major: false,
        look_in_steps: true,
        abort: Some(Arc::clone(&abort)),
        ..run.session
    };
    let (model, load) = run.load()?;
    let (template, template_text) = named.for_model(&model)?;
    let format = match template.is_builtin() {
        true => None,
        false => Some(chat_format(&model, &template_text)?),
    };
    let session = simlayer::Session::new(&model, run.session.clone())?;
    let defaults = options::sampling(args.sampling, model.sampler_params(), session.n_ctx())?;
    // What is wrong with them is said now.
    simlayer::Sampler::new(model.vocab(), &defaults)?;
    let limits =
        Limits { kv_mem: args.kv_mem, parallel: args.parallel, queue: args.queue, n_ubatch: run.session.n_ubatch };
    let names = match args.alias {
        names if names.is_empty() => vec![name_of(&run.model_path)],
        names => names,
    };
    let parking = match &args.kv_disk {
        None => None,
        Some(dir) => {
            let parking = Parking::open(dir, args.kv_disk_mem as u64, &session.state_settings());
            let parking = parking.map_err(|error| Failure::run(format!("--kv-disk: {error}")))?;
            let stats = parking.stats();
            eprintln!("--kv-disk: {} conversations, {}", stats.entries, HumanBytes(stats.bytes));
            parking.notices().iter().for_each(|notice| eprintln!("--kv-disk: {notice}"));
            Some(Arc::new(parking))
        }
    };
    let needed = session.bytes_of(session.n_ctx());
    let policy = session.policy().to_string();
    eprintln!(
        "{} ({}), loaded in {:.1} s: context of {} tokens, {} conversations at a time, {} for their caches; a full context \
         takes {} while it is read, lazy layers by {policy}",
        names.join(", "),
        model.hparams().architecture,
        load.as_secs_f64(),
        session.n_ctx(),
        limits.parallel,
        HumanBytes(limits.kv_mem as u64),
        HumanBytes(needed as u64),
    );
    if needed > limits.kv_mem {
        eprintln!("longer prompts than --kv-mem has room for are refused: give more, or less with -c");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (engine, scheduler) = Engine::start(session, limits, parking.clone(), Arc::clone(&stop))?;
    let app = Arc::new(App::new(
        engine,
        model,
        Settings {
            model_path: run.model_path,
            template,
            format,
            template_text,
            template_kwargs: args.chat_template_kwargs.map(|object| object.0).unwrap_or_default(),
            names,
            policy,
            defaults,
            limit,
            keys,
            cors_origins: args.cors_origins,
            timeout: Duration::from_secs(args.timeout as u64),
            ping: u64::try_from(args.sse_ping_interval).ok().filter(|&ping| ping > 0).map(Duration::from_secs),
            max_body: args.max_body,
            parking,
        },
    ));
    let router = router(Arc::clone(&app));

    // The first Ctrl-C lets those finish who are being answered, the second one ends the program.
    interrupt::watch();
    let watcher = {
        let (stop, scheduler_ended) = (Arc::clone(&stop), Arc::new(AtomicBool::new(false)));
        let ended = Arc::clone(&scheduler_ended);
        let watcher = thread::Builder::new().name("signals".to_owned()).spawn(move || {
            while !interrupt::pressed() && !ended.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(100));
            }
            if interrupt::pressed() {
                eprintln!("stopping: answers that were begun may end (Ctrl-C again: at once)");
            }
            stop.store(true, Ordering::SeqCst);
        })?;
        (watcher, scheduler_ended)
    };
    // The one line that programs may wait for.
    eprintln!("listening at {address}");
    if keys_are_missing(&app, &args.host) {
        eprintln!("WARNING: whoever reaches this address can use the model: give --api-key, or listen at 127.0.0.1");
    }
    let ended = Arc::clone(&watcher.1);
    let scheduler = thread::Builder::new().name("supervisor".to_owned()).spawn(move || {
        let result = scheduler.join();
        ended.store(true, Ordering::SeqCst);
        result
    })?;
    runtime.block_on(http::serve(listener, router, app, Arc::clone(&stop)));
    stop.store(true, Ordering::SeqCst);
    let result = scheduler.join();
    abort.store(true, Ordering::SeqCst);
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Failure::run("the scheduler has failed; what it said is above")),
    }
}

/// How a template has the model write calls and thoughts.
fn chat_format(model: &Model, template: &str) -> Result<ChatFormat, Failure> {
    let vocab = model.vocab();
    let name = |token: Option<Token>| token.map(|token| vocab.name(token)).unwrap_or_default();
    ChatFormat::new(template, &name(vocab.bos()), &name(vocab.eos())).map_err(Failure::run)
}

fn keys_are_missing(app: &App, host: &str) -> bool {
    app.settings.keys.is_empty() && !matches!(host, "127.0.0.1" | "::1" | "localhost") && !host.ends_with(".sock")
}

/// Keys that clients may send.
fn keys(given: Vec<String>, file: Option<&Path>) -> Result<Vec<String>, Failure> {
    let mut keys: Vec<String> = given.iter().map(|key| key.trim().to_owned()).collect();
    if let Some(path) = file {
        let text = options::utf8(options::read_file(path)?, path)?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        keys.extend(lines.map(str::to_owned));
        if keys.is_empty() {
            return Err(Failure::usage(format!("--api-key-file: {} has no key", path.display())));
        }
    }
    if keys.iter().any(|key| key.is_empty() || !key.is_ascii()) {
        return Err(Failure::usage("--api-key: a key is empty, or not ASCII"));
    }
    Ok(keys)
}

/// The file's name without what all such names end with.
fn name_of(path: &Path) -> String {
    path.file_stem().map_or_else(|| "model".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

async fn listen(host: &str, port: u16) -> Result<(Listener, String), Failure> {
    if host.ends_with(".sock") {
        // One that a server before left behind; what else is there is nobody's to remove.
        if let Ok(file) = std::fs::metadata(host)
            && std::os::unix::fs::FileTypeExt::is_socket(&file.file_type())
            && tokio::net::UnixStream::connect(host).await.is_err()
        {
            std::fs::remove_file(host)?;
        }
        let listener = tokio::net::UnixListener::bind(host);
        let listener = listener.map_err(|error| Failure::run(format!("--host {host}: {error}")))?;
        return Ok((Listener::Unix(listener), host.to_owned()));
    }
    let listener = tokio::net::TcpListener::bind((host, port)).await;
    let listener = listener.map_err(|error| Failure::run(format!("--host {host} --port {port}: {error}")))?;
    let address = format!("http://{}", listener.local_addr()?);
    Ok((Listener::Tcp(listener), address))
}

fn router(app: Arc<App>) -> Router {
    let nothing = |method: Method, uri: axum::http::Uri| async move {
        let path: String = uri.path().chars().take(100).collect();
        ApiError::new(StatusCode::NOT_FOUND, "not_found_error", format!("there is no {method} {path}")).response()
    };
    let wrong_method = |method: Method| async move {
        let message = format!("this path is not for {method}");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message).response()
    };
    Router::new()
        .merge(page::routes())
        .route("/health", get(llama::health))
        .route("/v1/health", get(llama::health))
        .route("/props", get(llama::props))
        .route("/slots", get(llama::slots))
        .route("/metrics", get(llama::metrics))
        .route("/tokenize", post(llama::tokenize))
        .route("/detokenize", post(llama::detokenize))
        .route("/apply-template", post(llama::apply_template))
        .route("/completion", post(llama::completion))
        .route("/completions", post(llama::completion))
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/chat/completions", post(openai::chat_completions))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/models", get(openai::models))
        .route("/v1/embeddings", post(openai::embeddings))
        .route("/embeddings", post(openai::embeddings))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/tags", get(ollama::tags))
        .route("/api/ps", get(ollama::ps))
        .route("/api/show", post(ollama::show))
        .route("/api/version", get(ollama::version))
        .fallback(nothing)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), http::gate))
        .with_state(app)
}
