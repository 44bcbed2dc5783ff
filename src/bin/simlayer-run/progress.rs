//! A progress bar for what takes long enough to want one.

use std::{
    cell::RefCell,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

const STEPS: u64 = 1000;
/// What is done before a bar could be read needs none.
const PATIENCE: Duration = Duration::from_millis(400);

/// A bar on stderr, when that is a terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    what: RefCell<String>,
    start: Instant,
    terminal: bool,
}

impl Progress {
    pub fn new(what: impl Into<String>) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::hidden());
        // A wide message is cut off where the terminal ends; a line that wraps could not be drawn over.
        if let Ok(style) = ProgressStyle::with_template("{bar:16} {percent:>3} % {wide_msg}") {
            bar.set_style(style);
        }
        let terminal = io::stderr().is_terminal();
        Progress { bar, what: RefCell::new(what.into()), start: Instant::now(), terminal }
    }

    /// Shows the share that is done, from 0 to 1, of what takes as long in its parts.
    pub fn set(&self, share: f32) {
        let spent = self.start.elapsed().as_secs_f64();
        let left = (share > 0.0).then(|| spent / f64::from(share) - spent);
        self.set_with(share, left.and_then(|left| Duration::try_from_secs_f64(left.max(0.0)).ok()));
    }

    /// Shows the share that is done and how long the rest will take.
    pub fn set_with(&self, share: f32, left: Option<Duration>) {
        // The time first: it is what may not be cut off.
        let left = left.map_or(String::new(), |left| format!("{} left, ", HumanDuration(left)));
        self.bar.set_message(format!("{left}{}", self.what.borrow()));
        if self.terminal && self.bar.is_hidden() && self.start.elapsed() > PATIENCE && share < 1.0 {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position((share * STEPS as f32) as u64);
    }

    /// Says what is being done now where nobody knows how much is left.
    pub fn say_now(&self, what: &str) {
        if self.terminal && self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.set_style(ProgressStyle::default_spinner());
            self.bar.enable_steady_tick(PATIENCE);
        }
        self.bar.set_message(what.to_owned());
    }

    /// Says what is being done now.
    pub fn say(&self, what: impl Into<String>) {
        *self.what.borrow_mut() = what.into();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
