//! How far a calibration has come, and how long it will still take.
//!
//! Its steps cost very different times: a prompt is long, a continuation is short but is run for every set of layers, and
//! is the faster the more of them are lazy. So each kind of step is measured as it is done, and what is left is counted in
//! steps of each kind. Kinds that have not been done yet are estimated from those that have.

use std::time::{Duration, Instant};

/// A step of a calibration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Step {
    /// One excerpt's prompt, uncompressed.
    Prompt,
    /// One excerpt's continuation, uncompressed.
    Base,
    /// The continuations of all excerpts, with this share of the layers active.
    Set { active: f64 },
    /// The first excerpt from the prompt on, with lazy layers.
    Cut,
}

/// How many steps there are, or are left.
#[derive(Debug, Clone, Default)]
pub(super) struct Steps {
    prompts: f64,
    bases: f64,
    sets: f64,
    /// The sum of all sets' active shares.
    active: f64,
    cuts: f64,
}

impl Steps {
    pub fn add(&mut self, step: Step, n: usize) {
        self.count(step, n as f64);
    }

    pub fn remove(&mut self, step: Step) {
        self.count(step, -1.0);
    }

    fn count(&mut self, step: Step, n: f64) {
        let (count, active) = match step {
            Step::Prompt => (&mut self.prompts, 0.0),
            Step::Base => (&mut self.bases, 0.0),
            Step::Set { active } => (&mut self.sets, active),
            Step::Cut => (&mut self.cuts, 0.0),
        };
        *count = (*count + n).max(0.0);
        self.active = (self.active + n * active).max(0.0);
    }
}

/// A straight line through measured points, by least squares.
#[derive(Debug, Default)]
struct Line {
    n: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    fn add(&mut self, x: f64, y: f64) {
        self.n += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.xy += x * y;
    }

    /// Value at 0 and slope, which is not below 0; `None` without points.
    fn fit(&self) -> Option<(f64, f64)> {
        if self.n == 0.0 {
            return None;
        }
        let spread = self.n * self.xx - self.x * self.x;
        // Points that all but lie above each other tell nothing of a slope.
        let slope = if spread > 0.01 * self.n * self.n { (self.n * self.xy - self.x * self.y) / spread } else { 0.0 };
        let mean = self.y / self.n;
        let slope = slope.clamp(0.0, mean);
        Some(((self.y - slope * self.x) / self.n, slope))
    }
}

#[derive(Debug, Default)]
struct Mean {
    n: f64,
    sum: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.n += 1.0;
        self.sum += value;
    }

    fn get(&self) -> Option<f64> {
        (self.n > 0.0).then(|| self.sum / self.n)
    }
}

/// Times in seconds.
#[derive(Debug)]
pub(super) struct Estimate {
    left: Steps,
    n_excerpts: f64,
    /// Tokens of a continuation for each of a prompt.
    score_share: f64,
    prompt: Mean,
    sets: Line,
    cut: Mean,
    spent: f64,
    share: f64,
}

impl Estimate {
    pub fn new(steps: Steps, n_excerpts: usize, n_prompt: usize, n_score: usize) -> Estimate {
        Estimate {
            left: steps,
            n_excerpts: n_excerpts as f64,
            score_share: n_score as f64 / n_prompt as f64,
            prompt: Mean::default(),
            sets: Line::default(),
            cut: Mean::default(),
            spent: 0.0,
            share: 0.0,
        }
    }

    pub fn done(&mut self, step: Step, took: f64) {
        self.left.remove(step);
        self.spent += took;
        match step {
            Step::Prompt => self.prompt.add(took),
            Step::Base => self.sets.add(1.0, took * self.n_excerpts),
            Step::Set { active } => self.sets.add(active, took),
            Step::Cut => self.cut.add(took),
        }
    }

    /// Seconds that are left when this share of a step is done, which took so long; `None` while nothing can be told.
    pub fn left(&self, step: Step, share: f64, took: f64) -> Option<f64> {
        let begun =
            |kind: Step, measured: Option<f64>| measured.or((kind == step && share > 0.05).then(|| took / share));
        let prompt = begun(Step::Prompt, self.prompt.get())?;
        // A continuation's tokens see the whole prompt and give logits, so each takes somewhat longer than a prompt's.
        let (set, slope) = self.sets.fit().unwrap_or((1.2 * self.score_share * prompt * self.n_excerpts, 0.0));
        // Half lazy and read with windows, a prompt is read somewhat faster.
        let cut = begun(Step::Cut, self.cut.get()).unwrap_or(0.8 * prompt + (set + slope / 2.0) / self.n_excerpts);
        let left = self.left.prompts * prompt
            + self.left.bases * (set + slope) / self.n_excerpts
            + self.left.sets * set
            + self.left.active * slope
            + self.left.cuts * cut;
        let this = match step {
            Step::Prompt => prompt,
            Step::Base => (set + slope) / self.n_excerpts,
            Step::Set { active } => set + active * slope,
            Step::Cut => cut,
        };
        Some((left - share * this).max(0.0))
    }

    /// The share of all that is done. It never falls.
    pub fn share(&mut self, took: f64, left: Option<f64>) -> f64 {
        let spent = self.spent + took;
        if let Some(left) = left
            && spent + left > 0.0
        {
            self.share = self.share.max(spent / (spent + left)).min(1.0);
        }
        self.share
    }
}

/// How far a calibration has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// What is being measured.
    pub what: &'static str,
    /// Share of the whole that is done, from 0 to 1; an estimate.
    pub share: f32,
    /// How long the rest will take, by what was measured so far; `None` at the very beginning.
    pub left: Option<Duration>,
}

/// Tells how far it is, by the clock.
pub(super) struct Meter<'a> {
    estimate: Estimate,
    since: Instant,
    progress: &'a mut dyn FnMut(Stage),
}

impl<'a> Meter<'a> {
    pub fn new(estimate: Estimate, progress: &'a mut dyn FnMut(Stage)) -> Meter<'a> {
        Meter { estimate, since: Instant::now(), progress }
    }

    /// A step of which this share is done.
    pub fn part(&mut self, what: &'static str, step: Step, share: f32) {
        let took = self.since.elapsed().as_secs_f64();
        let left = self.estimate.left(step, f64::from(share), took);
        let share = self.estimate.share(took, left) as f32;
        let left = left.and_then(|left| Duration::try_from_secs_f64(left).ok());
        (self.progress)(Stage { what, share, left });
    }

    pub fn done(&mut self, what: &'static str, step: Step) {
        self.estimate.done(step, self.since.elapsed().as_secs_f64());
        self.since = Instant::now();
        self.part(what, step, 0.0);
    }

    /// What comes next begins now: the time before was none of a step's.
    pub fn begin(&mut self) {
        self.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a calibration of 30 layers on 4 excerpts does, in order.
    fn steps() -> Vec<Step> {
        let n = 30;
        let active = |n_lazy: usize| Step::Set { active: 1.0 - n_lazy as f64 / n as f64 };
        let mut steps = vec![Step::Prompt; 4];
        steps.extend([Step::Base; 4]);
        steps.extend(vec![active(1); n]);
        steps.push(active(n));
        steps.extend((1..=n / 2).flat_map(|rescued| [active(n - rescued); 4]));
        steps.extend([Step::Cut; 4]);
        steps
    }

    /// Once a prompt and its continuation were measured, the time left is about what it will be, however the kinds of
    /// steps relate; and it does not grow.
    #[test]
    fn the_time_left_holds() {
        for (prompt, lazy_set, full_set, cut) in [(10.0, 2.0, 4.0, 9.0), (4.0, 8.0, 8.0, 5.0), (60.0, 3.0, 20.0, 38.0)]
        {
            let time = |step: Step| match step {
                Step::Prompt => prompt,
                Step::Base => full_set / 4.0,
                Step::Set { active } => lazy_set + (full_set - lazy_set) * active,
                Step::Cut => cut,
            };
            let mut planned = Steps::default();
            steps().into_iter().for_each(|step| planned.add(step, 1));
            let total: f64 = steps().into_iter().map(time).sum();
            let mut estimate = Estimate::new(planned, 4, 3_000, 384);
            let (mut spent, mut share) = (0.0, 0.0);
            for (at, step) in steps().into_iter().enumerate() {
                let took = time(step);
                // In the middle of a step and at its end.
                let middle = estimate.left(step, 0.5, took / 2.0);
                estimate.done(step, took);
                let end = estimate.left(step, 0.0, 0.0);
                for (spent, left) in [(spent + took / 2.0, middle), (spent + took, end)] {
                    let whole = spent + left.unwrap();
                    let (least, most) = if at < 5 { (0.25, 3.0) } else { (0.9, 1.6) };
                    assert!(whole > least * total && whole < most * total, "step {at}: {whole} of {total}");
                    if at > 39 {
                        assert!((whole / total - 1.0).abs() < 0.2, "step {at}: {whole} of {total}");
                    }
                }
                spent += took;
                let now = estimate.share(0.0, end);
                assert!(now >= share && now <= 1.0);
                share = now;
            }
            assert!(share > 0.999, "{share}");
        }
    }

    #[test]
    fn steps_that_were_done_before_take_no_time() {
        let mut planned = Steps::default();
        planned.add(Step::Prompt, 1);
        planned.add(Step::Set { active: 0.5 }, 10);
        for _ in 0..10 {
            planned.remove(Step::Set { active: 0.5 });
        }
        let mut estimate = Estimate::new(planned, 1, 100, 10);
        assert_eq!(estimate.left(Step::Prompt, 0.0, 0.0), None);
        estimate.done(Step::Prompt, 5.0);
        assert!(estimate.left(Step::Base, 0.0, 0.0).unwrap() < 1e-9);
    }
}
