//! Tables of what was measured, and what of it breaks a promise.

use std::fmt::Write;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Kind, Measured};

/// What a rule that is used unasked may cost: in one text or task, over all, and of what the full cache finds.
const MOST_KL: f64 = 0.02;
const MOST_MEAN_KL: f64 = 0.01;
const LEAST_FOUND: f64 = 0.97;

impl Measured {
    pub fn number(&self, key: &str) -> f64 {
        self.run[key].as_f64().unwrap_or(f64::NAN)
    }

    fn is_text(&self) -> bool {
        matches!(self.kind, Kind::Text(_))
    }
}

/// What differs in a list, in its order.
pub fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

/// Not a number where there is none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

fn shown(value: f64, decimals: usize) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.decimals$}") }
}

fn percent(share: f64) -> String {
    if share.is_nan() { "–".to_owned() } else { format!("{:.1} %", share * 100.0) }
}

/// How many answers were found, of how many, and the mean negative log-likelihood of their tokens.
fn answers<'a>(runs: impl Iterator<Item = &'a Value>) -> (u64, u64, f64) {
    let (mut found, mut trials, mut nlls) = (0, 0, Vec::new());
    for run in runs {
        found += run["found"].as_u64().unwrap_or(0);
        trials += run["trials"].as_u64().unwrap_or(0);
        nlls.push(run["answer_nll"].as_f64().unwrap_or(f64::NAN));
    }
    (found, trials, mean(&nlls))
}

fn found(found: u64, trials: u64) -> String {
    if trials == 0 { "–".to_owned() } else { format!("{found}/{trials}") }
}

/// All bytes of f16 caches over all bytes of these.
pub fn compression(cells: &[&Measured]) -> f64 {
    let bytes: f64 = cells.iter().map(|cell| cell.number("kv_bytes")).sum();
    let f16: f64 = cells.iter().map(|cell| cell.number("kv_bytes") * cell.number("compression")).sum();
    f16 / bytes
}

/// A table for each model and length, with a row for each rule.
pub fn summaries(measured: &[Measured]) -> String {
    let mut out = String::new();
    for (model, length) in distinct(measured.iter().map(|cell| (&cell.model, cell.length))) {
        let here: Vec<&Measured> =
            measured.iter().filter(|cell| cell.model == *model && cell.length == length).collect();
        let _ = writeln!(
            out,
            "\n{model}, {length} tokens:\n\n\
             | rule | × | KL: mean of texts | of the worst | 99.9 % | same top | found | answers' NLL |\n\
             |---|---|---|---|---|---|---|---|"
        );
        let rules = distinct(here.iter().map(|cell| &cell.rule));
        for (i, rule) in rules.into_iter().enumerate() {
            let cells: Vec<&Measured> = here.iter().filter(|cell| cell.rule == *rule).copied().collect();
            let texts: Vec<&Measured> = cells.iter().filter(|cell| cell.is_text()).copied().collect();
            let tasks = || cells.iter().filter(|cell| !cell.is_text());
            if i == 0 && tasks().next().is_some() {
                let (n, trials, nll) = answers(tasks().map(|cell| &cell.full));
                let _ = writeln!(out, "| full | 1.00 | | | | | {} | {} |", found(n, trials), shown(nll, 3));
            }
            let of_texts = |key: &str| texts.iter().map(|cell| cell.number(key)).collect::<Vec<_>>();
            let (n, trials, nll) = answers(tasks().map(|cell| &cell.run));
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} | {} |",
                named(rule),
                shown(compression(if texts.is_empty() { &cells } else { &texts }), 2),
                shown(mean(&of_texts("kl_mean")), 4),
                shown(largest(&of_texts("kl_mean")), 4),
                shown(largest(&of_texts("kl_p999")), 2),
                percent(mean(&of_texts("same_top"))),
                found(n, trials),
                shown(nll, 3),
            );
        }
    }
    out
}

fn named(rule: &str) -> String {
    if rule == "budget:1" { "`budget:1` (StreamingLLM)".to_owned() } else { format!("`{rule}`") }
}

/// Every cell by itself.
pub fn cells(measured: &[Measured]) -> String {
    let mut out = String::from(
        "| model | tokens | text or task | rule | × | KL | 99.9 % | same top | found (full) | NLL (full) |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for cell in measured {
        let (mut hits, mut nll) = ("–".to_owned(), "–".to_owned());
        if !cell.is_text() {
            let ((n, trials, own), (of_full, _, full)) =
                (answers([&cell.run].into_iter()), answers([&cell.full].into_iter()));
            hits = format!("{} ({of_full})", found(n, trials));
            nll = format!("{} ({})", shown(own, 3), shown(full, 3));
        }
        let _ = writeln!(
            out,
            "| {} | {} | {} | `{}` | {} | {} | {} | {} | {hits} | {nll} |",
            cell.model,
            cell.length,
            cell.kind,
            cell.rule,
            shown(cell.number("compression"), 2),
            shown(cell.number("kl_mean"), 4),
            shown(cell.number("kl_p999"), 2),
            percent(cell.number("same_top")),
        );
    }
    out
}

/// What a rule promises and does not keep.
pub struct Broken {
    pub n: usize,
    pub report: String,
}

/// # Errors
/// When the rule was not measured.
pub fn broken(rule: &str, measured: &[Measured]) -> Result<Broken> {
    let cells: Vec<&Measured> = measured.iter().filter(|cell| cell.rule == rule).collect();
    ensure!(!cells.is_empty(), "{rule} was not measured");
    let mut broken = Broken { n: 0, report: format!("\n{rule}:\n") };
    let mut say = |line: String, holds: bool| {
        broken.n += usize::from(!holds);
        broken.report += &format!("- {}{line}\n", if holds { "" } else { "BROKEN: " });
    };
    for cell in &cells {
        let kl = cell.number("kl_mean");
        // What is not a number keeps no promise.
        if kl.is_nan() || kl > MOST_KL {
            let (model, length, kind) = (&cell.model, cell.length, &cell.kind);
            say(format!("{model}, {length} tokens, {kind}: mean KL {kl:.4}, at most {MOST_KL}"), false);
        }
    }
    for (what, is_text) in [("texts", true), ("tasks' answers", false)] {
        let kls: Vec<f64> =
            cells.iter().filter(|cell| cell.is_text() == is_text).map(|cell| cell.number("kl_mean")).collect();
        if !kls.is_empty() {
            let kl = mean(&kls);
            say(format!("mean KL over {} {what}: {kl:.4}, at most {MOST_MEAN_KL}", kls.len()), kl <= MOST_MEAN_KL);
        }
    }
    let tasks = || cells.iter().filter(|cell| !cell.is_text());
    if tasks().next().is_some() {
        let (own, trials, _) = answers(tasks().map(|cell| &cell.run));
        let (full, ..) = answers(tasks().map(|cell| &cell.full));
        let least = LEAST_FOUND * full as f64;
        say(
            format!("found {own} of {trials}, the full cache {full}, at least {:.0} % of that", LEAST_FOUND * 100.0),
            own as f64 >= least,
        );
    }
    Ok(broken)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(kind: &str, rule: &str, kl: f64, bytes: u64, compression: f64) -> Measured {
        let run = json!({"kl_mean": kl, "kl_p999": 10.0 * kl, "same_top": 1.0 - kl, "kv_bytes": bytes,
            "compression": compression});
        let (model, kind) = ("m".to_owned(), Kind::Text(kind.to_owned()));
        Measured { model, length: 3_000, kind, rule: rule.to_owned(), run, full: Value::Null }
    }

    fn task(kind: &str, rule: &str, found: u64, nll: f64, kl: f64) -> Measured {
        let run = json!({"found": found, "trials": 8, "answer_nll": nll, "kl_mean": kl, "kv_bytes": 10,
            "compression": 2.0});
        let full = json!({"found": 6, "trials": 8, "answer_nll": 0.25});
        let (model, kind) = ("m".to_owned(), Kind::Task(kind.to_owned(), "after".to_owned()));
        Measured { model, length: 3_000, kind, rule: rule.to_owned(), run, full }
    }

    #[test]
    fn a_rule_has_a_row() {
        let measured = [
            text("a", "auto", 0.01, 100, 2.0),
            text("b", "auto", 0.03, 100, 4.0),
            task("x", "auto", 5, 0.5, 0.0),
            task("y", "auto", 6, 1.0, 0.0),
            text("a", "budget:1", 0.5, 10, 8.0),
        ];
        let table = summaries(&measured);
        assert!(table.contains("m, 3000 tokens:"), "{table}");
        assert!(table.contains("\n| full | 1.00 | | | | | 12/16 | 0.250 |\n"), "{table}");
        let row = "\n| `auto` | 3.00 | 0.0200 | 0.0300 | 0.30 | 98.0 % | 11/16 | 0.750 |\n";
        assert!(table.contains(row), "{table}");
        let row = "\n| `budget:1` (StreamingLLM) | 8.00 | 0.5000 | 0.5000 | 5.00 | 50.0 % | – | – |\n";
        assert!(table.contains(row), "{table}");

        let all = cells(&measured);
        assert!(all.contains("| m | 3000 | b | `auto` | 4.00 | 0.0300 | 0.30 | 97.0 % | – | – |\n"), "{all}");
        let row = "| m | 3000 | x (after) | `auto` | 2.00 | 0.0000 | – | – | 5/8 (6) | 0.500 (0.250) |\n";
        assert!(all.contains(row), "{all}");
    }

    #[test]
    fn broken_promises_are_named() {
        let kept = [text("a", "auto", 0.009, 1, 2.0), task("x", "auto", 6, 0.3, 0.001), text("a", "off", 9.0, 1, 1.0)];
        let found = broken("auto", &kept).unwrap();
        assert_eq!(found.n, 0, "{}", found.report);
        assert!(found.report.contains("over 1 texts: 0.0090") && found.report.contains("found 6 of 8"));

        let measured =
            [text("a", "auto", 0.021, 1, 2.0), text("b", "auto", 0.001, 1, 2.0), task("x", "auto", 5, 0.3, 0.5)];
        let found = broken("auto", &measured).unwrap();
        // A text, the mean of texts, a task, the mean of tasks, and what is found.
        assert_eq!(found.n, 5, "{}", found.report);
        assert!(found.report.contains("BROKEN: m, 3000 tokens, a: mean KL 0.0210"), "{}", found.report);
        assert!(!found.report.contains("tokens, b:"), "{}", found.report);
        let broken_run = Measured { run: json!({}), ..text("a", "auto", 0.0, 1, 1.0) };
        assert_eq!(broken("auto", &[broken_run]).unwrap().n, 2);
        assert!(broken("kl", &measured).is_err());
    }
}
