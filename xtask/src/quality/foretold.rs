//! What looks before dropping foretold, and what was lost later.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, ensure};
use plotters::prelude::*;

use super::Measured;
use super::table::distinct;
use crate::plot::{COLOURS, write_svg};

/// Divergences that the picture shows: what is smaller lies on its edge.
const SHOWN: std::ops::Range<f64> = 1e-4..3.0;

/// A rule that looked, on one text. Divergences are means in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    model: String,
    foretold: f64,
    later: f64,
}

/// Of runs that looked and found layers that can go.
pub fn pairs<'a>(measured: impl Iterator<Item = &'a Measured>) -> Vec<Pair> {
    let pair = |cell: &Measured| {
        let number = |key: &str| cell.run[key].as_f64().filter(|&kl| kl > 0.0);
        let (foretold, later) = (number("foretold")?, number("kl_mean")?);
        Some(Pair { model: cell.model.clone(), foretold, later })
    };
    measured.filter_map(pair).collect()
}

/// Spearman's coefficient: 1 where what is foretold is in the order of what is lost.
fn rank_correlation(pairs: &[&Pair]) -> f64 {
    let foretold = ranks(pairs.iter().map(|pair| pair.foretold).collect());
    let later = ranks(pairs.iter().map(|pair| pair.later).collect());
    let mean = (pairs.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
    product(&foretold, &later) / (product(&foretold, &foretold) * product(&later, &later)).sqrt()
}

/// Each value's place in their order; equal ones share the mean of their places.
fn ranks(values: Vec<f64>) -> Vec<f64> {
    let place = |value: &f64| {
        let smaller = values.iter().filter(|other| *other < value).count() as f64;
        let equal = values.iter().filter(|other| *other == value).count() as f64;
        smaller + (equal - 1.0) / 2.0
    };
    values.iter().map(place).collect()
}

/// A line for each model.
pub fn correlations(pairs: &[Pair]) -> String {
    let mut out = String::new();
    for model in distinct(pairs.iter().map(|pair| &pair.model)) {
        let here: Vec<&Pair> = pairs.iter().filter(|pair| pair.model == *model).collect();
        if here.len() > 2 {
            let worst = here.iter().map(|pair| pair.later / pair.foretold).fold(0.0, f64::max);
            let _ = writeln!(
                out,
                "\n{model}, foretold against later, {} pairs: rank correlation {:.2}, at most {worst:.1} times",
                here.len(),
                rank_correlation(&here)
            );
        }
    }
    out
}

/// Draws a point for each pair into an SVG with logarithmic axes.
pub fn plot(pairs: &[Pair], path: &Path) -> Result<()> {
    ensure!(!pairs.is_empty(), "--plot: no rule looked before dropping (auto, kl:X)");
    write_svg(path, |svg| draw(pairs, svg))
}

fn draw(pairs: &[Pair], svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (560, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(66)
        .build_cartesian_2d(SHOWN.log_scale(), SHOWN.log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc("foretold: mean KL of the look, nats")
        .y_desc("later: mean KL of what followed, nats")
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 14))
        .draw()?;
    chart.draw_series(LineSeries::new([(SHOWN.start, SHOWN.start), (SHOWN.end, SHOWN.end)], BLACK.mix(0.4)))?;
    let seen = |kl: f64| kl.clamp(SHOWN.start, SHOWN.end);
    for (index, model) in distinct(pairs.iter().map(|pair| &pair.model)).into_iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let here = pairs.iter().filter(|pair| pair.model == *model);
        let points = here.map(|pair| Circle::new((seen(pair.foretold), seen(pair.later)), 4, colour.mix(0.8).filled()));
        let series = chart.draw_series(points)?;
        series.label(model).legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .label_font(("sans-serif", 15))
        .draw()?;
    root.present()?;
    drop(chart);
    drop(root);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Kind;
    use super::*;

    fn pair(model: &str, foretold: f64, later: f64) -> Pair {
        Pair { model: model.to_owned(), foretold, later }
    }

    #[test]
    fn pairs_are_of_runs_that_looked() {
        let cell = |run: Value| Measured {
            model: "m".to_owned(),
            length: 3_000,
            kind: Kind::Text("a".to_owned()),
            rule: "auto".to_owned(),
            run,
            full: Value::Null,
        };
        let measured = [
            json!({"kl_mean": 0.5, "foretold": 0.25}),
            json!({"kl_mean": 0.5}),
            json!({"kl_mean": 0.0, "foretold": 0.0}),
        ];
        assert_eq!(pairs(measured.map(cell).iter()), [pair("m", 0.25, 0.5)]);
    }

    #[test]
    fn correlations_are_of_ranks() {
        assert_eq!(ranks(vec![5.0, 1.0, 5.0, 9.0]), [1.5, 0.0, 1.5, 3.0]);
        let all = [(0.1, 1.0), (0.2, 50.0), (0.3, 51.0), (0.4, 9e9)].map(|(a, b)| pair("m", a, b));
        assert_eq!(rank_correlation(&all.iter().collect::<Vec<_>>()), 1.0);
        let said = correlations(&all);
        assert!(said.contains("m, foretold against later, 4 pairs: rank correlation 1.00"), "{said}");
        let turned = [(0.1, 3.0), (0.2, 2.0), (0.3, 1.0)].map(|(a, b)| pair("m", a, b));
        assert_eq!(rank_correlation(&turned.iter().collect::<Vec<_>>()), -1.0);
        assert_eq!(correlations(&turned[..2]), "");
    }

    #[test]
    fn the_picture_has_a_point_for_each_pair() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("foretold.svg");
        let all = [pair("m", 0.01, 0.02), pair("m", 0.03, 1e-9), pair("n", 0.5, 99.0)];
        plot(&all, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        // Points, and one in the legend for each series.
        assert_eq!(svg.matches("<circle").count(), 3 + 2, "{svg}");
        assert!(svg.contains(">\nn\n<"), "{svg}");
        assert!(plot(&[], &path).is_err());
    }
}
