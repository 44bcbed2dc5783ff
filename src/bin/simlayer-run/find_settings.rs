//! Chooses what gets a cache to a size or a harm, and writes it into the model's profile.

use std::{io::Write, time::Instant};

use serde_json::json;
use simlayer::{
    lazy::{Profile, ProfileError, Setting},
    quality,
};

use crate::{
    args::CalibrateArgs,
    calibrate::{Wanted, nats, tell_of_another},
    failure::Failure,
    interrupt,
    options::{self, Run},
    progress::Progress,
    report,
};

pub fn run(args: CalibrateArgs) -> Result<(), Failure> {
    let wanted = Wanted::of(&args)?;
    let mut run = Run::settle(args.common)?;
    let (model, load) = run.load()?;
    let skipped = &mut |error: ProfileError| eprintln!("skipped: {error}");
    let named = run.session.lazy.profile.as_deref();
    let found = Profile::find(named, &run.model_path, model.identity(), skipped).map_err(Failure::run)?;
    let (_, mut profile) = found.ok_or_else(|| {
        Failure::run("the model has no profile yet: make it with `simlayer-run calibrate` without --target".to_owned())
    })?;
    let excerpts = wanted.excerpts(&model, &run.session)?;
    let output = options::output(args.output_file, Profile::path_for(&run.model_path, model.identity()))?;

    let start = Instant::now();
    interrupt::watch();
    let progress = Progress::new("the uncompressed run");
    let found = profile.clone();
    let mut settings: Vec<Setting> = Vec::new();
    let say = &mut |what: &str| progress.say_now(what);
    let mut finder = quality::SettingFinder::new(&model, &run.session, &found, &excerpts, say)?;
    for target in args.target {
        let setting = finder.find(target)?;
        profile.set(setting.clone());
        settings.push(setting);
        // Each takes minutes: what comes next may be interrupted.
        profile.write(&output).map_err(Failure::run)?;
    }
    drop(finder);
    drop(progress);
    let took = start.elapsed();

    let mut out = interrupt::stdout();
    if args.output.json {
        let object = json!({
            "settings": settings,
            "model": model.name(),
            "file": output,
            "timings": { "load_ms": report::milliseconds(load), "calibrate_ms": report::milliseconds(took) },
        });
        report::write_json(&mut out, &object)?;
    } else {
        for setting in &settings {
            print(&mut out, setting, profile.order.len())?;
        }
    }
    out.flush()?;
    eprintln!("{} written in {:.0} s", output.display(), took.as_secs_f64());
    tell_of_another(&run.model_path, &output);
    Ok(())
}

fn print(out: &mut impl Write, setting: &Setting, n_layer: usize) -> std::io::Result<()> {
    let Setting { target, lazy, n_window, n_rescued, type_k, type_v, prune, n_prompt, kl_mean, nll_mean, .. } = setting;
    let rescued = if *n_rescued > 0 { format!(" and {n_rescued} rescued rows") } else { String::new() };
    let pruned = if *prune { ", pruned" } else { "" };
    writeln!(out, "--lazy profile:{target}")?;
    writeln!(
        out,
        "  {lazy} of {n_layer} layers lazy with a window of {n_window}{rescued}, others in {type_k}/{type_v}{pruned}"
    )?;
    let answers = nll_mean.map_or(String::new(), |_| format!(", answers {}", nats(*nll_mean)));
    let times = report::times(setting.compression);
    writeln!(out, "  {times} × smaller at {n_prompt} tokens, KL {kl_mean:.5}{answers}")
}
