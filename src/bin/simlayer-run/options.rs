//! What the arguments mean: files read, defaults filled in, contradictions refused.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::HumanBytes;
use simlayer::{
    Fit, FitTarget, KvRotate, LoraAdapter, Model, ModelParams, SamplerParams, Session, SessionParams, TensorOverride,
    TensorPlace, fit,
    ggml::{self, Device, Type, logging::LogLevel},
    gguf::{Gguf, Override},
    lazy::{At, LazyParams, PrefillMode},
    sampling::Mirostat,
};

use crate::{
    args::{
        CommonArgs, FlashAttn, GpuLayers, KeyType, LazyAt, LazyPrefill, Numa, OnOrOff, PlacementFlags, PromptArgs,
        SamplingArgs, SplitMode,
    },
    failure::Failure,
    interrupt, processor,
};

/// A model and how to run it.
#[derive(Debug)]
pub struct Run {
    pub model_path: PathBuf,
    pub model: ModelParams,
    pub session: SessionParams,
    /// Keys of the model's architecture that have other values.
    rope: Vec<(&'static str, Override)>,
    /// Adapters that are not loaded yet, and what they are multiplied by.
    lora: Vec<(PathBuf, f32)>,
    /// What is fitted to the devices' memory before the model is loaded.
    fit: Option<FitTarget>,
    pub verbose: bool,
}

impl Run {
    pub fn settle(args: CommonArgs) -> Result<Run, Failure> {
        ggml::logging::set_log(if args.verbose { LogLevel::Info } else { LogLevel::Silent });
        if let Some(numa) = args.numa {
            ggml::spread_threads(match numa {
                Numa::Distribute => ggml::Numa::Distribute,
                Numa::Isolate => ggml::Numa::Isolate,
                Numa::Numactl => ggml::Numa::Numactl,
            });
        }
        let remote = connect(&args.placement.rpc)?;
        let model = model_params(&args, remote)?;
        let (rope, fit) = (rope(&args), fit_target(&args.placement, &model));

        let default = SessionParams::default();
        let n_threads = args.threads.unwrap_or_else(processor::physical_cores);
        let (type_k, type_v) = args.lazy.lazy_type.unzip();
        let (key_type, narrow_keys) = match args.cache_type_k {
            Some(KeyType::Of(ty)) => (ty, false),
            Some(KeyType::Auto) => (Type::Q8_0, true),
            None if args.cache_type_v.is_quantized() => (Type::Q8_0, true),
            None => (Type::F16, false),
        };
        let lazy = LazyParams {
            policy: args.lazy.lazy,
            profile: args.lazy.lazy_profile,
            n_sink: args.lazy.lazy_sink,
            n_window: args.lazy.lazy_window,
            n_slack: args.lazy.lazy_slack,
            n_rescued: args.lazy.lazy_rescue,
            windows: args.lazy.lazy_windows.unwrap_or_default(),
            n_queries: args.lazy.lazy_queries,
            at: match args.lazy.lazy_at {
                LazyAt::Prefill => At::Prefill,
                LazyAt::Decode => At::Decode,
            },
            prefill: args.lazy.lazy_prefill.map(|prefill| match prefill {
                LazyPrefill::Full => PrefillMode::Full,
                LazyPrefill::Window => PrefillMode::Window,
            }),
            narrow_keys,
            type_k,
            type_v,
        };
        let session = SessionParams {
            n_ctx: args.ctx_size,
            n_ubatch: args.ubatch_size.min(args.batch_size),
            n_threads,
            n_threads_batch: args.threads_batch.unwrap_or(n_threads),
            type_k: key_type,
            type_v: args.cache_type_v,
            flash_attn: args.flash_attn != FlashAttn::Off,
            fused_attention: !args.lazy.ggml_kernels,
            op_offload: !args.placement.no_op_offload,
            kv_rotate: if args.lazy.no_kv_rotate { KvRotate::Never } else { default.kv_rotate },
            kv_exact: args.lazy.kv_exact,
            // Only a conversation takes answers back.
            keep_prompt_end: false,
            lazy,
            prune: args.lazy.prune,
            abort: Some(interrupt::flag()),
            ..default
        };
        let lora = args.lora.into_iter().map(|path| (path, 1.0)).chain(args.lora_scaled).collect();
        #[cfg(feature = "download")]
        let model_path = crate::download::model(args.model, args.download)?;
        #[cfg(not(feature = "download"))]
        let model_path = args.model;
        Ok(Run { model_path, model, session, rope, lora, fit, verbose: args.verbose })
    }

    /// A model with nothing else asked for.
    pub fn of_model(path: PathBuf) -> Result<Run, Failure> {
        ggml::logging::set_log(LogLevel::Silent);
        let model = ModelParams::default();
        let session = SessionParams::default();
        let (rope, lora) = (Vec::new(), Vec::new());
        Ok(Run { model_path: path, model, session, rope, lora, fit: None, verbose: false })
    }

    /// Loads the model, and the adapters that sessions are to have; also gives the time it took.
    pub fn load(&mut self) -> Result<(Model, Duration), Failure> {
        let start = Instant::now();
        if !self.rope.is_empty() {
            let file = Gguf::open(&self.model_path).map_err(simlayer::model::Error::from)?;
            let architecture = file.architecture().map_err(simlayer::model::Error::from)?;
            let keys = self.rope.drain(..).map(|(key, value)| (format!("{architecture}.rope.{key}"), value));
            self.model.overrides.extend(keys);
        }
        self.settle_fit()?;
        let model = Model::load(&self.model_path, &self.model)?;
        for (path, scale) in self.lora.drain(..) {
            self.session.adapters.push((LoraAdapter::load(&model, path)?, scale));
        }
        Ok((model, start.elapsed()))
    }

    /// What is fitted to the devices' memory where that is asked for; `None` where nothing is.
    pub fn fitted(&self) -> Result<Option<Fit>, Failure> {
        let Some(target) = &self.fit else { return Ok(None) };
        Ok(Some(fit(&self.model_path, &self.model, &self.session, target)?))
    }

    /// Takes over what was fitted, and says so.
    fn settle_fit(&mut self) -> Result<(), Failure> {
        let Some(fit) = self.fitted()? else { return Ok(()) };
        if !fit.fits {
            eprintln!("warning: this does not fit the devices' free memory (devices --plan shows what would be where)");
            return Ok(());
        }
        if !fit.options.is_empty() {
            eprintln!("to fit the devices' free memory: {} (--fit off leaves all as it is)", fit.options.join(" "));
        }
        (self.model, self.session) = (fit.model, fit.session);
        Ok(())
    }

    /// A session on the model that Ctrl-C interrupts.
    pub fn session(&self, model: &Model) -> Result<Session, Failure> {
        let session = Session::new(model, self.session.clone())?;
        interrupt::watch();
        let (n_ctx, n_trained) = (session.n_ctx(), model.hparams().n_ctx_train);
        if self.session.n_ctx > n_trained {
            eprintln!(
                "warning: a context of {n_ctx} tokens; the model was trained with {n_trained}, and is of little use \
                 beyond (--rope-scaling yarn stretches it)"
            );
        }
        if self.verbose {
            let threads = (self.session.n_threads, self.session.n_threads_batch);
            eprintln!(
                "{} ({}): {} layers, context of {} tokens, {} threads, {} for prompts, lazy layers by {}",
                model.name().unwrap_or("model"),
                model.hparams().architecture,
                model.hparams().n_layer,
                session.n_ctx(),
                threads.0,
                threads.1,
                session.policy(),
            );
            let devices = (0..model.hparams().n_layer).map(|layer| model.layer_device(layer).name());
            let mut shares: Vec<(String, usize)> = Vec::new();
            for device in devices {
                match shares.last_mut() {
                    Some((last, n)) if *last == device => *n += 1,
                    _ => shares.push((device, 1)),
                }
            }
            let shares: Vec<String> = shares.iter().map(|(device, n)| format!("{n} on {device}")).collect();
            eprintln!("layers: {}; output on {}", shares.join(", "), model.output_device().name());
            for place in model.tensors().iter().filter(|place| place.overridden) {
                eprintln!("{}", tensor_line(place));
            }
        }
        Ok(session)
    }
}

/// Where a tensor is.
pub fn tensor_line(place: &TensorPlace) -> String {
    let TensorPlace { name, ty, bytes, device, memory, overridden, .. } = place;
    let why = if *overridden { ", by --override-tensor" } else { "" };
    format!("{name}: {ty}, {} on {} ({memory}{why})", HumanBytes(*bytes as u64), device.name())
}

/// What is to be fitted. Where the user has said what is where, nothing but the context is; without devices nothing.
fn fit_target(args: &PlacementFlags, model: &ModelParams) -> Option<FitTarget> {
    let has_devices = model.devices.as_ref().is_some_and(|devices| !devices.is_empty()) && model.gpu_layers != Some(0);
    let moves = !matches!(args.gpu_layers, Some(GpuLayers::Number(_) | GpuLayers::All))
        && args.tensor_split.is_none()
        && model.tensor_overrides.is_empty();
    (has_devices && args.fit == OnOrOff::On).then(|| FitTarget {
        margins: args.fit_target.iter().map(|mib| mib.saturating_mul(1 << 20)).collect(),
        min_ctx: args.fit_ctx,
        moves,
        ..FitTarget::default()
    })
}

/// The devices of these servers.
#[cfg(feature = "rpc")]
fn connect(servers: &[String]) -> Result<Vec<Device>, Failure> {
    let mut devices = Vec::new();
    for server in servers {
        devices.extend(ggml::rpc::connect(server)?);
    }
    Ok(devices)
}

#[cfg(not(feature = "rpc"))]
fn connect(servers: &[String]) -> Result<Vec<Device>, Failure> {
    match servers {
        [] => Ok(Vec::new()),
        _ => Err(Failure::usage("--rpc: this build cannot use remote devices (it lacks the feature rpc)")),
    }
}

/// What of RoPE is not as in the file.
fn rope(args: &CommonArgs) -> Vec<(&'static str, Override)> {
    let scale = args.rope_scale.or(args.rope_freq_scale.map(|scale| 1.0 / scale));
    let keys = [
        ("scaling.type", args.rope_scaling.clone().map(Override::Str)),
        ("scaling.factor", scale.map(Override::Float)),
        ("freq_base", args.rope_freq_base.map(Override::Float)),
        ("scaling.original_context_length", args.yarn_orig_ctx.map(|n| Override::Int(n as i64))),
    ];
    keys.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

/// Where the layers go. Remote devices come first, as in llama.cpp.
fn model_params(args: &CommonArgs, remote: Vec<Device>) -> Result<ModelParams, Failure> {
    let mut params = ModelParams {
        ggml_kernels: args.lazy.ggml_kernels,
        repack: !args.no_repack,
        overrides: args.override_kv.clone(),
        ..ModelParams::default()
    };
    let placement = &args.placement;
    let is_local = |device: &Device| !remote.contains(device);
    let local: Vec<Device> = Device::all_but_processor().into_iter().filter(is_local).collect();
    params.devices = Some(match &placement.device[..] {
        [] => [remote, local.clone()].concat(),
        [none] if none == "none" => Vec::new(),
        names => devices_named(names)?,
    });
    if let (SplitMode::None, Some(devices)) = (placement.split_mode, &mut params.devices) {
        let n = devices.len();
        match devices.get(placement.main_gpu) {
            Some(&device) => *devices = vec![device],
            None if n == 0 => {}
            None => return Err(Failure::usage(format!("--main-gpu: there are devices 0 to {} only", n - 1))),
        }
    }
    params.tensor_overrides = tensor_overrides(placement)?;
    params.gpu_layers = match placement.gpu_layers {
        Some(GpuLayers::Number(n)) => Some(n as usize),
        None | Some(GpuLayers::Auto | GpuLayers::All) => None,
    };
    params.tensor_split = placement.tensor_split.clone().map_or_else(Vec::new, |split| split.0);
    let wants_none = params.gpu_layers == Some(0) || placement.device.iter().any(|name| name == "none");
    if params.devices.as_ref().is_none_or(Vec::is_empty) && !wants_none {
        let mut gpus: Vec<String> =
            Device::backends().into_iter().filter(|name| name != "CPU" && !name.starts_with("RPC")).collect();
        // Without any driver of Vulkan's ggml does not list the backend either.
        if cfg!(feature = "vulkan") && !gpus.iter().any(|name| name == "Vulkan") {
            gpus.push("Vulkan".to_owned());
        }
        if !gpus.is_empty() {
            eprintln!("no device of {} was found: running on the processor", gpus.join(", "));
        } else if args.verbose && placement.gpu_layers.is_some() {
            eprintln!("there is no device but the processor: -ngl has no effect");
        }
    }
    Ok(params)
}

/// What is elsewhere than its layer. llama.cpp takes these in the order in which they are given; here single tensors come before
/// groups.
fn tensor_overrides(args: &PlacementFlags) -> Result<Vec<TensorOverride>, Failure> {
    let mut overrides = Vec::new();
    for (pattern, name) in &args.override_tensor {
        let all = Device::all();
        // llama.cpp names kinds of memory, which for most devices is the device's name; of a server it is `RPC0[HOST:PORT]`.
        let is_named =
            |device: &&Device| name.eq_ignore_ascii_case(&device.name()) || *name == device.buffer_type().name();
        let device = all.iter().find(is_named).copied().ok_or_else(|| {
            let known: Vec<_> = all.iter().map(|device| device.name()).collect();
            Failure::usage(format!("--override-tensor: there is no {name} here, only {}", known.join(", ")))
        })?;
        overrides.push(TensorOverride { pattern: pattern.clone(), device });
    }
    if args.cpu_moe {
        overrides.push(TensorOverride::experts());
    }
    overrides.extend(TensorOverride::experts_of_first(args.n_cpu_moe.unwrap_or(0)));
    overrides.extend(TensorOverride::feed_forward_of_first(args.n_cpu_ffn.unwrap_or(0)));
    Ok(overrides)
}

/// The devices of these names, whatever their letters' case.
pub fn devices_named(names: &[String]) -> Result<Vec<Device>, Failure> {
    let all = Device::all();
    let named = |name: &String| {
        let found = all.iter().find(|device| device.name().eq_ignore_ascii_case(name));
        found.copied().ok_or_else(|| {
            let known: Vec<_> = all.iter().map(|device| device.name()).collect();
            Failure::usage(format!("--device: there is no {name} here, only {}", known.join(", ")))
        })
    };
    names.iter().map(named).collect()
}

/// The prompt's text, which need not be UTF-8 when it comes from a file.
pub fn prompt(args: PromptArgs) -> Result<Vec<u8>, Failure> {
    if let Some(path) = args.binary_file {
        return read_file(&path);
    }
    match (args.prompt, args.file) {
        (Some(text), _) if args.no_escape => Ok(text.into_bytes()),
        (Some(text), _) => Ok(unescape(text.as_bytes())),
        (None, Some(path)) => text(&path),
        (None, None) => {
            Err(Failure::usage("there is no prompt: give -p TEXT or -f FILE, or use the chat command (see --help)"))
        }
    }
}

/// Where a file is written: where it was asked for, else in its usual place, whose folder is made where it is missing.
pub fn output(asked: Option<PathBuf>, usual: PathBuf) -> Result<PathBuf, Failure> {
    if let Some(path) = asked {
        return Ok(path);
    }
    if let Some(folder) = usual.parent() {
        fs::create_dir_all(folder).map_err(|error| Failure::run(format!("{}: {error}", folder.display())))?;
    }
    Ok(usual)
}

/// The user's text alone, or those built in, which end as one that is read from a file.
pub fn texts<'a>(own: Option<&'a [u8]>, built_in: &[&'a str]) -> Vec<&'a [u8]> {
    match own {
        Some(text) => vec![text],
        None => built_in.iter().map(|text| text.trim_end().as_bytes()).collect(),
    }
}

/// A text file's bytes, or those of stdin for `-`. As in llama.cpp, an editor's last newline is not part of the text.
pub fn text(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = read_file(path)?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Ok(bytes)
}

/// What was read of a file, as text.
pub fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|_| Failure::run(format!("{}: not valid UTF-8", path.display())))
}

/// A file's bytes, or those of stdin for `-`.
pub fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    fs::read(path).map_err(|error| Failure::run(format!("{}: {error}", path.display())))
}

/// Replaces what llama.cpp's `--escape` replaces: \n \r \t \' \" \\ and \xHH. Anything else stays.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let (replaced, length) = match (byte, tail) {
            (b'\\', [b'n', ..]) => (b'\n', 2),
            (b'\\', [b'r', ..]) => (b'\r', 2),
            (b'\\', [b't', ..]) => (b'\t', 2),
            (b'\\', &[quoted @ (b'\'' | b'"' | b'\\'), ..]) => (quoted, 2),
            (b'\\', &[b'x', high, low, ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or(0) as u8;
                (digit(high) << 4 | digit(low), 4)
            }
            _ => (byte, 1),
        };
        out.push(replaced);
        rest = &rest[length..];
    }
    out
}

/// The grammar of a JSON schema, given as text or as a file.
#[cfg(feature = "serve")]
fn schema(text: Option<String>, file: Option<PathBuf>) -> Result<Option<String>, Failure> {
    let (bytes, name) = match (text, file) {
        (Some(text), _) => (text.into_bytes(), "--json-schema".to_owned()),
        (None, Some(path)) => (read_file(&path)?, path.display().to_string()),
        (None, None) => return Ok(None),
    };
    let schema = serde_json::from_slice(&bytes).map_err(|error| Failure::run(format!("{name} is no JSON: {error}")))?;
    let grammar = simlayer::chat::json_schema_to_grammar(&schema);
    Ok(Some(grammar.map_err(|error| Failure::run(format!("{name}: {error}")))?))
}

/// How tokens are chosen in a context of `n_ctx` tokens: as `file` recommends, where nothing else is asked for.
pub fn sampling(args: SamplingArgs, file: &SamplerParams, n_ctx: usize) -> Result<SamplerParams, Failure> {
    let last_n = |n: i32| match n {
        -1 => Ok(u32::try_from(n_ctx).unwrap_or(u32::MAX)),
        n => u32::try_from(n)
            .map_err(|_| Failure::usage(format!("{n} is no number of last tokens: it must be -1 or more"))),
    };
    let grammar = match (args.grammar, args.grammar_file) {
        (Some(grammar), _) => Some(grammar),
        (None, Some(path)) => {
            let bytes = read_file(&path)?;
            let text = String::from_utf8(bytes);
            Some(text.map_err(|_| Failure::run(format!("{}: the grammar is not valid UTF-8", path.display())))?)
        }
        (None, None) => None,
    };
    #[cfg(feature = "serve")]
    let grammar = match schema(args.json_schema, args.json_schema_file)? {
        Some(grammar) => Some(grammar),
        None => grammar,
    };
    let (tau, eta) = file.mirostat.tau_and_eta();
    let (tau, eta) = (args.mirostat_ent.unwrap_or(tau), args.mirostat_lr.unwrap_or(eta));
    let mirostat = Mirostat::new(args.mirostat.map_or(file.mirostat.version(), i64::from), tau, eta);
    let samplers = args.samplers.or(args.sampler_seq);
    Ok(SamplerParams {
        seed: match args.seed {
            -1 => None,
            seed => Some(u32::try_from(seed).map_err(|_| Failure::usage(format!("--seed {seed} is out of range")))?),
        },
        samplers: samplers.unwrap_or_else(|| file.samplers.clone()),
        temperature: args.temp.unwrap_or(file.temperature),
        dynatemp_range: args.dynatemp_range,
        dynatemp_exponent: args.dynatemp_exp,
        top_k: args.top_k.unwrap_or(file.top_k),
        top_p: args.top_p.unwrap_or(file.top_p),
        min_p: args.min_p.unwrap_or(file.min_p),
        typical_p: args.typical,
        top_n_sigma: args.top_nsigma,
        xtc_probability: args.xtc_probability.unwrap_or(file.xtc_probability),
        xtc_threshold: args.xtc_threshold.unwrap_or(file.xtc_threshold),
        repeat_last_n: args.repeat_last_n.map_or(Ok(file.repeat_last_n), last_n)?,
        repeat_penalty: args.repeat_penalty.unwrap_or(file.repeat_penalty),
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
        dry_multiplier: args.dry_multiplier,
        dry_base: args.dry_base,
        dry_allowed_length: args.dry_allowed_length,
        dry_penalty_last_n: last_n(args.dry_penalty_last_n)?,
        dry_sequence_breakers: match args.dry_sequence_breaker {
            breakers if breakers.is_empty() => file.dry_sequence_breakers.clone(),
            breakers => breakers.into_iter().filter(|breaker| breaker != "none").collect(),
        },
        adaptive_target: args.adaptive_target,
        adaptive_decay: args.adaptive_decay,
        mirostat,
        logit_bias: args.logit_bias,
        ignore_eos: args.ignore_eos,
        grammar,
        ..SamplerParams::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let cases: [(&str, &[u8]); 7] = [
            (r"a\nb\tc", b"a\nb\tc"),
            (r#"\"\'\\n"#, b"\"'\\n"),
            (r"\x41\xff\xg1\x4", b"A\xff\\xg1\\x4"),
            (r"C:\dir\", b"C:\\dir\\"),
            (r"\", b"\\"),
            ("é\\né", "é\né".as_bytes()),
            ("", b""),
        ];
        for (text, expected) in cases {
            assert_eq!(unescape(text.as_bytes()), expected, "{text}");
        }
    }
}
