//! How tokens are chosen.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use simlayer::sampling::SamplerStep;

/// How tokens are chosen. The defaults are llama-cli's; where the file recommends others (`general.sampling.…`), those count.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// What runs in which order: top_k;temperature [default: the file's, else penalties;dry;top_n_sigma;top_k;typ_p;top_p;
    /// min_p;xtc;temperature]
    #[arg(long, value_name = "NAME;...", value_parser = SamplerStep::list, conflicts_with = "sampler_seq")]
    pub samplers: Option<Samplers>,
    /// The same by letters: edskypmxt
    #[arg(long, alias = "sampling-seq", value_name = "LETTERS", value_parser = SamplerStep::sequence)]
    pub sampler_seq: Option<Samplers>,
    /// Temperature; 0 always takes the most probable token [default: the file's, else 0.8]
    #[arg(long, alias = "temperature", value_name = "T", allow_negative_numbers = true)]
    pub temp: Option<f32>,
    /// Keep the K most probable tokens; 0 keeps all [default: the file's, else 40]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<i32>,
    /// Keep the most probable tokens that together have this probability; 1 is off [default: the file's, else 0.95]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Keep tokens with this share of the best one's probability; 0 is off [default: the file's, else 0.05]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Locally typical sampling; 1 is off
    #[arg(long, alias = "typical-p", value_name = "P", default_value_t = 1.0)]
    pub typical: f32,
    /// Keep tokens within this many standard deviations of the best; -1 is off
    #[arg(long, alias = "top-n-sigma", value_name = "N", default_value_t = -1.0, allow_negative_numbers = true)]
    pub top_nsigma: f32,
    /// Chance that XTC takes the best tokens away; 0 is off [default: the file's, else 0]
    #[arg(long, value_name = "P")]
    pub xtc_probability: Option<f32>,
    /// Probability above which XTC takes a token away [default: the file's, else 0.1]
    #[arg(long, value_name = "P")]
    pub xtc_threshold: Option<f32>,
    /// Width of a temperature range that follows the entropy; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0)]
    pub dynatemp_range: f32,
    /// How the entropy maps to that range
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    pub dynatemp_exp: f32,
    /// Last tokens that the penalties look at; 0 is off, -1 the whole context [default: the file's, else 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub repeat_last_n: Option<i32>,
    /// Penalty for tokens seen; 1 is off [default: the file's, else 1]
    #[arg(long, value_name = "N")]
    pub repeat_penalty: Option<f32>,
    /// Penalty for each time that a token was seen; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Penalty for tokens seen at all; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Strength of DRY, against repeated sequences; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0)]
    pub dry_multiplier: f32,
    /// Base of DRY's growth
    #[arg(long, value_name = "N", default_value_t = 1.75)]
    pub dry_base: f32,
    /// Length of a repetition that DRY allows
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub dry_allowed_length: i32,
    /// Last tokens that DRY looks at; 0 is off, -1 the whole context
    #[arg(long, value_name = "N", default_value_t = 64, allow_negative_numbers = true)]
    pub dry_penalty_last_n: i32,
    /// A text that breaks a repetition (may be given several times; none for none) [default: \n : " *]
    #[arg(long, value_name = "TEXT", action = ArgAction::Append, allow_hyphen_values = true)]
    pub dry_sequence_breaker: Vec<String>,
    /// Probability near which the sampler adaptive_p draws, where --samplers has it; -1 is off
    #[arg(long, value_name = "P", default_value_t = -1.0, allow_negative_numbers = true)]
    pub adaptive_target: f32,
    /// How long its past counts, 0 to 0.99
    #[arg(long, value_name = "N", default_value_t = 0.9)]
    pub adaptive_decay: f32,
    /// Mirostat: 0 is off, 1 or 2 its version [default: the file's, else 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=2))]
    pub mirostat: Option<u8>,
    /// Mirostat's learning rate [default: the file's, else 0.1]
    #[arg(long, value_name = "N")]
    pub mirostat_lr: Option<f32>,
    /// Mirostat's target entropy [default: the file's, else 5]
    #[arg(long, value_name = "N")]
    pub mirostat_ent: Option<f32>,
    /// Add BIAS to a token's logit: 15043+1 or 15043-1 (may be given several times)
    #[arg(short, long, value_name = "TOKEN(+/-)BIAS", action = ArgAction::Append, value_parser = logit_bias)]
    pub logit_bias: Vec<(i32, f32)>,
    /// Seed of the random choices; -1 takes a random one
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub seed: i64,
    /// Go on where the model would end
    #[arg(long)]
    pub ignore_eos: bool,
    /// A GBNF grammar that the text must follow
    #[arg(long, value_name = "GRAMMAR", conflicts_with = "grammar_file")]
    pub grammar: Option<String>,
    /// A file with such a grammar
    #[arg(long, value_name = "FILE")]
    pub grammar_file: Option<PathBuf>,
    /// A JSON schema of the text
    #[cfg(feature = "serve")]
    #[arg(short, long, value_name = "SCHEMA", conflicts_with_all = ["json_schema_file", "grammar", "grammar_file"])]
    pub json_schema: Option<String>,
    /// A file with such a schema (also -jf)
    #[cfg(feature = "serve")]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["grammar", "grammar_file"])]
    pub json_schema_file: Option<PathBuf>,
}

/// Samplers in their order. For clap a plain list would be an option that is given several times.
pub type Samplers = Vec<SamplerStep>;

fn logit_bias(text: &str) -> Result<(i32, f32), String> {
    let wrong = || "it must be a token's number and a signed bias, such as 15043-1".to_owned();
    let sign = text.find(['+', '-']).ok_or_else(wrong)?;
    let (token, bias) = text.split_at(sign);
    match (token.parse(), bias.parse::<f32>()) {
        (Ok(token), Ok(bias)) if !bias.is_nan() => Ok((token, bias)),
        _ => Err(wrong()),
    }
}
