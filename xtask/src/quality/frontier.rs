//! Bytes against harm: what each way to make a cache small costs, in one picture.

use std::path::Path;

use anyhow::{Result, ensure};
use plotters::coord::CoordTranslate;
use plotters::prelude::*;

use super::table::{compression, distinct, mean};
use super::{Kind, Measured};
use crate::plot::{COLOURS, write_svg};

/// What is compared: types alone, all layers lazy (StreamingLLM), a budget, the model's profile, and the profile with tiles, with
/// pruned rows, with rescued ones, with both.
pub const RULES: [&str; 13] = [
    "off@q8_0",
    "off@q4_0",
    "off@kvarn4/kvarn3",
    "off@q8_0/q4_0+prune",
    "budget:1@q4_0",
    "budget:0.8@q4_0",
    "profile:0.5@q8_0/q4_0",
    "profile:0.8@q4_0",
    "profile:0.8@kvarn4/kvarn3+lazy:kvarn4/kvarn3",
    "profile:0.8@q4_0+prune",
    "profile:0.8@q4_0+window:768+rescue:256",
    "profile:0.8@q4_0+prune+window:768+rescue:256",
    "profile:0.8@q8_0/q4_0+prune+window:768+rescue:256",
];

/// Divergences that the picture shows: what is smaller lies on its edge.
const SHOWN: std::ops::Range<f64> = 1e-3..10.0;
const PANEL: (u32, u32) = (520, 420);
const LINE: u32 = 22;

/// A rule on a model at a length: how many times smaller than f16 its caches are, and the mean divergence over the texts.
#[derive(Debug, Clone, PartialEq)]
struct Point {
    panel: String,
    rule: String,
    smaller: f64,
    kl: f64,
}

fn points(measured: &[Measured]) -> Vec<Point> {
    let texts: Vec<&Measured> = measured.iter().filter(|cell| matches!(cell.kind, Kind::Text(_))).collect();
    let of = |cell: &&Measured| (cell.model.clone(), cell.length, cell.rule.clone());
    let all = distinct(texts.iter().map(of));
    let point = |(model, length, rule): &(String, usize, String)| {
        let cells: Vec<&Measured> = texts
            .iter()
            .filter(|cell| (&cell.model, &cell.length, &cell.rule) == (model, length, rule))
            .copied()
            .collect();
        let kl = mean(&cells.iter().map(|cell| cell.number("kl_mean")).collect::<Vec<_>>());
        let panel = format!("{model}, {length} tokens, mean of {} texts", cells.len());
        Point { panel, rule: rule.clone(), smaller: compression(&cells), kl }
    };
    all.iter().map(point).filter(|point| point.kl.is_finite() && point.smaller.is_finite()).collect()
}

/// Draws each rule's point into an SVG, a panel for each model and length.
pub fn plot(measured: &[Measured], path: &Path) -> Result<()> {
    let points = points(measured);
    ensure!(!points.is_empty(), "--frontier: no text was measured");
    write_svg(path, |svg| draw(&points, svg))
}

/// Marks a rule by a colour and a form, by its place among the rules.
fn mark<DB: DrawingBackend, CT: CoordTranslate>(
    area: &DrawingArea<DB, CT>,
    at: CT::From,
    index: usize,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let colour = COLOURS[index % COLOURS.len()];
    match index / COLOURS.len() {
        0 => area.draw(&Circle::new(at, 6, colour.filled())),
        1 => area.draw(&TriangleMarker::new(at, 8, colour.filled())),
        _ => area.draw(&Cross::new(at, 6, colour.stroke_width(3))),
    }
}

fn draw(points: &[Point], svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let panels = distinct(points.iter().map(|point| &point.panel));
    let rules = distinct(points.iter().map(|point| &point.rule));
    let legend_height = 16 + LINE * rules.len().div_ceil(2) as u32;
    // A legend in two columns needs some width.
    let size = (PANEL.0 * panels.len().max(2) as u32, PANEL.1 + legend_height);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (charts, legend) = root.split_vertically(PANEL.1);
    let most = points.iter().fold(2.0f64, |most, point| most.max(point.smaller));
    let smaller = 1.0..most.log2().ceil().exp2();
    for (area, panel) in charts.split_evenly((1, panels.len())).iter().zip(&panels) {
        let mut chart = ChartBuilder::on(area)
            .caption(panel, ("sans-serif", 18))
            .margin(10)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(66)
            .build_cartesian_2d(smaller.clone().log_scale().base(2.0), SHOWN.log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .x_desc("times smaller than f16")
            .y_desc("mean KL against the full f16 cache, nats")
            .axis_desc_style(("sans-serif", 17))
            .label_style(("sans-serif", 14))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .draw()?;
        for point in points.iter().filter(|point| point.panel == **panel) {
            let index = rules.iter().position(|rule| **rule == point.rule).unwrap_or(0);
            let kl = point.kl.clamp(SHOWN.start, SHOWN.end);
            mark(chart.plotting_area(), (point.smaller, kl), index)?;
        }
    }
    for (index, rule) in rules.iter().enumerate() {
        let (x, y) = (40 + (index % 2) as i32 * size.0 as i32 / 2, 14 + (index / 2) as i32 * LINE as i32);
        mark(&legend, (x, y), index)?;
        legend.draw_text(rule, &("sans-serif", 16).into_font().color(&BLACK), (x + 18, y - 9))?;
    }
    root.present()?;
    drop((charts, legend));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn text(kind: &str, rule: &str, kl: f64, kv_bytes: u64) -> Measured {
        Measured {
            model: "m".to_owned(),
            length: 8_000,
            kind: Kind::Text(kind.to_owned()),
            rule: rule.to_owned(),
            run: json!({"kl_mean": kl, "kv_bytes": kv_bytes, "compression": 1000.0 / kv_bytes as f64}),
            full: Value::Null,
        }
    }

    #[test]
    fn a_rule_has_a_point() {
        let measured = [text("a", "off", 0.01, 250), text("b", "off", 0.03, 250), text("a", "budget:1", 0.5, 50)];
        let point = |texts: usize, rule: &str, smaller: f64, kl: f64| Point {
            panel: format!("m, 8000 tokens, mean of {texts} texts"),
            rule: rule.to_owned(),
            smaller,
            kl,
        };
        assert_eq!(points(&measured), [point(2, "off", 4.0, 0.02), point(1, "budget:1", 20.0, 0.5)]);
    }

    #[test]
    fn every_rule_is_marked_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontier.svg");
        let measured: Vec<Measured> =
            RULES.iter().enumerate().map(|(i, rule)| text("a", rule, 0.01 * (i + 1) as f64, 100 - i as u64)).collect();
        plot(&measured, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        // Each in the panel and in the legend; those beyond two forms of each colour are crosses, of lines.
        let marks = svg.matches("<circle").count() + svg.matches("<polygon").count();
        assert_eq!(marks, 2 * RULES.len().min(2 * COLOURS.len()), "{svg}");
        for rule in RULES {
            assert!(svg.contains(&format!(">\n{rule}\n<")), "{rule}");
        }
        assert!(plot(&[], &path).is_err());
    }
}
