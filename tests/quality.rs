//! The commands that measure quality, as a user runs them: the real binary on the real model, on short texts.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use simlayer::{
    AddBos, Special, Token, Vocab,
    quality::{self, Excerpts, Extent},
};
use simlayer_testkit::{
    Logits, RandomModel, UpstreamRef, WeightType, metrics::log_softmax, smollm2_path, workspace_root,
};

/// Runs a command on a model with one thread and gives its JSON.
fn json_of(model: &Path, args: &[&str]) -> Value {
    let output = run_on(model, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let stdout = String::from_utf8(output.stdout).expect("stdout is UTF-8");
    assert_eq!(stdout.trim_end().lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

fn run_on(model: &Path, args: &[&str]) -> Output {
    program(model, args).output().expect("it runs")
}

/// The program with one thread, whose user has a folder of profiles beside the model's file.
fn program(model: &Path, args: &[&str]) -> Command {
    let (command, args) = args.split_first().expect("a command");
    let mut program = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
    program.arg(command).arg("-m").arg(model).args(["-t", "1"]).args(args);
    program.env("SIMLAYER_PROFILES", model.with_file_name("profiles"));
    program
}

fn json(args: &[&str]) -> Value {
    json_of(&smollm2_path(), args)
}

/// What a failed run says.
fn failure(model: &Path, args: &[&str]) -> String {
    let output = run_on(model, args);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn number(json: &Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {json}"))
}

fn story() -> String {
    workspace_root().join("xtask/demo/story.txt").to_string_lossy().into_owned()
}

#[test]
fn nothing_diverges_with_everything_off() {
    let score =
        json(&["perplexity", "-f", &story(), "--skip", "96", "--score", "32", "--lazy", "off", "--kl", "--json"]);
    assert_eq!(number(&score, "tokens_scored"), 32.0);
    assert!(number(&score, "kl_mean").abs() < 1e-6, "{score}");
    assert_eq!(number(&score, "same_top"), 1.0);
    assert_eq!(number(&score, "perplexity"), number(&score, "base_perplexity"));
    assert!((number(&score, "nll").exp() - number(&score, "perplexity")).abs() < 1e-9);
}

#[test]
fn laziness_is_seen() {
    let arguments = ["perplexity", "-f", &story(), "--skip", "192", "--score", "32", "--kl", "--json"];
    let score = json(&[&arguments[..], &["--lazy", "layers:0-29", "--lazy-window", "64"]].concat());
    assert!(number(&score, "kl_mean") > 1e-3, "{score}");
    assert!(number(&score, "same_top") < 1.0, "{score}");
    assert_eq!(score["lazy_layers"].as_array().map(Vec::len), Some(30));
    assert_eq!(score["kv"]["lazy_layers"], 30);
}

/// llama-perplexity's own sum: chunks of `n_ctx` tokens with fresh contexts, of which the second half is scored.
#[test]
fn perplexity_is_that_of_llama_perplexity() {
    let (n_ctx, n_chunks) = (128, 2);
    let text = std::fs::read_to_string(story()).expect("the story");
    let upstream = UpstreamRef::new().with_options(&["-t", "1"]);
    // Without flash attention both compute the same, bit for bit; our own attention kernel rounds otherwise.
    let upstream_plain = upstream.clone().with_options(&["-fa", "off"]);
    let tokens =
        UpstreamRef::new().tokenize(&smollm2_path(), &[text.trim_end_matches('\n').as_bytes()], true, false).remove(0);
    // This model wants no token at the beginning, so that chunks are taken as they are.
    let chunks: Vec<Vec<i32>> = tokens.chunks_exact(n_ctx).take(n_chunks).map(<[i32]>::to_vec).collect();
    let first = n_ctx / 2 + 1;
    let perplexity = |rows: &[Vec<f32>], rows_before_first: usize| {
        let rows = rows.chunks_exact(rows.len() / n_chunks);
        let nlls = chunks.iter().zip(rows).flat_map(|(chunk, rows)| {
            let rows = &rows[rows_before_first..];
            chunk[first..].iter().zip(rows).map(|(&token, row)| -log_softmax(row)[token as usize]).collect::<Vec<_>>()
        });
        let nlls: Vec<f64> = nlls.collect();
        (nlls.iter().sum::<f64>() / nlls.len() as f64).exp()
    };
    // As llama-perplexity feeds a chunk: all at once.
    let at_once = upstream.logits(&smollm2_path(), Logits { prompts: &chunks, all: true, decode: None });
    let at_once = perplexity(&at_once, first - 1);
    // As decoding does.
    let prompts: Vec<Vec<i32>> = chunks.iter().map(|chunk| chunk[..first].to_vec()).collect();
    let decoded: Vec<Vec<i32>> = chunks.iter().map(|chunk| chunk[first..n_ctx - 1].to_vec()).collect();
    let decoded =
        upstream_plain.logits(&smollm2_path(), Logits { prompts: &prompts, all: false, decode: Some(&decoded) });
    let decoded = perplexity(&decoded, 0);

    let (skip, score) = (first.to_string(), (n_ctx - first).to_string());
    let arguments = ["perplexity", "-f", &story(), "--skip", &skip, "--score", &score, "--chunks", "2", "--json"];
    let ours = |flash: &str| {
        let ours = json(&[&arguments[..], &["--lazy", "off", "-fa", flash]].concat());
        assert_eq!(number(&ours, "tokens_scored") as usize, n_chunks * (n_ctx - first));
        number(&ours, "perplexity")
    };
    let (fused, ours) = (ours("on"), ours("off"));
    println!("{ours:.6}, {fused:.6} with our kernel; llama.cpp {decoded:.6} token by token, {at_once:.6} at once");
    assert!((ours / decoded - 1.0).abs() < 1e-6, "{ours} against {decoded}");
    // The size of a batch changes the rounding of quantised activations, in llama.cpp as here, and so do other kernels:
    // ours may be as far from llama.cpp's two figures as twice these are from each other.
    let theirs = (decoded / at_once - 1.0).abs();
    assert!((fused / at_once - 1.0).abs() < 2.0 * theirs, "{fused} against {at_once} and {decoded}");
}

#[test]
fn too_short_a_text_is_refused() {
    let message = failure(&smollm2_path(), &["perplexity", "-f", &story(), "--skip", "9000", "--score", "10"]);
    assert!(message.contains("too few to skip 9000"), "{message}");
}

/// A random model of some layers, in a folder of its own.
fn random_model(folder: &Path, seed: u64) -> std::path::PathBuf {
    let path = folder.join(format!("random-{seed}.gguf"));
    random(seed).write(&path);
    path
}

fn random(seed: u64) -> RandomModel {
    RandomModel { seed, n_layer: 6, n_embd: 64, n_head: 2, n_head_kv: 1, n_ff: 64, ..RandomModel::default() }
}

/// A run is compared with one of its own: the copy of the uncompressed run's cache gives the same.
#[test]
fn comparing_is_running_each_rule() {
    let rules = ["off", "budget:0.5", "threshold:0.7", "layers:0-29"];
    let common = ["-f", &story(), "--skip", "160", "--score", "24", "--lazy-window", "64", "--json"];
    let compare: Vec<&str> = rules.iter().flat_map(|rule| ["--compare", rule]).collect();
    let compared = json(&[&["perplexity"], &common[..], &compare].concat());
    for (run, rule) in compared["runs"].as_array().expect("runs").iter().zip(rules) {
        let alone = json(&[&["perplexity", "--lazy", rule, "--kl"], &common[..]].concat());
        assert_eq!(run["lazy_layers"], alone["lazy_layers"], "{rule}");
        for key in ["tokens_scored", "perplexity", "kl_mean", "kl_p999", "same_top"] {
            assert_eq!(number(run, key), number(&alone, key), "{rule}: {key}");
        }
        assert_eq!(run["kv_bytes"], alone["kv"]["allocated_bytes"], "{rule}");
        let lazy = run["lazy_layers"].as_array().map(Vec::len);
        assert_eq!(lazy == Some(0), rule == "off", "{rule} makes {lazy:?} layers lazy");
    }
}

/// Types beside a rule are those of a run of its own, whose prompt is read layer by layer; so is a rule that decides by
/// itself.
#[test]
fn a_rule_has_types_of_its_own() {
    let common = ["-f", &story(), "--skip", "600", "--score", "16", "--lazy-window", "64", "--json"];
    let rules = [
        ("off@q8_0/q4_0", "off", "q8_0", "q4_0"),
        ("budget:0.5@q8_0", "budget:0.5", "q8_0", "q8_0"),
        // Keys of lazy layers are in four bits, too.
        ("threshold:0.5@q4_0", "threshold:0.5", "q4_0", "q4_0"),
        ("auto", "auto", "f16", "f16"),
        ("output:0.5@f16/q8_0", "output:0.5", "f16", "q8_0"),
    ];
    let compare: Vec<&str> = rules.iter().flat_map(|(rule, ..)| ["--compare", rule]).collect();
    let compared = json(&[&["perplexity"], &common[..], &compare].concat());
    for (run, (name, rule, type_k, type_v)) in compared["runs"].as_array().expect("runs").iter().zip(rules) {
        assert_eq!(run["lazy"], name);
        let types = ["--lazy", rule, "-ctk", type_k, "-ctv", type_v, "--kl"];
        let alone = json(&[&["perplexity"], &types[..], &common[..]].concat());
        assert_eq!(run["lazy_layers"], alone["lazy_layers"], "{name}");
        for key in ["perplexity", "kl_mean", "kl_p999", "same_top"] {
            assert_eq!(number(run, key), number(&alone, key), "{name}: {key}");
        }
        assert!(number(run, "kl_p999") >= number(run, "kl_mean"), "{run}");
        assert!(number(run, "kl_p999") <= number(run, "kl_max"), "{run}");
        assert_eq!(run["kv_bytes"], alone["kv"]["allocated_bytes"], "{name}");
    }
    let wrong = run_on(&smollm2_path(), &[&["perplexity"], &common[..], &["--compare", "off@q9"]].concat());
    let stderr = String::from_utf8_lossy(&wrong.stderr);
    assert!(!wrong.status.success() && stderr.contains("q9") && stderr.contains("q8_0"), "{stderr}");
}

const CALIBRATE: [&str; 10] =
    ["--skip", "200", "--score", "40", "--chunks", "2", "--lazy-window", "64", "--questions", "0"];

#[test]
fn a_calibrated_profile_is_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let story_path = story();
    let calibrate = [&["calibrate", "-f", &story_path, "--json"], &CALIBRATE[..]].concat();
    let mut first = json_of(&model, &calibrate);
    let mut again = json_of(&model, &calibrate);
    for json in [&mut first, &mut again] {
        assert!(json["timings"]["calibrate_ms"].as_f64().is_some_and(|time| time > 0.0));
        json.as_object_mut().expect("an object").remove("timings");
    }
    assert_eq!(first, again, "the same text gives the same profile");

    let layers = first["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 6);
    for layer in layers {
        assert!(number(layer, "harm_kl") > 0.0, "{layer}");
        assert!((0.0..=1.0).contains(&number(layer, "mass")), "{layer}");
    }
    let order: Vec<u64> = serde_json::from_value(first["order"].clone()).expect("an order");
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [0, 1, 2, 3, 4, 5]);
    // The least harmful half comes by the harm of single layers.
    let harm = |layer: u64| number(&layers[layer as usize], "harm_kl");
    assert!(harm(order[0]) <= harm(order[1]) && harm(order[1]) <= harm(order[2]), "{order:?}");
    let cuts = first["cuts"].as_array().expect("cuts");
    let last = cuts.last().expect("a cut");
    assert_eq!(last["lazy"], 6);
    assert!(cuts.iter().all(|cut| number(cut, "kl_mean") > 0.0 && number(cut, "compression") >= 1.0));
    assert!(number(last, "compression") > number(&cuts[0], "compression"));

    // `profile` makes the beginning of the order lazy, and so does a rule that looks, as far as the prompt would not miss it.
    let lazy = |options: &[&str]| {
        let arguments =
            ["perplexity", "-f", &story(), "--skip", "200", "--score", "8", "--lazy-window", "64", "--json"];
        let run = json_of(&model, &[&arguments[..], options].concat());
        serde_json::from_value::<Vec<u64>>(run["lazy_layers"].clone()).expect("layers")
    };
    let beginning = |n: usize| {
        let mut layers = order[..n].to_vec();
        layers.sort_unstable();
        layers
    };
    assert_eq!(lazy(&["--lazy", "profile"]), beginning(3));
    let named = ["--lazy-profile", first["file"].as_str().expect("a path")];
    let auto = lazy(&named);
    assert_eq!(auto, beginning(auto.len()));
    assert_eq!(lazy(&[&["--lazy", "kl:100"], &named[..]].concat()), beginning(6));
    assert_eq!(lazy(&["--lazy", "profile:0.67"]), beginning(4));
    let most = (number(last, "kl_mean") * 2.0).to_string();
    assert_eq!(lazy(&["--lazy", &format!("profile:kl={most}")]), beginning(6));
    assert_eq!(lazy(&["--lazy", "profile:kl=1e-12"]), beginning(0));

    // The prompt is read as the profile says, or as one is told.
    let profile = first["file"].as_str().expect("a path").to_owned();
    let kept = std::fs::read_to_string(&profile).expect("the profile");
    let kl = |options: &[&str]| {
        let run = ["perplexity", "-f", &story_path, "--skip", "200", "--score", "8", "--lazy-window", "64"];
        number(&json_of(&model, &[&run[..], &["--lazy", "profile", "--kl", "--json"], options].concat()), "kl_mean")
    };
    let told = ["full", "window"].map(|way| kl(&["--lazy-prefill", way]));
    assert!(told[0] != told[1], "{told:?}");
    for (way, told) in ["full", "window"].into_iter().zip(told) {
        let line =
            |line: &str| if line.starts_with("prefill = ") { format!("prefill = \"{way}\"") } else { line.to_owned() };
        let lines: Vec<String> = kept.lines().map(line).collect();
        std::fs::write(&profile, lines.join("\n")).expect("written");
        assert_eq!(kl(&[]), told, "{way}");
    }
    std::fs::write(&profile, &kept).expect("written");

    // A profile of another model is refused, and so is a file that is none.
    let other = random_model(folder.path(), 2);
    let message = failure(&other, &["perplexity", "-f", &story(), "--lazy-profile", &profile]);
    assert!(message.contains(&profile) && message.contains("another model"), "{message}");
    let beside = folder.path().join("random-1.simlayer.toml");
    std::fs::write(&beside, "version = 1\n").expect("written");
    let message = failure(&model, &["perplexity", "-f", &story(), "--lazy", "profile"]);
    assert!(message.contains("random-1.simlayer.toml") && message.contains("is no profile"), "{message}");
    std::fs::remove_file(&beside).expect("removed");

    // In the user's folder such files disturb nobody: not the model's profile, nor another model.
    std::fs::write(folder.path().join("profiles/a.simlayer.toml"), "version = 1\n").expect("written");
    assert_eq!(lazy(&["--lazy", "profile"]), beginning(3));
    std::fs::write(&profile, "no toml").expect("written");
    let run = ["perplexity", "-f", &story(), "--skip", "200", "--score", "8", "--lazy-window", "64", "--verbose"];
    for model in [&model, &other] {
        // Only who asks for a profile misses it.
        assert!(run_on(model, &run).status.success());
        let run = run_on(model, &[&run[..], &["--lazy", "profile"]].concat());
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success(), "{said}");
        for damaged in ["a.simlayer.toml is no profile", &format!("{profile} is no profile")] {
            assert!(
                said.lines().any(|line| line.starts_with("simlayer: skipped: ") && line.contains(damaged)),
                "{said}"
            );
        }
    }
    let message = failure(&model, &["perplexity", "-f", &story(), "--lazy", "profile"]);
    let folder = folder.path().join("profiles").display().to_string();
    for part in ["--lazy: no profile of", "random-1.simlayer.toml", &folder, "built in", "simlayer-run calibrate"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    std::fs::write(&profile, kept).expect("written");
    assert_eq!(lazy(&["--lazy", "profile"]), beginning(3));
}

/// A map is fitted, found by what the model is, and what is dropped by it is memory that is not held.
#[test]
fn rows_are_pruned_by_a_fitted_map() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, story_path) = (random_model(folder.path(), 1), story());
    let score = ["perplexity", "-f", &story_path, "--skip", "700", "--score", "8", "--lazy", "off", "--kl", "--json"];
    let message = failure(&model, &[&score[..], &["--prune", "auto"]].concat());
    assert!(message.contains("calibrate --fit-prune"), "{message}");
    let lazy = ["perplexity", "-f", &story_path, "--lazy", "layers:0", "--lazy-rescue", "64"];
    assert!(failure(&model, &lazy).contains("calibrate --fit-prune"));

    let fitted = json_of(&model, &["calibrate", "-f", &story_path, "--fit-prune", "--chunks", "1", "--json"]);
    assert_eq!(fitted["layers"].as_array().map(Vec::len), Some(6));
    let scored = |prune: &str| {
        let json = json_of(&model, &[&score[..], &["--prune", prune]].concat());
        let pruned = json["kv"]["pruned_layers"].as_u64().expect("layers");
        (number(&json, "kl_mean"), number(&json["kv"], "allocated_bytes"), pruned)
    };
    let (off, all, some) = (scored("off"), scored("-inf"), scored("auto"));
    assert!(off.0.abs() < 1e-6 && off.2 == 0, "{off:?}");
    assert!(all.0.abs() < 1e-3 && all.2 == 6, "{all:?}");
    assert!(some.0 > all.0.abs() && some.1 < 0.85 * off.1 && some.2 == 6, "{some:?} of {off:?}");

    let text: String = std::fs::read_to_string(&story_path).expect("the story").chars().take(1_000).collect();
    let layers = json_of(&model, &["inspect", "-p", &text, "--lazy", "off", "--prune", "auto", "--json"]);
    let layers = layers["layers"].as_array().expect("layers");
    assert!(layers.iter().all(|layer| layer["kind"] == "pruned" && layer["rows"].as_u64().is_some_and(|n| n > 100)));
    let message = failure(&model, &[&score[..], &["--prune", "auto", "--ggml-kernels"]].concat());
    assert!(message.contains("rows cannot be pruned"), "{message}");

    // By the same map lazy layers rescue rows: all of them, and nothing is lost.
    let score = ["perplexity", "-f", &story_path, "--skip", "700", "--score", "8", "--kl", "--json"];
    let lazy = ["--lazy", "layers:0-5", "--lazy-window", "64", "--lazy-type", "f16", "--lazy-rescue"];
    let rescued = |m: &str| {
        let json = json_of(&model, &[&score[..], &lazy, &[m]].concat());
        (number(&json, "kl_mean"), number(&json["kv"], "allocated_bytes"))
    };
    let (none, some, all) = (rescued("0"), rescued("128"), rescued("1000"));
    assert!(all.0.abs() < 1e-3 && none.0 > 10.0 * all.0.abs(), "{none:?} {all:?}");
    assert!(none.1 < some.1 && some.1 < all.1, "{none:?} {some:?} {all:?}");
    let message = failure(&model, &[&score[..], &lazy, &["128", "--ggml-kernels"]].concat());
    assert!(message.contains("--lazy-rescue: rows cannot be rescued"), "{message}");
}

/// What is chosen for a target is in the profile, and is used with it: layers, types, pruned rows.
#[test]
fn settings_are_chosen_for_targets() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, story_path) = (random_model(folder.path(), 1), story());
    let extent = ["--skip", "1000", "--score", "30", "--chunks", "1", "--lazy-window", "64", "--questions", "0"];
    let plain = [&["calibrate", "-f", &story_path, "--json"], &extent[..]].concat();
    let calibrate = |options: &[&'static str]| [&plain[..], options].concat();
    let targets = ["--target", "6x", "--target", "kl=0.00001"];
    let message = failure(&model, &calibrate(&targets));
    assert!(message.contains("simlayer-run calibrate"), "{message}");
    json_of(&model, &calibrate(&[]));
    let run = |lazy: &str, options: &[&str]| {
        let score = ["perplexity", "-f", &story_path, "--skip", "1000", "--score", "30", "--lazy-window", "64", "--kl"];
        json_of(&model, &[&score[..], &["--lazy", lazy, "--json"], options].concat())
    };
    let message = failure(&model, &["perplexity", "-f", &story_path, "--lazy", "profile:6x"]);
    assert!(message.contains("no setting for 6x") && message.contains("--target 6x"), "{message}");

    json_of(&model, &["calibrate", "-f", &story_path, "--fit-prune", "--chunks", "1", "--json"]);
    let chosen = json_of(&model, &calibrate(&targets));
    let settings = chosen["settings"].as_array().expect("settings");
    assert_eq!(settings.len(), 2);
    let (small, harmless) = (&settings[0], &settings[1]);
    assert_eq!((&small["target"], &harmless["target"]), (&Value::from("6x"), &Value::from("kl=0.00001")));
    assert!(number(small, "compression") >= 6.0 && number(small, "kl_mean") > 0.0, "{small}");
    assert!(number(harmless, "kl_mean") <= 1e-5 && number(harmless, "compression") < 6.0, "{harmless}");
    // The same prompt, read as the setting says.
    for setting in settings {
        let used = run(&format!("profile:{}", setting["target"].as_str().expect("a text")), &[]);
        assert_eq!(used["lazy_layers"].as_array().map(Vec::len), setting["lazy"].as_u64().map(|n| n as usize));
        for (used, chosen) in [
            (number(&used, "kl_mean"), number(setting, "kl_mean")),
            (number(&used["kv"], "compression"), number(setting, "compression")),
        ] {
            assert!((used - chosen).abs() <= 0.02 * chosen, "{used} instead of {chosen}: {setting}");
        }
        let pruned = used["kv"]["pruned_layers"].as_u64().expect("a number") > 0;
        assert_eq!(pruned, setting["prune"].as_bool().expect("true or false"), "{setting}");
    }
    // Types that are asked for stay.
    let exact = run("profile:6x", &["-ctk", "q8_0", "-ctv", "q8_0"]);
    assert!(number(&exact["kv"], "compression") < number(small, "compression"), "{exact}");
    let message = failure(&model, &calibrate(&["--target", "1000x"]));
    assert!(message.contains("1000x smaller; the smallest that was tried"), "{message}");
    let wrong = run_on(&model, &calibrate(&["--target", "0.5"]));
    assert_eq!(wrong.status.code(), Some(2));
}

/// Half of each prompt is notes with questions about them; the harm to their answers is measured beside the text's.
#[test]
fn answers_are_calibrated_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let story_path = story();
    let calibrate = |questions: &str| {
        let options = ["--skip", "1600", "--score", "30", "--chunks", "1", "--lazy-window", "64", "--json"];
        json_of(&model, &[&["calibrate", "-f", &story_path, "--questions", questions][..], &options].concat())
    };
    let with = calibrate("4");
    assert!(with["text"]["n_answer"].as_u64().is_some_and(|n| n > 4), "{with}");
    for measured in [&with["layers"], &with["cuts"]] {
        for one in measured.as_array().expect("a list") {
            let nll = if one.get("lazy").is_some() { "nll_mean" } else { "harm_nll" };
            assert!(number(one, nll).abs() > 0.0, "{one}");
        }
    }
    let profile = std::fs::read_to_string(with["file"].as_str().expect("a path")).expect("the profile");
    assert!(profile.contains("version = 3") && profile.contains("harm_nll"), "{profile}");
    let without = calibrate("0");
    assert_eq!(without["text"]["n_answer"], 0);
    assert!(without["layers"][0].get("harm_nll").is_none() && without["cuts"][0].get("nll_mean").is_none());
}

#[test]
fn what_is_asked_for_is_far_back_in_the_prompt() {
    let vocab = Vocab::load(&smollm2_path()).expect("the vocabulary");
    let texts = quality::BUILT_IN_TEXTS.map(|text| text.trim_end().as_bytes());
    let extent = Extent { n_prompt: 6_000, n_score: 100, n_excerpts: 1, n_questions: 8 };
    let composed = Excerpts::compose(&vocab, &texts, extent).expect("excerpts");
    assert_eq!(composed, Excerpts::compose(&vocab, &texts, extent).expect("excerpts"), "the same every time");
    assert_eq!((composed.excerpts.len(), composed.n_prompt), (2, 6_000));
    let said = |tokens: &[Token]| {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| vocab.piece(token, false)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    for (excerpt, text) in composed.excerpts.iter().zip(texts) {
        let text = vocab.tokenize_bytes(text, AddBos::Yes, Special::Text).expect("tokens");
        assert_eq!((excerpt.prompt.len(), excerpt.n_text), (6_000, 100));
        // The text begins the prompt, ends it with more than a window, and goes on after it.
        let n_read = text.len().min(3_100) - 100;
        let (head, tail) = text[..n_read].split_at(n_read / 2);
        assert!(excerpt.prompt.starts_with(head) && excerpt.prompt.ends_with(tail) && tail.len() > 1_024);
        assert_eq!(excerpt.rest[..100], text[n_read..n_read + 100]);
        let notes = said(&excerpt.prompt[head.len()..6_000 - tail.len()]);
        let around = said(&[head, tail].concat());
        assert_eq!(excerpt.answers.len(), 8);
        for at in &excerpt.answers {
            let answer = said(&excerpt.rest[at.clone()]);
            let answer = answer.trim();
            assert!(answer.len() > 3 && notes.contains(answer) && !around.contains(answer), "{answer}");
        }
    }
    let short = Excerpts::compose(&vocab, &[b"A few words."], extent).expect_err("too short").to_string();
    assert!(short.contains("too few"), "{short}");
}

/// A profile is its model's, whatever the file is called, wherever it lies and however it is quantised.
#[test]
fn a_profile_serves_every_quantisation() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let calibrated = json_of(&model, &[&["calibrate", "-f", &story(), "--json"], &CALIBRATE[..]].concat());
    let file = calibrated["file"].as_str().expect("a path");
    assert_eq!(Path::new(file).parent(), Some(&*folder.path().join("profiles")));
    let order: Vec<usize> = serde_json::from_value(calibrated["order"].clone()).expect("an order");
    let elsewhere = folder.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).expect("made");
    let run = |model: &Path| {
        let run = ["perplexity", "-f", &story(), "--skip", "200", "--score", "8", "--lazy-window", "64", "--json"];
        let run = [&run[..], &["--lazy", "profile"]].concat();
        program(model, &run).env("SIMLAYER_PROFILES", folder.path().join("profiles")).output().expect("it runs")
    };
    let lazy = |model: &Path| {
        let run = run(model);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let json: Value = serde_json::from_slice(&run.stdout).expect("JSON");
        serde_json::from_value::<Vec<usize>>(json["lazy_layers"].clone()).expect("layers")
    };
    let mut expected = order[..3].to_vec();
    expected.sort_unstable();
    let quantised = RandomModel { weight_type: WeightType::Q8_0, ..random(1) };
    quantised.write(elsewhere.join("q8.gguf"));
    assert_eq!(lazy(&elsewhere.join("q8.gguf")), expected);
    // Another model finds none.
    random(2).write(elsewhere.join("other.gguf"));
    let run = run(&elsewhere.join("other.gguf"));
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success() && said.contains("no profile of"), "{said}");
}

/// An interrupted calibration keeps what it has measured, and the next one goes on from there to the same profile.
#[test]
fn an_interrupted_calibration_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let story_path = story();
    let options = ["--skip", "200", "--score", "60", "--chunks", "4", "--windows", "16,128", "--json"];
    let output = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let calibrate = |name: &str, window: &'static str| -> Vec<String> {
        let own = ["calibrate", "-f", &story_path, "--lazy-window", window, "-o", &output(name)].map(str::to_owned);
        own.into_iter().chain(options.map(str::to_owned)).collect()
    };
    let run = |args: &[String]| run_on(&model, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();

    let whole = calibrate("whole.toml", "64");
    let complete = run(&whole);
    assert!(complete.status.success(), "{}", said(&complete));
    assert!(!folder.path().join("whole.toml.part").exists());

    let args = calibrate("own.toml", "64");
    let part = folder.path().join("own.toml.part");
    let measured = || std::fs::read_to_string(&part).map_or(0, |text| text.lines().count().saturating_sub(1));
    let mut program = program(&model, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = program.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it runs");
    while measured() < 4 {
        assert!(child.try_wait().expect("a child").is_none(), "it ended before it could be interrupted");
        std::thread::sleep(Duration::from_millis(1));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(kill.success());
    let interrupted = child.wait_with_output().expect("it ends");
    assert_eq!(interrupted.status.code(), Some(130), "{}", said(&interrupted));
    let kept = measured();
    assert!(
        kept >= 4 && said(&interrupted).contains(&format!("{kept} measurements are kept in")),
        "{}",
        said(&interrupted)
    );
    assert!(!folder.path().join("own.toml").exists());
    // As if it had been killed while it wrote.
    let mut text = std::fs::read_to_string(&part).expect("kept");
    text.push_str("{\"lazy\": [1, 2");
    std::fs::write(&part, text).expect("written");

    let rest = run(&args);
    assert!(rest.status.success(), "{}", said(&rest));
    assert!(said(&rest).contains(&format!("going on from {kept} measurements")), "{}", said(&rest));
    let profile = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("a profile");
    assert_eq!(profile("own.toml"), profile("whole.toml"));
    assert!(!part.exists());

    // Measurements of another calibration are not taken for this one's.
    std::fs::write(&part, "{\"calibration\":1}\n{\"lazy\":[0],\"kl\":9.0}\n").expect("written");
    let other = run(&args);
    assert!(other.status.success() && said(&other).contains("of another calibration"), "{}", said(&other));
    assert_eq!(profile("own.toml"), profile("whole.toml"));
}

/// Windows of their own take no more rows than one window for all, cost less in a real run, and are what a run with the
/// profile has.
#[test]
fn calibrated_windows_are_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let story_path = story();
    let calibrate = [&["calibrate", "-f", &story_path, "--json", "--windows", "16,32,64,128"], &CALIBRATE[..]].concat();
    let profile = json_of(&model, &calibrate);
    let order: Vec<usize> = serde_json::from_value(profile["order"].clone()).expect("an order");
    let cuts = profile["cuts"].as_array().expect("cuts");
    let with_windows: Vec<&Value> = cuts.iter().filter(|cut| cut.get("windows").is_some()).collect();
    assert!(!with_windows.is_empty(), "no cut gained by windows of its own: {profile}");
    for cut in with_windows {
        let windows: Vec<usize> = serde_json::from_value(cut["windows"].clone()).expect("windows");
        let lazy = cut["lazy"].as_u64().expect("a number") as usize;
        assert_eq!(windows.len(), lazy);
        assert!(windows.iter().sum::<usize>() <= 64 * lazy, "{cut}");
        assert!(number(cut, "kl_mean") < number(cut, "kl_mean_one_window"), "{cut}");

        let beginning = folder.path().join("beginning.txt");
        let text = std::fs::read(&story_path).expect("the story");
        std::fs::write(&beginning, &text[..600]).expect("written");
        let beginning = beginning.to_string_lossy();
        let share = format!("profile:{}", lazy as f64 / order.len() as f64);
        let run = |options: &[&str]| {
            let arguments = ["inspect", "-f", &beginning, "--lazy", &share, "--json"];
            let run = json_of(&model, &[&arguments[..], options].concat());
            let layers = run["layers"].as_array().expect("layers").clone();
            order[..lazy].iter().map(|&layer| layers[layer]["window"].as_u64()).collect::<Vec<_>>()
        };
        let expected: Vec<_> = windows.iter().map(|&window| Some(window as u64)).collect();
        assert_eq!(run(&["--lazy-window", "64"]), expected);
        // Whoever asks for another window gets it, and for one layer as well.
        assert_eq!(run(&["--lazy-window", "48"]), vec![Some(48); lazy]);
        let one = run(&["--lazy-window", "64", "--lazy-windows", &format!("{}=20", order[0])]);
        assert_eq!((one[0], &one[1..]), (Some(20), &expected[1..]));
    }
}

#[test]
fn a_prompt_that_fits_the_window_cannot_be_calibrated_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let message =
        failure(&model, &["calibrate", "-f", &story(), "--skip", "60", "--score", "20", "--lazy-window", "64"]);
    assert!(message.contains("would drop nothing"), "{message}");
    let files = |folder: &Path| std::fs::read_dir(folder).expect("the folder").count();
    let profiles = folder.path().join("profiles");
    assert_eq!((files(folder.path()), files(&profiles)), (2, 0), "only the model and the user's folder");
}

/// The numbers that a picture shows, as text.
fn texts_of_svg(path: &Path) -> Vec<String> {
    let svg = std::fs::read_to_string(path).expect("a picture");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{}", &svg[..60]);
    let texts = svg.split("<text").skip(1).map(|text| {
        let start = text.find('>').expect("a tag's end") + 1;
        let end = text.find("</text>").expect("the end of a text");
        text[start..end].trim().to_owned()
    });
    texts.collect()
}

fn check_png(path: &Path) {
    let bytes = std::fs::read(path).expect("a picture");
    assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    let size = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    assert_eq!(size(16), 1000, "pixels across");
    assert!(bytes.len() > 4_000, "an empty picture");
}

#[test]
fn inspect_scores_the_layers_and_draws_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let (svg, png) = (folder.path().join("scores.svg"), folder.path().join("scores.png"));
    let common = ["inspect", "-f", &story(), "--lazy-window", "64", "-c", "30000", "--json"];
    for (rule, plot, n_lazy) in
        [("budget:0.5", &svg, Some(3)), ("threshold:0.02", &png, None), ("layers:1,4", &svg, Some(2))]
    {
        let json = json_of(&model, &[&common[..], &["--lazy", rule, "--plot", plot.to_str().expect("UTF-8")]].concat());
        let layers = json["layers"].as_array().expect("layers");
        assert_eq!(layers.len(), 6);
        let lazy = layers.iter().filter(|layer| layer["lazy"] == true).count();
        assert_eq!(json["kv"]["lazy_layers"], lazy);
        if let Some(n) = n_lazy {
            assert_eq!(lazy, n, "{rule}");
        }
        for (index, layer) in layers.iter().enumerate() {
            assert_eq!(layer["index"], index);
            assert_eq!(layer["kind"], if layer["lazy"] == true { "lazy" } else { "full" });
            assert!((0.0..=1.0).contains(&number(layer, "score")));
            if rule.starts_with("threshold") {
                assert_eq!(layer["lazy"] == true, number(layer, "score") > 0.02);
            }
        }
        let bytes: f64 = layers.iter().map(|layer| number(layer, "kv_bytes")).sum();
        assert_eq!(bytes, number(&json["kv"], "allocated_bytes"));
        if *plot == svg {
            let texts = texts_of_svg(&svg);
            for layer in layers {
                let score = format!("{:.2}", number(layer, "score"));
                assert!(texts.contains(&score), "{score} is not in {texts:?}");
            }
        } else {
            check_png(plot);
        }
    }
    let message = failure(&model, &["inspect", "-f", "no/such/file"]);
    assert!(message.contains("no/such/file"));
}

#[test]
fn comparisons_are_drawn() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = random_model(folder.path(), 1);
    let common = ["perplexity", "-f", &story(), "--skip", "200", "--score", "8", "--lazy-window", "64", "--json"];
    for (name, rules) in [("a.svg", ["threshold:0.1", "threshold:0.9"]), ("b.png", ["budget:0.2", "threshold:0.9"])] {
        let path = folder.path().join(name);
        let rules = ["--compare", rules[0], "--compare", rules[1], "--plot", path.to_str().expect("UTF-8")];
        json_of(&model, &[&common[..], &rules].concat());
        if name.ends_with("svg") {
            let texts = texts_of_svg(&path);
            for axis in ["threshold τ", "KV cache, MiB", "perplexity"] {
                assert!(texts.iter().any(|text| text == axis), "{axis} is not in {texts:?}");
            }
        } else {
            check_png(&path);
        }
    }
}

#[test]
fn needles_are_the_same_for_the_same_seed() {
    let folder = tempfile::tempdir().expect("a folder");
    let svg = folder.path().join("needles.svg");
    let run = |seed: &str| {
        let arguments = ["--lengths", "700", "--depths", "0,100", "--trials", "2", "--lazy-window", "128", "--json"];
        let own = ["--lazy", "budget:0.5", "--compare", "-s", seed, "--plot", svg.to_str().expect("UTF-8")];
        json(&[&["passkey"], &arguments[..], &own].concat())
    };
    let first = run("7");
    assert_eq!(first, run("7"));
    assert_ne!(first["runs"], run("8")["runs"]);

    let first = run("7");
    let runs = first["runs"].as_array().expect("runs");
    let names: Vec<&str> = runs.iter().filter_map(|run| run["name"].as_str()).collect();
    assert_eq!(names, ["full", "lazy", "StreamingLLM", "all q4_0"]);
    assert_eq!(first["cells"], runs[1]["cells"]);
    assert_eq!(first["accuracy"], runs[1]["accuracy"]);
    let texts = texts_of_svg(&svg);
    for run in runs {
        let cells = run["cells"].as_array().expect("cells");
        assert_eq!(cells.len(), 2);
        for (cell, depth) in cells.iter().zip([0.0, 100.0]) {
            assert_eq!((number(cell, "length"), number(cell, "depth")), (700.0, depth));
            assert_eq!(number(cell, "trials"), 2.0);
            assert!(number(cell, "correct") <= 2.0 && number(cell, "log_prob") < 0.0);
            for shown in [number(cell, "correct") / 2.0, number(cell, "log_prob").exp()] {
                let shown = format!("{shown:.2}");
                assert!(texts.contains(&shown), "{shown} is not in {texts:?}");
            }
        }
    }
    // What is out of every layer's sight is lost; the full cache finds it, or at least rather.
    let log_prob = |run: usize, cell: usize| number(&runs[run]["cells"][cell], "log_prob");
    assert!(log_prob(0, 0) > log_prob(2, 0) + 0.5, "{first}");
    // The smaller caches are smaller.
    let bytes = |run: usize| number(&runs[run], "kv_bytes");
    assert!(bytes(0) > bytes(1) && bytes(1) > bytes(2) && bytes(0) > 3.0 * bytes(3), "{first}");
}

#[test]
fn a_single_needle_is_asked_for_in_a_text_of_its_own() {
    let arguments = ["--lengths", "300", "--depths", "50", "--trials", "2", "--variant", "single", "--json"];
    let ran = json(&[&["passkey", "--lazy", "off"], &arguments[..]].concat());
    assert_eq!((number(&ran["cells"][0], "trials"), ran["runs"].as_array().map(Vec::len)), (2.0, Some(1)));
    assert_eq!(ran["variant"], "single");
}

#[test]
fn tasks_are_asked_of_each_rule() {
    let common = ["--depths", "0,100", "--trials", "1", "--lazy-window", "64", "--json"];
    let rules = ["--compare", "off", "--compare", "budget:1@q8_0"];
    for (variant, ask) in
        [("variables", "after"), ("definition", "after"), ("turns", "after"), ("turns", "prompt"), ("multi", "prompt")]
    {
        let own = ["--variant", variant, "--ask", ask, "--lengths", "800"];
        let ran = json(&[&["passkey"], &common[..], &own, &rules].concat());
        assert_eq!((&ran["variant"], &ran["ask"]), (&variant.into(), &ask.into()));
        let runs = ran["runs"].as_array().expect("runs");
        let names: Vec<&str> = runs.iter().filter_map(|run| run["name"].as_str()).collect();
        assert_eq!(names, ["off", "budget:1@q8_0"]);
        // The first is the run's own, and as the full cache nothing is lost.
        assert_eq!((&ran["cells"], &ran["accuracy"]), (&runs[0]["cells"], &runs[0]["accuracy"]));
        let full = &ran["full"];
        for key in ["found", "trials", "answer_nll", "kl_mean", "log_prob", "kv_bytes", "compression"] {
            assert_eq!(number(full, key), number(&runs[0], key), "{variant}: {key}");
        }
        assert_eq!((number(full, "trials"), number(full, "kl_mean")), (2.0, 0.0));
        assert_eq!(number(full, "answer_nll"), -number(full, "log_prob"));
        for run in runs {
            let cells = run["cells"].as_array().expect("cells");
            let correct: f64 = cells.iter().map(|cell| number(cell, "correct")).sum();
            assert_eq!((cells.len(), correct), (2, number(run, "found")), "{variant}");
            assert_eq!((number(&cells[1], "length"), number(&cells[1], "depth")), (800.0, 100.0));
        }
        // What is told first is out of every layer's sight.
        assert!(number(&runs[1]["cells"][0], "kl_mean") > 0.01, "{variant}: {ran}");
        let [nll, lost] = [full, &runs[1]].map(|run| -number(&run["cells"][0], "log_prob"));
        assert!(lost > nll + 0.2, "{variant}, {ask}: {lost} against {nll}");
        assert!(number(&runs[1], "compression") > number(full, "compression"), "{variant}");
    }
}

#[test]
fn smollm2s_profile_is_built_in() {
    let arguments = ["perplexity", "-f", &story(), "--skip", "64", "--score", "2", "--json"];
    let run = |options: &[&str]| json(&[&arguments[..], options].concat())["lazy_layers"].clone();
    let profile = workspace_root().join("profiles/SmolLM2-135M-Instruct.Q4_1.simlayer.toml");
    let named = run(&["--lazy", "profile:0.8", "--lazy-profile", profile.to_str().expect("UTF-8")]);
    assert_eq!(run(&["--lazy", "profile:0.8"]), named);
    assert_eq!(named.as_array().map(Vec::len), Some(24));
    // Layer 18 looks very lazy, and does by far the most harm.
    assert!(named.as_array().is_some_and(|layers| !layers.contains(&18.into())));
    // Under `auto` the prompt decides, and nothing of this one would be dropped.
    assert_eq!(run(&[]).as_array().map(Vec::len), Some(0));
}

/// What becomes lazy grows with the divergence that is allowed, and that is what was foretold.
#[test]
fn what_a_prompt_would_miss_stays() {
    let common =
        ["perplexity", "-f", &story(), "--skip", "700", "--score", "32", "--lazy-window", "64", "--kl", "--json"];
    let run = |rule: &str| json(&[&common[..], &["--lazy", rule]].concat());
    let n_lazy = |run: &Value| run["lazy_layers"].as_array().map_or(0, Vec::len);
    let strict = run("kl:1e-9");
    assert_eq!((n_lazy(&strict), number(&strict, "kl_mean")), (0, 0.0));
    assert_eq!(number(&strict["kv"], "foretold_kl"), 0.0);
    let loose = run("kl:100");
    assert_eq!(n_lazy(&loose), 30);
    let some = run("kl:0.02");
    assert!((1..30).contains(&n_lazy(&some)), "{some}");
    let foretold = number(&some["kv"], "foretold_kl");
    assert!(foretold > 0.0 && foretold <= 0.02, "{foretold}");
    assert!(number(&loose["kv"], "foretold_kl") > 0.02, "{loose}");
    assert!(number(&some, "kl_mean") < number(&loose, "kl_mean"), "{some} {loose}");
}
