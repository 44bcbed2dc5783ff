//! llama.cpp's options, as its tools' tables have them: which of them are ours, which may be given and do nothing here, and
//! which are refused, with what to do instead.
//!
//! None may be taken for something else: clap would read `-no-cnv` as `-n o-cnv`.

/// How many words after an option belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    None,
    One,
    Two,
    /// `on`, `off`, `auto` or none.
    Switch,
}

/// What an option means here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// This option of ours, where the command has it.
    Ours(&'static str),
    /// It may be given, and changes nothing that one would notice.
    Nothing,
    /// An option of the command `serve` alone: this one of ours, or one that may be given there and changes nothing.
    Serve(Option<&'static str>),
    /// An option of the command `serve`, this one of ours, which other commands may be given: it changes nothing there.
    ServeOrNothing(&'static str),
    /// It is not supported: what to do instead.
    Refused(&'static str),
}

/// What other commands than `serve` say of its options.
pub const OF_SERVE: &str = "it is an option of the command serve";

/// An option with all its spellings.
#[derive(Debug)]
pub struct Known {
    pub names: &'static [&'static str],
    pub values: Values,
    pub meaning: Meaning,
}

/// Variables of the environment that stand for options of ours, as in llama.cpp's tools.
pub const VARIABLES: &[(&str, &str)] = &[
    ("LLAMA_ARG_THREADS", "--threads"),
    ("LLAMA_ARG_CTX_SIZE", "--ctx-size"),
    ("LLAMA_ARG_N_PREDICT", "--predict"),
    ("LLAMA_ARG_BATCH", "--batch-size"),
    ("LLAMA_ARG_UBATCH", "--ubatch-size"),
    ("LLAMA_ARG_FLASH_ATTN", "--flash-attn"),
    ("LLAMA_ARG_ROPE_SCALING_TYPE", "--rope-scaling"),
    ("LLAMA_ARG_ROPE_SCALE", "--rope-scale"),
    ("LLAMA_ARG_ROPE_FREQ_BASE", "--rope-freq-base"),
    ("LLAMA_ARG_ROPE_FREQ_SCALE", "--rope-freq-scale"),
    ("LLAMA_ARG_YARN_ORIG_CTX", "--yarn-orig-ctx"),
    ("LLAMA_ARG_CACHE_TYPE_K", "--cache-type-k"),
    ("LLAMA_ARG_CACHE_TYPE_V", "--cache-type-v"),
    ("LLAMA_ARG_RPC", "--rpc"),
    ("LLAMA_ARG_DEVICE", "--device"),
    ("LLAMA_ARG_N_GPU_LAYERS", "--gpu-layers"),
    ("LLAMA_ARG_TENSOR_SPLIT", "--tensor-split"),
    ("LLAMA_ARG_SPLIT_MODE", "--split-mode"),
    ("LLAMA_ARG_MAIN_GPU", "--main-gpu"),
    ("LLAMA_ARG_OVERRIDE_TENSOR", "--override-tensor"),
    ("LLAMA_ARG_CPU_MOE", "--cpu-moe"),
    ("LLAMA_ARG_N_CPU_MOE", "--n-cpu-moe"),
    ("LLAMA_ARG_N_CPU_FFN", "--n-cpu-ffn"),
    ("LLAMA_ARG_FIT", "--fit"),
    ("LLAMA_ARG_FIT_TARGET", "--fit-target"),
    ("LLAMA_ARG_FIT_CTX", "--fit-ctx"),
    ("LLAMA_ARG_NUMA", "--numa"),
    ("LLAMA_ARG_MODEL", "--model"),
    #[cfg(feature = "download")]
    ("LLAMA_ARG_MODEL_URL", "--model-url"),
    #[cfg(feature = "download")]
    ("LLAMA_ARG_HF_REPO", "--hf-repo"),
    #[cfg(feature = "download")]
    ("LLAMA_ARG_HF_FILE", "--hf-file"),
    #[cfg(feature = "download")]
    ("HF_TOKEN", "--hf-token"),
    #[cfg(feature = "download")]
    ("LLAMA_ARG_OFFLINE", "--offline"),
    ("LLAMA_ARG_TEMPERATURE", "--temp"),
    ("LLAMA_ARG_TOP_K", "--top-k"),
    ("LLAMA_ARG_TOP_P", "--top-p"),
    ("LLAMA_ARG_MIN_P", "--min-p"),
    ("LLAMA_ARG_REPEAT_PENALTY", "--repeat-penalty"),
    ("LLAMA_ARG_PRESENCE_PENALTY", "--presence-penalty"),
    ("LLAMA_ARG_FREQUENCY_PENALTY", "--frequency-penalty"),
    ("LLAMA_ARG_CHAT_TEMPLATE", "--chat-template"),
    ("LLAMA_ARG_CHAT_TEMPLATE_FILE", "--chat-template-file"),
    ("LLAMA_ARG_CHAT_TEMPLATE_KWARGS", "--chat-template-kwargs"),
    ("LLAMA_ARG_N_PARALLEL", "--parallel"),
    ("LLAMA_ARG_ALIAS", "--alias"),
    ("LLAMA_ARG_HOST", "--host"),
    ("LLAMA_ARG_PORT", "--port"),
    ("LLAMA_ARG_CORS_ORIGINS", "--cors-origins"),
    ("LLAMA_API_KEY", "--api-key"),
    ("LLAMA_ARG_API_KEY_FILE", "--api-key-file"),
    ("LLAMA_ARG_TIMEOUT", "--timeout"),
    ("LLAMA_ARG_SSE_PING_INTERVAL", "--sse-ping-interval"),
];

/// What is known of an option, by any of its spellings.
pub fn find(name: &str) -> Option<&'static Known> {
    OPTIONS.iter().find(|known| known.names.contains(&name))
}

/// Whether a word is the value of a [`Values::Switch`], as llama.cpp reads it.
pub fn is_switch_value(word: &str) -> bool {
    matches!(word, "on" | "off" | "auto" | "true" | "false" | "enabled" | "disabled" | "1" | "0" | "-1")
}

const fn ours(names: &'static [&'static str], values: Values, option: &'static str) -> Known {
    Known { names, values, meaning: Meaning::Ours(option) }
}

const fn nothing(names: &'static [&'static str], values: Values) -> Known {
    Known { names, values, meaning: Meaning::Nothing }
}

const fn served(names: &'static [&'static str], values: Values, option: &'static str) -> Known {
    Known { names, values, meaning: Meaning::Serve(Some(option)) }
}

const fn idle_when_served(names: &'static [&'static str], values: Values) -> Known {
    Known { names, values, meaning: Meaning::Serve(None) }
}

const fn refused(names: &'static [&'static str], values: Values, instead: &'static str) -> Known {
    Known { names, values, meaning: Meaning::Refused(instead) }
}

#[cfg(feature = "download")]
const OTHER_DOWNLOAD: &str = "fetch the model with -hf or -mu, or fetch its GGUF file and name it with -m";
#[cfg(not(feature = "download"))]
const OTHER_DOWNLOAD: &str = DOWNLOAD;
#[cfg(not(feature = "download"))]
const DOWNLOAD: &str =
    "this program is built without the feature `download`: fetch the model's GGUF file and name it with -m";
const CACHE_LIST: &str = "what was fetched is in the cache's folder (README.md)";
const SERVER: &str = "it is llama-server's: run that on simlayer's library (docs/c-abi.md)";
const PROXY: &str = "put a reverse proxy in front (docs/serve.md)";
const EMBEDDINGS: &str = "serve gives embeddings of models that decode; others run in llama-server (docs/c-abi.md)";
const DRAFT: &str = "there is no speculative decoding";
const MEDIA: &str = "pictures, sounds and videos are not read: llama-server on simlayer's library reads none either";
const YARN: &str = "YaRN's factors are those of the file";
/// What asks for a conversation.
pub const CONVERSATION: &[&str] = &["-cnv", "--conversation", "-i", "--interactive", "-if", "--interactive-first"];
const AFFIXES: &str = "write it into the prompt, or use the command chat, which applies the model's template";
const REASONING: &str = "an answer is shown as the model gives it, its reasoning included";
#[cfg(not(feature = "serve"))]
const SCHEMA: &str = "this program is built without the feature `serve`, which turns schemas into grammars";

use Values::{None as No, One, Switch, Two};

const OPTIONS: &[Known] = &[
    // All commands.
    ours(&["-h", "--help", "--usage"], No, "--help"),
    ours(&["--version"], No, "--version"),
    refused(&["-cl", "--cache-list"], No, CACHE_LIST),
    refused(&["--completion-bash"], No, "use the command `completions bash`"),
    ours(&["-t", "--threads"], One, "--threads"),
    ours(&["-tb", "--threads-batch"], One, "--threads-batch"),
    nothing(&["-C", "--cpu-mask", "-Cr", "--cpu-range", "--cpu-strict", "--prio", "--poll"], One),
    nothing(
        &["-Cb", "--cpu-mask-batch", "-Crb", "--cpu-range-batch", "--cpu-strict-batch", "--prio-batch", "--poll-batch"],
        One,
    ),
    ours(&["-c", "--ctx-size"], One, "--ctx-size"),
    ours(&["-n", "--predict", "--n-predict"], One, "--predict"),
    ours(&["-b", "--batch-size"], One, "--batch-size"),
    ours(&["-ub", "--ubatch-size"], One, "--ubatch-size"),
    // The context is never shifted, and windows by design are never dropped here.
    nothing(&["--keep"], One),
    nothing(&["--swa-full", "--no-context-shift"], No),
    refused(&["--context-shift"], No, "the context is never shifted: give a larger -c"),
    ours(&["-fa", "--flash-attn"], Switch, "--flash-attn"),
    ours(&["-p", "--prompt"], One, "--prompt"),
    ours(&["-f", "--file"], One, "--file"),
    ours(&["-bf", "--binary-file"], One, "--binary-file"),
    ours(&["-e", "--escape"], No, "--escape"),
    ours(&["--no-escape"], No, "--no-escape"),
    nothing(&["--perf", "--no-perf", "--warmup", "--no-warmup"], No),
    ours(&["--rope-scaling"], One, "--rope-scaling"),
    ours(&["--rope-scale"], One, "--rope-scale"),
    ours(&["--rope-freq-base"], One, "--rope-freq-base"),
    ours(&["--rope-freq-scale"], One, "--rope-freq-scale"),
    ours(&["--yarn-orig-ctx"], One, "--yarn-orig-ctx"),
    refused(&["--yarn-ext-factor", "--yarn-attn-factor", "--yarn-beta-slow", "--yarn-beta-fast"], One, YARN),
    nothing(&["-kvo", "--kv-offload", "--repack", "--no-host"], No),
    ours(&["--op-offload"], No, "--op-offload"),
    ours(&["--no-op-offload"], No, "--no-op-offload"),
    refused(&["-nkvo", "--no-kv-offload"], No, "a layer's cache is beside its weights: move layers with -ngl"),
    ours(&["-nr", "--no-repack"], No, "--no-repack"),
    ours(&["-ctk", "--cache-type-k"], One, "--cache-type-k"),
    ours(&["-ctv", "--cache-type-v"], One, "--cache-type-v"),
    nothing(&["-dt", "--defrag-thold"], One),
    ours(&["--rpc"], One, "--rpc"),
    // Weights are mapped, and read as they are needed.
    nothing(&["-lm", "--load-mode", "-lzm", "--lazy-mode"], One),
    ours(&["--numa"], One, "--numa"),
    nothing(&["--mmap", "--no-mmap", "--mlock", "-dio", "--direct-io", "-ndio", "--no-direct-io"], No),
    ours(&["-dev", "--device"], One, "--device"),
    refused(&["--list-devices"], No, "use the command devices"),
    ours(&["-ot", "--override-tensor"], One, "--override-tensor"),
    ours(&["-cmoe", "--cpu-moe"], No, "--cpu-moe"),
    ours(&["-ncmoe", "--n-cpu-moe"], One, "--n-cpu-moe"),
    ours(&["-ncffn", "--n-cpu-ffn"], One, "--n-cpu-ffn"),
    ours(&["-sm", "--split-mode"], One, "--split-mode"),
    ours(&["-mg", "--main-gpu"], One, "--main-gpu"),
    ours(&["-ngl", "--gpu-layers", "--n-gpu-layers"], One, "--gpu-layers"),
    ours(&["-ts", "--tensor-split"], One, "--tensor-split"),
    ours(&["-fit", "--fit"], Switch, "--fit"),
    ours(&["-fitt", "--fit-target"], One, "--fit-target"),
    ours(&["-fitc", "--fit-ctx"], One, "--fit-ctx"),
    refused(&["--check-tensors"], No, "header, shapes and sizes are always checked, the weights' values never"),
    ours(&["--override-kv"], One, "--override-kv"),
    ours(&["--lora"], One, "--lora"),
    ours(&["--lora-scaled"], One, "--lora-scaled"),
    refused(&["--control-vector", "--control-vector-scaled"], One, "there are no control vectors"),
    refused(&["--control-vector-layer-range"], Two, "there are no control vectors"),
    ours(&["-m", "--model"], One, "--model"),
    #[cfg(feature = "download")]
    ours(&["-mu", "--model-url"], One, "--model-url"),
    #[cfg(feature = "download")]
    ours(&["-hf", "-hfr", "--hf-repo"], One, "--hf-repo"),
    #[cfg(feature = "download")]
    ours(&["-hff", "--hf-file"], One, "--hf-file"),
    #[cfg(feature = "download")]
    ours(&["-hft", "--hf-token"], One, "--hf-token"),
    #[cfg(feature = "download")]
    ours(&["--offline"], No, "--offline"),
    #[cfg(not(feature = "download"))]
    refused(&["-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"], One, DOWNLOAD),
    #[cfg(not(feature = "download"))]
    nothing(&["-hft", "--hf-token"], One),
    #[cfg(not(feature = "download"))]
    nothing(&["--offline"], No),
    refused(&["-dr", "--docker-repo"], One, OTHER_DOWNLOAD),
    nothing(&["--log-disable", "--log-prefix", "--no-log-prefix", "--log-timestamps", "--no-log-timestamps"], No),
    nothing(&["--no-log-jsonl"], No),
    refused(&["--log-jsonl"], No, "the log goes to stderr as text"),
    refused(&["--log-file"], One, "the log goes to stderr: redirect it with 2> FILE"),
    refused(&["--log-prompts-dir"], One, "prompts are not logged"),
    nothing(&["--log-colors", "-co", "--color"], Switch),
    ours(&["-v", "--verbose", "--log-verbose"], No, "--verbose"),
    nothing(&["-lv", "--verbosity", "--log-verbosity"], One),
    // Sampling.
    ours(&["--samplers"], One, "--samplers"),
    ours(&["--sampler-seq", "--sampling-seq"], One, "--sampler-seq"),
    ours(&["-s", "--seed"], One, "--seed"),
    ours(&["--ignore-eos"], No, "--ignore-eos"),
    ours(&["--temp", "--temperature"], One, "--temp"),
    ours(&["--top-k"], One, "--top-k"),
    ours(&["--top-p"], One, "--top-p"),
    ours(&["--min-p"], One, "--min-p"),
    ours(&["--top-nsigma", "--top-n-sigma"], One, "--top-nsigma"),
    ours(&["--xtc-probability"], One, "--xtc-probability"),
    ours(&["--xtc-threshold"], One, "--xtc-threshold"),
    ours(&["--typical", "--typical-p"], One, "--typical"),
    ours(&["--repeat-last-n"], One, "--repeat-last-n"),
    ours(&["--repeat-penalty"], One, "--repeat-penalty"),
    ours(&["--presence-penalty"], One, "--presence-penalty"),
    ours(&["--frequency-penalty"], One, "--frequency-penalty"),
    ours(&["--dry-multiplier"], One, "--dry-multiplier"),
    ours(&["--dry-base"], One, "--dry-base"),
    ours(&["--dry-allowed-length"], One, "--dry-allowed-length"),
    ours(&["--dry-penalty-last-n"], One, "--dry-penalty-last-n"),
    ours(&["--dry-sequence-breaker"], One, "--dry-sequence-breaker"),
    ours(&["--adaptive-target"], One, "--adaptive-target"),
    ours(&["--adaptive-decay"], One, "--adaptive-decay"),
    ours(&["--dynatemp-range"], One, "--dynatemp-range"),
    ours(&["--dynatemp-exp"], One, "--dynatemp-exp"),
    ours(&["--mirostat"], One, "--mirostat"),
    ours(&["--mirostat-lr"], One, "--mirostat-lr"),
    ours(&["--mirostat-ent"], One, "--mirostat-ent"),
    ours(&["-l", "--logit-bias"], One, "--logit-bias"),
    ours(&["--grammar"], One, "--grammar"),
    ours(&["--grammar-file"], One, "--grammar-file"),
    #[cfg(feature = "serve")]
    ours(&["-j", "--json-schema"], One, "--json-schema"),
    #[cfg(feature = "serve")]
    ours(&["-jf", "--json-schema-file"], One, "--json-schema-file"),
    #[cfg(not(feature = "serve"))]
    refused(&["-j", "--json-schema", "-jf", "--json-schema-file"], One, SCHEMA),
    nothing(&["-bs", "--backend-sampling"], No),
    // llama-cli and llama-completion.
    refused(&["--server-base"], One, "everything runs in this process"),
    nothing(&["--verbose-prompt", "--simple-io", "--show-timings", "--no-show-timings"], No),
    ours(&["--display-prompt"], No, "--display-prompt"),
    ours(&["--no-display-prompt"], No, "--no-display-prompt"),
    ours(&["-sys", "--system-prompt"], One, "--system"),
    ours(&["-sysf", "--system-prompt-file"], One, "--system-prompt-file"),
    ours(&["-r", "--reverse-prompt"], One, "--reverse-prompt"),
    refused(&["-sp", "--special"], No, "special tokens are not shown"),
    ours(&["-st", "--single-turn"], No, "--single-turn"),
    refused(&["-mli", "--multiline-input"], No, "give a long message with -f, or with /read FILE in the command chat"),
    // They choose the command chat where none is named.
    nothing(CONVERSATION, No),
    // Without a command a prompt is continued as it stands.
    nothing(&["-no-cnv", "--no-conversation"], No),
    refused(&["-o", "--output", "--output-file"], One, "the text goes to stdout: redirect it with > FILE"),
    ours(&["--chat-template"], One, "--chat-template"),
    ours(&["--chat-template-file"], One, "--chat-template-file"),
    ours(&["--chat-template-kwargs"], One, "--chat-template-kwargs"),
    nothing(&["--jinja", "--no-skip-chat-parsing", "--skip-chat-parsing"], No),
    refused(&["--no-jinja"], No, "templates are always Jinja's"),
    refused(&["--reasoning-format", "--reasoning-effort"], One, REASONING),
    refused(&["-rea", "--reasoning"], Switch, REASONING),
    refused(&["--reasoning-budget", "--reasoning-budget-message"], One, REASONING),
    nothing(&["--reasoning-preserve", "--no-reasoning-preserve"], No),
    nothing(&["-ptc", "--print-token-count"], One),
    ours(&["--prompt-cache"], One, "--prompt-cache"),
    ours(&["--prompt-cache-all"], No, "--prompt-cache-all"),
    ours(&["--prompt-cache-ro"], No, "--prompt-cache-ro"),
    refused(&["--in-prefix-bos"], No, AFFIXES),
    refused(&["--in-prefix", "--in-suffix"], One, AFFIXES),
    refused(&["-gan", "--grp-attn-n", "-gaw", "--grp-attn-w"], One, "use --rope-scaling to go beyond what was trained"),
    refused(&["-mm", "--mmproj", "-mmu", "--mmproj-url", "-mmdev", "--mmproj-device"], One, MEDIA),
    nothing(&["--mmproj-auto", "--no-mmproj", "--no-mmproj-auto", "--mmproj-offload", "--no-mmproj-offload"], No),
    refused(&["--image", "--audio", "--video", "--image-min-tokens", "--image-max-tokens"], One, MEDIA),
    refused(
        &["--video-fps", "--video-timestamp-interval", "--video-ffmpeg-dir", "--mtmd-batch-max-tokens"],
        One,
        MEDIA,
    ),
    // Speculation.
    refused(
        &[
            "--spec-draft-type-k",
            "-ctkd",
            "--cache-type-k-draft",
            "--spec-draft-type-v",
            "-ctvd",
            "--cache-type-v-draft",
        ],
        One,
        DRAFT,
    ),
    refused(&["--spec-draft-hf", "-hfd", "-hfrd", "--hf-repo-draft"], One, DRAFT),
    refused(&["--spec-draft-model", "-md", "--model-draft"], One, DRAFT),
    refused(&["--spec-draft-threads", "-td", "--threads-draft"], One, DRAFT),
    refused(&["--spec-draft-threads-batch", "-tbd", "--threads-batch-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-mask", "-Cd", "--cpu-mask-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-range", "-Crd", "--cpu-range-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-strict", "--cpu-strict-draft", "--spec-draft-prio", "--prio-draft"], One, DRAFT),
    refused(&["--spec-draft-poll", "--poll-draft", "--spec-draft-poll-batch", "--poll-batch-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-mask-batch", "-Cbd", "--cpu-mask-batch-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-range-batch", "-Crbd", "--cpu-range-batch-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-strict-batch", "--cpu-strict-batch-draft"], One, DRAFT),
    refused(&["--spec-draft-prio-batch", "--prio-batch-draft"], One, DRAFT),
    refused(&["--spec-draft-override-tensor", "-otd", "--override-tensor-draft"], One, DRAFT),
    refused(&["--spec-draft-cpu-moe", "-cmoed", "--cpu-moe-draft"], No, DRAFT),
    refused(&["--spec-draft-n-cpu-moe", "--spec-draft-ncmoe", "-ncmoed", "--n-cpu-moe-draft"], One, DRAFT),
    refused(&["--spec-draft-n-max", "--spec-draft-n-min", "--spec-synth-len", "--spec-synth-rates"], One, DRAFT),
    refused(&["--spec-draft-p-split", "--draft-p-split", "--spec-draft-p-min", "--draft-p-min"], One, DRAFT),
    refused(&["--spec-draft-backend-sampling", "--no-spec-draft-backend-sampling", "--spec-default"], No, DRAFT),
    refused(&["--spec-draft-device", "-devd", "--device-draft"], One, DRAFT),
    refused(&["--spec-draft-ngl", "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"], One, DRAFT),
    refused(
        &["--spec-type", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max", "--spec-ngram-mod-n-match"],
        One,
        DRAFT,
    ),
    refused(&["--spec-ngram-simple-size-n", "--spec-ngram-simple-size-m", "--spec-ngram-simple-min-hits"], One, DRAFT),
    refused(&["--spec-ngram-map-k-size-n", "--spec-ngram-map-k-size-m", "--spec-ngram-map-k-min-hits"], One, DRAFT),
    refused(
        &["--spec-ngram-map-k4v-size-n", "--spec-ngram-map-k4v-size-m", "--spec-ngram-map-k4v-min-hits"],
        One,
        DRAFT,
    ),
    refused(&["--spec-ngram-size-n", "--spec-ngram-size-m", "--spec-ngram-min-hits"], One, DRAFT),
    refused(&["--draft", "--draft-n", "--draft-max", "--draft-min", "--draft-n-min"], One, DRAFT),
    refused(&["-lcs", "--lookup-cache-static", "-lcd", "--lookup-cache-dynamic"], One, DRAFT),
    // Models by name.
    refused(
        &["--gpt-oss-20b-default", "--gpt-oss-120b-default", "--vision-gemma-4b-default", "--vision-gemma-12b-default"],
        No,
        OTHER_DOWNLOAD,
    ),
    refused(&["--embd-gemma-default", "--fim-qwen-1.5b-default", "--fim-qwen-3b-default"], No, OTHER_DOWNLOAD),
    refused(
        &["--fim-qwen-7b-default", "--fim-qwen-7b-spec", "--fim-qwen-14b-spec", "--fim-qwen-30b-default"],
        No,
        OTHER_DOWNLOAD,
    ),
    // llama-server.
    nothing(&["-ctxcp", "--ctx-checkpoints", "--swa-checkpoints", "-cram", "--cache-ram"], One),
    nothing(&["-cms", "--checkpoint-min-step"], One),
    Known { names: &["-np", "--parallel"], values: One, meaning: Meaning::ServeOrNothing("--parallel") },
    served(&["-a", "--alias"], One, "--alias"),
    served(&["--host"], One, "--host"),
    served(&["--port"], One, "--port"),
    served(&["--cors-origins"], One, "--cors-origins"),
    served(&["--api-key"], One, "--api-key"),
    served(&["--api-key-file"], One, "--api-key-file"),
    served(&["-to", "--timeout"], One, "--timeout"),
    served(&["--sse-ping-interval"], One, "--sse-ping-interval"),
    // All of it is always on, or the scheduler's to say.
    idle_when_served(&["-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"], No),
    idle_when_served(&["--cache-idle-slots", "-cb", "--cont-batching", "--cache-prompt", "--metrics", "--slots"], No),
    idle_when_served(&["--props", "--prefill-assistant", "--ui", "--webui", "--no-prefill-assistant"], No),
    idle_when_served(&["--kv-unified-per-slot", "--threads-http", "--cache-reuse", "-sps"], One),
    idle_when_served(&["--slot-prompt-similarity", "--cors-methods", "--cors-headers"], One),
    refused(&["--no-cache-idle-slots", "--no-cache-prompt"], No, "what is known of a prompt is never read again"),
    refused(&["-nocb", "--no-cont-batching"], No, "conversations always share batches"),
    refused(&["--no-slots"], No, "what /slots says is no secret of anybody's: close it in a reverse proxy"),
    refused(&["--pooling", "--embd-normalize"], One, "an embedding is the last token's, of length 1"),
    refused(&["--embedding", "--embeddings", "--rerank", "--reranking"], No, EMBEDDINGS),
    refused(&["--cors-credentials", "--no-cors-credentials"], No, "keys come in a header, never in a cookie"),
    refused(&["--api-prefix", "--path", "--ssl-key-file", "--ssl-cert-file"], One, PROXY),
    refused(&["--reuse-port"], No, PROXY),
    refused(&["--slot-save-path"], One, "idle conversations are kept with --kv-disk"),
    refused(&["--tags", "--media-path", "--sleep-idle-seconds"], One, SERVER),
    refused(&["--spm-infill", "--lora-init-without-apply"], No, SERVER),
    refused(&["--ui-config", "--webui-config", "--ui-config-file", "--webui-config-file"], One, SERVER),
    refused(&["--ui-mcp-proxy", "--webui-mcp-proxy", "--no-ui-mcp-proxy", "--no-webui-mcp-proxy"], No, SERVER),
    refused(&["--tools", "--tools-runtime", "--mcp-servers-config", "--mcp-servers-json"], One, SERVER),
    refused(&["-ag", "--agent", "-no-ag", "--no-agent", "--no-ui", "--no-webui"], No, SERVER),
    refused(&["--models-dir", "--models-preset", "--models-max"], One, "serve has one model: give it with -m"),
    refused(&["--models-autoload", "--no-models-autoload"], No, "serve has one model: give it with -m"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_name_stands_once() {
        let mut names = BTreeSet::new();
        for known in OPTIONS {
            for name in known.names {
                assert!(names.insert(name), "{name} stands twice");
                assert!(name.starts_with('-'), "{name}");
            }
            if let Meaning::Refused(instead) = known.meaning {
                assert!(!instead.is_empty());
            }
        }
    }
}
