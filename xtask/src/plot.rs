//! The picture of `cargo xtask compare`: time per token over the depth, drawn from its JSON.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde_json::Value;

/// Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes tell the lines apart as well.
pub const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

const PANEL: (u32, u32) = (500, 420);
const HEADING: u32 = 34;

/// A setting's points: depth, and milliseconds per token.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    name: String,
    upstream: bool,
    points: Vec<(f64, f64)>,
}

/// Draws a report of `compare` into an SVG: one panel for each test.
pub fn write(report: &Value, path: &Path) -> Result<()> {
    let panels = panels(report).context("this is no report of `cargo xtask compare`")?;
    write_svg(path, |svg| draw(&heading(report), &panels, svg))
}

/// Writes what is drawn into an SVG.
pub fn write_svg(path: &Path, draw: impl FnOnce(&mut String) -> Result<(), Box<dyn std::error::Error>>) -> Result<()> {
    if path.extension().is_none_or(|extension| extension != "svg") {
        bail!("--plot {}: the name must end in .svg", path.display());
    }
    // It fails only for data that is no font.
    let _ = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    let mut svg = String::new();
    draw(&mut svg).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}

/// Each test's lines, in the report's order.
fn panels(report: &Value) -> Option<BTreeMap<String, Vec<Line>>> {
    let mut panels: BTreeMap<String, Vec<Line>> = BTreeMap::new();
    for row in report["results"].as_array()? {
        let lines = panels.entry(row["test"].as_str()?.to_owned()).or_default();
        let point = (row["depth"].as_f64()?, 1e3 / row["tokens_per_second"].as_f64()?);
        let name = row["name"].as_str()?;
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => {
                let upstream = row["upstream"].as_bool()?;
                lines.push(Line { name: name.to_owned(), upstream, points: vec![point] });
            }
        }
    }
    panels.values_mut().flatten().for_each(|line| line.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    (!panels.is_empty()).then_some(panels)
}

/// What was measured on what: a picture may be seen without the text beside it.
fn heading(report: &Value) -> String {
    let text = |key: &str| report[key].as_str().map(|text| text.trim_end_matches(".gguf").to_owned());
    let number = |key: &str, what: &str| report[key].as_u64().map(|n| format!("{n} {what}"));
    let parts = [text("model"), text("cpu"), number("threads", "threads"), number("rounds", "rounds, medians")];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

/// "tg64" in words.
fn title(test: &str) -> String {
    let number = test.trim_start_matches(|c: char| c.is_alphabetic());
    match test.strip_suffix(number) {
        Some("pp") => format!("Prefill of {number} tokens"),
        Some("tg") => format!("Decode, mean of {number} tokens"),
        _ => test.to_owned(),
    }
}

/// From one power of two to another around the times: what is twice as fast is as far apart everywhere.
fn doublings(times: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, most) = times.fold((f64::MAX, f64::MIN), |(least, most), time| (least.min(time), most.max(time)));
    let (from, to) = (least.log2().floor(), most.log2().ceil());
    from.exp2()..to.max(from + 1.0).exp2()
}

fn draw(
    heading: &str,
    panels: &BTreeMap<String, Vec<Line>>,
    svg: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let n_lines = panels.values().map(Vec::len).max().unwrap_or(0) as u32;
    let legend_height = 30 + 24 * n_lines.div_ceil(2);
    let size = (PANEL.0 * panels.len() as u32, HEADING + PANEL.1 + legend_height);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (top, below) = root.split_vertically(HEADING);
    top.draw_text(heading, &("sans-serif", 18).into_font().color(&BLACK), (16, 12))?;
    let (charts, legend) = below.split_vertically(PANEL.1);
    // Decode is what most people look at first.
    for (area, (test, lines)) in charts.split_evenly((1, panels.len())).iter().zip(panels.iter().rev()) {
        let points = || lines.iter().flat_map(|line| &line.points);
        let widest = points().fold(1.0f64, |x, point| x.max(point.0));
        let mut chart = ChartBuilder::on(area)
            .caption(title(test), ("sans-serif", 20))
            .margin(10)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(58)
            .build_cartesian_2d(0.0..widest * 1.02, doublings(points().map(|point| point.1)).log_scale().base(2.0))?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .x_desc("tokens in the cache")
            .y_desc("milliseconds per token (log scale)")
            .axis_desc_style(("sans-serif", 17))
            .label_style(("sans-serif", 14))
            .x_labels(6)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.3}").trim_end_matches('0').trim_end_matches('.').to_owned())
            .draw()?;
        for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(3);
            if line.upstream {
                chart.draw_series(DashedLineSeries::new(line.points.iter().copied(), 8, 5, style))?;
                chart.draw_series(line.points.iter().map(|&point| Cross::new(point, 5, style)))?;
            } else {
                chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
                chart.draw_series(line.points.iter().map(|&point| Circle::new(point, 5, colour.filled())))?;
            }
        }
    }
    let names = panels.values().max_by_key(|lines| lines.len()).into_iter().flatten();
    for (index, (line, colour)) in names.zip(COLOURS.iter().cycle()).enumerate() {
        let (x, y) = (60 + (index % 2) as i32 * size.0 as i32 / 2, 14 + (index / 2) as i32 * 24);
        let style = colour.stroke_width(3);
        let ends = if line.upstream { vec![(x, x + 14), (x + 22, x + 36)] } else { vec![(x, x + 36)] };
        for (from, to) in ends {
            legend.draw(&PathElement::new([(from, y), (to, y)], style))?;
        }
        if line.upstream {
            legend.draw(&Cross::new((x + 18, y), 5, style))?;
        } else {
            legend.draw(&Circle::new((x + 18, y), 5, colour.filled()))?;
        }
        legend.draw_text(&line.name, &("sans-serif", 16).into_font().color(&BLACK), (x + 46, y - 9))?;
    }
    root.present()?;
    drop((top, below, charts, legend));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report() -> Value {
        let row = |name: &str, depth: u32, speed: f64| json!({"name": name, "upstream": name == "them", "test": "tg64", "depth": depth, "tokens_per_second": speed});
        json!({"model": "a-model.gguf", "cpu": "a machine", "threads": 2, "rounds": 3, "results": [row("them", 2048, 20.0), row("us", 2048, 50.0), row("them", 0, 100.0), row("us", 0, 100.0)]})
    }

    #[test]
    fn lines_are_the_reports_numbers() {
        let panels = panels(&report()).unwrap();
        let them = Line { name: "them".into(), upstream: true, points: vec![(0.0, 10.0), (2048.0, 50.0)] };
        let us = Line { name: "us".into(), upstream: false, points: vec![(0.0, 10.0), (2048.0, 20.0)] };
        assert_eq!(panels.into_iter().collect::<Vec<_>>(), [("tg64".to_owned(), vec![them, us])]);
        assert_eq!(super::panels(&json!({"results": [{"test": "tg64"}]})), None);
    }

    #[test]
    fn the_axis_begins_and_ends_with_powers_of_two() {
        assert_eq!(doublings([5.2, 52.0, 8.0].into_iter()), 4.0..64.0);
        assert_eq!(doublings([4.0].into_iter()), 4.0..8.0);
        assert_eq!(doublings([0.9, 12.9].into_iter()), 0.5..16.0);
    }

    #[test]
    fn the_picture_names_every_setting() {
        let folder = std::env::temp_dir().join(format!("compare-plot-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("plot.svg");
        write(&report(), &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in [
            "them",
            "us",
            "a-model · a machine · 2 threads · 3 rounds, medians",
            "Decode, mean of 64 tokens",
            "milliseconds per token",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(write(&report(), &folder.join("plot.gif")).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
