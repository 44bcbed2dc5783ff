//! A progress bar for what takes long enough to want one.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const STEPS: u64 = 1000;
/// What is done before a bar could be read needs none.
const PATIENCE: Duration = Duration::from_millis(400);

/// A bar on stderr, when that is a terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    start: Instant,
    terminal: bool,
}

impl Progress {
    pub fn new(what: impl Into<String>) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::hidden()).with_message(what.into());
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent:>3} % of {msg}, {eta} left") {
            bar.set_style(style);
        }
        Progress { bar, start: Instant::now(), terminal: io::stderr().is_terminal() }
    }

    /// Shows the share that is done, from 0 to 1.
    pub fn set(&self, share: f32) {
        if self.terminal && self.bar.is_hidden() && self.start.elapsed() > PATIENCE && share < 1.0 {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position((share * STEPS as f32) as u64);
    }

    /// Says what is being done now.
    pub fn say(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
