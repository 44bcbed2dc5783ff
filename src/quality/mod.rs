//! What shrinking a cache costs: perplexity, divergence from the uncompressed run, and the profile of a model's layers.
//!
//! ```no_run
//! use simlayer::{AddBos, Model, ModelParams, Session, SessionParams, Special, quality};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::load("model.gguf", &ModelParams::default())?;
//! let tokens = model.vocab().tokenize(&std::fs::read_to_string("text.txt")?, AddBos::Yes, Special::Text)?;
//! let params = SessionParams::default();
//! let mut session = Session::new(&model, params.clone())?;
//! let mut base = Session::new(&model, quality::uncompressed(&params))?;
//!
//! let mut tally = quality::Tally::default();
//! let mut run = quality::Scorer::start(&mut session, &tokens[..3_256], 3_000, 1, &mut |_| {})?;
//! let mut base = quality::Scorer::start(&mut base, &tokens[..3_256], 3_000, 1, &mut |_| {})?;
//! tally.score(&mut run, Some(&mut base), &mut |_| {})?;
//! let score = tally.summary();
//! println!("perplexity {}, KL {:?}", score.perplexity, score.kl_mean);
//! # Ok(())
//! # }
//! ```

mod calibrate;
mod compare;
mod contender;
mod excerpts;
mod exchange;
mod harm;
mod items;
mod journal;
mod meter;
pub mod metrics;
mod pruning;
mod reading;
mod score;
mod settings;

pub use calibrate::{calibrate, calibrate_on};
pub use compare::{Compared, compare};
pub use contender::{Contender, ParseContenderError};
pub use excerpts::{BUILT_IN_TEXTS, Excerpt, Excerpts, ExcerptsError, Extent};
pub use journal::Journal;
pub use meter::Stage;
pub use pruning::{Fitted, PRUNING_TEXTS, Repeated, fit_pruning};
pub use reading::{Held, Reading};
pub use score::{Scorer, Summary, Tally, uncompressed};
pub use settings::SettingFinder;
