//! Pictures of what was measured, as SVG or PNG by the file's name. Colours are those of Okabe and Ito, which colour-blind
//! readers tell apart; nothing is told by colour alone.

use std::{path::Path, sync::Once};

use plotters::{
    coord::Shift,
    prelude::*,
    style::{
        FontStyle, register_font,
        text_anchor::{HPos, Pos, VPos},
    },
};

use simlayer::lazy::Measure;

use crate::failure::Failure;

const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const PURPLE: RGBColor = RGBColor(204, 121, 167);
const VERMILION: RGBColor = RGBColor(213, 94, 0);
const SKY: RGBColor = RGBColor(86, 180, 233);
const SERIES: [RGBColor; 6] = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY];

/// Pixels of a picture across. A README shows it at about this width.
const WIDTH: u32 = 1000;

/// Something that can be drawn, on any backend.
pub trait Picture {
    fn height(&self) -> u32;

    fn draw<DB: DrawingBackend>(&self, root: &DrawingArea<DB, Shift>) -> Drawn<DB>;
}

type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Whether a picture can be written under this name.
pub fn check_name(path: &Path) -> Result<(), Failure> {
    match extension(path).as_deref() {
        Some("svg" | "png") => Ok(()),
        _ => Err(Failure::usage(format!("--plot {}: the name must end in .svg or .png", path.display()))),
    }
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_string_lossy().to_lowercase())
}

/// Draws a picture into a file.
pub fn write(path: &Path, picture: &impl Picture) -> Result<(), Failure> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        // It fails only for data that is no font.
        let _ = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    let failed = |error: String| Failure::run(format!("{}: {error}", path.display()));
    let size = (WIDTH, picture.height());
    // The SVG is made in memory, so that a failure to write it is ours to report.
    if extension(path).as_deref() == Some("svg") {
        let mut text = String::new();
        draw_on(SVGBackend::with_string(&mut text, size), picture).map_err(failed)?;
        return std::fs::write(path, text).map_err(|error| failed(error.to_string()));
    }
    draw_on(BitMapBackend::new(path, size), picture).map_err(failed)
}

fn draw_on<DB: DrawingBackend>(backend: DB, picture: &impl Picture) -> Result<(), String> {
    let root = backend.into_drawing_area();
    let drawn = root.fill(&WHITE).and_then(|()| picture.draw(&root)).and_then(|()| root.present());
    drawn.map_err(|error| error.to_string())
}

fn text(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&BLACK)
}

fn centred(size: i32) -> TextStyle<'static> {
    text(size).pos(Pos::new(HPos::Center, VPos::Center))
}

/// A layer's score, and whether it is lazy.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    pub score: Option<f32>,
    pub lazy: bool,
}

/// Scores layer by layer, with the threshold.
#[derive(Debug)]
pub struct Scores {
    pub title: String,
    pub bars: Vec<Bar>,
    pub threshold: Option<f32>,
    pub measure: Measure,
}

impl Picture for Scores {
    fn height(&self) -> u32 {
        460
    }

    fn draw<DB: DrawingBackend>(&self, root: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let n = self.bars.len() as f64;
        root.draw_text(&self.title, &centred(21), (WIDTH as i32 / 2, 20))?;
        let mut chart = ChartBuilder::on(root)
            .margin(12)
            .margin_top(62)
            .x_label_area_size(44)
            .y_label_area_size(62)
            .build_cartesian_2d(-0.6..n - 0.4, 0.0..1.12f64)?;
        let every = self.bars.len().div_ceil(32).max(1);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .x_desc("layer")
            .y_desc(match self.measure {
                Measure::Mass => "attention on sink and window",
                Measure::Output => "1 − change of the output",
            })
            .axis_desc_style(text(18))
            .label_style(text(15))
            .y_labels(6)
            .y_label_formatter(&|y| format!("{y:.1}"))
            .x_labels(0)
            .draw()?;
        for (index, bar) in self.bars.iter().enumerate() {
            let x = index as f64;
            if index % every == 0 {
                let pixel = chart.backend_coord(&(x, 0.0));
                root.draw_text(&index.to_string(), &centred(14), (pixel.0, pixel.1 + 12))?;
            }
            let Some(score) = bar.score.map(f64::from) else { continue };
            let (colour, edge) = if bar.lazy { (BLUE.mix(1.0), BLUE) } else { (WHITE.mix(1.0), ORANGE) };
            let corners = [(x - 0.38, 0.0), (x + 0.38, score)];
            chart.draw_series([Rectangle::new(corners, colour.filled())])?;
            chart.draw_series([Rectangle::new(corners, edge.stroke_width(3))])?;
            if self.bars.len() <= 40 {
                let pixel = chart.backend_coord(&(x, score));
                root.draw_text(&format!("{score:.2}"), &centred(12), (pixel.0, pixel.1 - 9))?;
            }
        }
        if let Some(threshold) = self.threshold.map(f64::from) {
            let line = [(-0.6, threshold), (n - 0.4, threshold)];
            chart.draw_series(DashedLineSeries::new(line, 8, 5, BLACK.stroke_width(2)))?;
            let (x, y) = (290, 47);
            root.draw(&PathElement::new([(x, y), (x + 12, y)], BLACK.stroke_width(2)))?;
            root.draw(&PathElement::new([(x + 17, y), (x + 29, y)], BLACK.stroke_width(2)))?;
            // As it was written: an f64 would show the digits that f32 cannot hold.
            root.draw_text(&format!("threshold τ = {}", threshold as f32), &text(16), (x + 36, y - 8))?;
        }
        legend(root, &[("lazy", BLUE, true), ("active", ORANGE, false)])
    }
}

/// Squares with their meaning, in a line under the title.
fn legend<DB: DrawingBackend>(root: &DrawingArea<DB, Shift>, entries: &[(&str, RGBColor, bool)]) -> Drawn<DB> {
    let mut x = 76;
    for (name, colour, filled) in entries {
        let corners = [(x, 40), (x + 14, 54)];
        if *filled {
            root.draw(&Rectangle::new(corners, colour.filled()))?;
        }
        root.draw(&Rectangle::new(corners, colour.stroke_width(3)))?;
        root.draw_text(name, &text(16), (x + 21, 39))?;
        x += 100;
    }
    Ok(())
}

/// One heat map of several side by side: a value from 0 to 1 for each depth (row) and length (column).
#[derive(Debug)]
pub struct Panel {
    pub title: String,
    pub cells: Vec<Vec<f64>>,
}

#[derive(Debug)]
pub struct HeatMaps {
    pub title: String,
    pub lengths: Vec<String>,
    pub depths: Vec<String>,
    pub panels: Vec<Panel>,
}

const ROW: i32 = 34;

impl HeatMaps {
    /// Panels beside each other; more go into the next row.
    fn columns(&self) -> usize {
        self.panels.len().clamp(1, 4)
    }

    fn panel_height(&self) -> i32 {
        64 + ROW * self.depths.len() as i32
    }
}

impl Picture for HeatMaps {
    fn height(&self) -> u32 {
        let rows = self.panels.len().div_ceil(self.columns()) as i32;
        (76 + rows * self.panel_height()) as u32
    }

    fn draw<DB: DrawingBackend>(&self, root: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        root.draw_text(&self.title, &centred(21), (WIDTH as i32 / 2, 20))?;
        let (left, gap) = (84, 16);
        let columns = self.columns() as i32;
        let panel_width = (WIDTH as i32 - left - 12 - gap * (columns - 1)) / columns;
        let cell_width = panel_width / self.lengths.len().max(1) as i32;
        for (i, panel) in self.panels.iter().enumerate() {
            let (column, row) = (i as i32 % columns, i as i32 / columns);
            let x0 = left + column * (panel_width + gap);
            let y0 = 70 + row * self.panel_height();
            root.draw_text(&panel.title, &centred(17), (x0 + cell_width * self.lengths.len() as i32 / 2, y0 - 14))?;
            for (r, cells) in panel.cells.iter().enumerate() {
                let y = y0 + r as i32 * ROW;
                if column == 0 {
                    let style = text(15).pos(Pos::new(HPos::Right, VPos::Center));
                    root.draw_text(&self.depths[r], &style, (x0 - 8, y + ROW / 2))?;
                }
                for (c, &value) in cells.iter().enumerate() {
                    let x = x0 + c as i32 * cell_width;
                    let corners = [(x, y), (x + cell_width - 1, y + ROW - 1)];
                    root.draw(&Rectangle::new(corners, shade(value).filled()))?;
                    let ink = if value < 0.6 { WHITE } else { BLACK };
                    root.draw_text(
                        &format!("{value:.2}"),
                        &centred(15).color(&ink),
                        (x + cell_width / 2, y + ROW / 2),
                    )?;
                }
            }
            let below = y0 + ROW * self.depths.len() as i32 + 12;
            for (c, length) in self.lengths.iter().enumerate() {
                let x = x0 + c as i32 * cell_width + cell_width / 2;
                root.draw_text(length, &centred(15), (x, below))?;
            }
        }
        let bottom = self.height() as i32 - 16;
        root.draw_text("length of the text, in tokens", &centred(17), (WIDTH as i32 / 2, bottom))?;
        let depth = text(17).transform(FontTransform::Rotate270).pos(Pos::new(HPos::Center, VPos::Center));
        root.draw_text("depth of the needle", &depth, (16, 70 + ROW * self.depths.len() as i32 / 2))
    }
}

/// From dark blue (0) to light yellow (1): lightness alone tells the value.
fn shade(value: f64) -> RGBColor {
    const STOPS: [(f64, f64, f64); 4] =
        [(0.0, 32.0, 81.0), (87.0, 92.0, 109.0), (172.0, 160.0, 112.0), (253.0, 234.0, 69.0)];
    let at = value.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let low = (at as usize).min(STOPS.len() - 2);
    let share = at - low as f64;
    let mix = |a: f64, b: f64| (a + (b - a) * share).round() as u8;
    let (a, b) = (STOPS[low], STOPS[low + 1]);
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// Lines over one axis, in panels above each other that share it.
#[derive(Debug)]
pub struct Lines {
    pub title: String,
    pub x_name: String,
    pub panels: Vec<LinePanel>,
}

#[derive(Debug)]
pub struct LinePanel {
    pub y_name: String,
    /// Names and points.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Picture for Lines {
    fn height(&self) -> u32 {
        60 + 270 * self.panels.len() as u32
    }

    fn draw<DB: DrawingBackend>(&self, root: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        root.draw_text(&self.title, &centred(21), (WIDTH as i32 / 2, 20))?;
        let (_, rest) = root.split_vertically(40);
        let points = |panel: &LinePanel| panel.lines.iter().flat_map(|(_, points)| points.clone()).collect::<Vec<_>>();
        let all: Vec<(f64, f64)> = self.panels.iter().flat_map(points).collect();
        let x_range = range(all.iter().map(|point| point.0), 0.04, false);
        let areas = rest.split_evenly((self.panels.len(), 1));
        for (i, (panel, area)) in self.panels.iter().zip(&areas).enumerate() {
            let y_range = range(points(panel).iter().map(|point| point.1), 0.12, true);
            let mut chart = ChartBuilder::on(area)
                .margin(10)
                .x_label_area_size(46)
                .y_label_area_size(78)
                .build_cartesian_2d(x_range.clone(), y_range)?;
            chart
                .configure_mesh()
                .light_line_style(WHITE)
                .bold_line_style(BLACK.mix(0.12))
                .x_desc(&self.x_name)
                .y_desc(&panel.y_name)
                .axis_desc_style(text(17))
                .label_style(text(15))
                .y_labels(6)
                .draw()?;
            for (series, (name, line)) in panel.lines.iter().enumerate() {
                let colour = SERIES[series % SERIES.len()];
                chart.draw_series(LineSeries::new(line.iter().copied(), colour.stroke_width(3)))?;
                // Marks of different shapes, so that lines differ by more than colour.
                for &point in line {
                    let at = chart.backend_coord(&point);
                    let style = colour.filled();
                    match series % 3 {
                        0 => root.draw(&Circle::new(at, 6, style))?,
                        1 => root.draw(&Rectangle::new([(at.0 - 6, at.1 - 6), (at.0 + 6, at.1 + 6)], style))?,
                        _ => root.draw(&TriangleMarker::new(at, 8, style))?,
                    }
                }
                if i == 0 && panel.lines.len() > 1 {
                    let x = 100 + 220 * series as i32;
                    root.draw(&Rectangle::new([(x, 40), (x + 22, 45)], colour.filled()))?;
                    root.draw_text(name, &text(16), (x + 28, 34))?;
                }
            }
        }
        Ok(())
    }
}

/// The range of values, with some room; from 0 on where asked for.
fn range(values: impl Iterator<Item = f64>, room: f64, from_zero: bool) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return 0.0..1.0;
    }
    let low = if from_zero { low.min(0.0) } else { low };
    let room = ((high - low) * room).max(high.abs() * 1e-3).max(1e-9);
    (if from_zero { low } else { low - room })..high + room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shades_grow_lighter() {
        let lightness = |value: f64| {
            let RGBColor(r, g, b) = shade(value);
            0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b)
        };
        for i in 0..20 {
            assert!(lightness(f64::from(i) / 20.0) < lightness(f64::from(i + 1) / 20.0));
        }
    }

    #[test]
    fn ranges() {
        assert_eq!(range([1.0, 3.0].into_iter(), 0.5, false), 0.0..4.0);
        assert_eq!(range([1.0, 3.0].into_iter(), 0.5, true), 0.0..4.5);
        assert_eq!(range(std::iter::empty(), 0.5, true), 0.0..1.0);
        let one = range([2.0].into_iter(), 0.1, false);
        assert!(one.start < 2.0 && one.end > 2.0);
    }

    #[test]
    fn names() {
        assert!(check_name(Path::new("a.svg")).is_ok() && check_name(Path::new("a.PNG")).is_ok());
        assert!(check_name(Path::new("a.jpg")).is_err() && check_name(Path::new("svg")).is_err());
    }
}
