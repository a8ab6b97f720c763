//! Plots of results as SVG: lines, and bars in groups. Knows neither what was measured nor where files go.

use anyhow::{Context, Result, ensure};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 520);
const FONT: &str = "sans-serif";

/// Told apart by most eyes, also next to each other (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
    RGBColor(150, 120, 20),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// From 0, or from the least value if that is below.
    Linear,
    /// By decades. Takes values above 0 only.
    Log,
}

/// What an axis shows, with its unit.
#[derive(Debug, Clone)]
pub struct Axis {
    pub name: String,
    pub scale: Scale,
}

impl Axis {
    pub fn linear(name: &str) -> Self {
        Self { name: name.to_owned(), scale: Scale::Linear }
    }

    pub fn log(name: &str) -> Self {
        Self { name: name.to_owned(), scale: Scale::Log }
    }
}

/// A line through its points, in their order.
#[derive(Debug, Clone)]
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// One bar in each group; none where nothing was measured.
#[derive(Debug, Clone)]
pub struct Bars {
    pub name: String,
    pub values: Vec<Option<f64>>,
}

/// Lines over one pair of axes, as the text of an SVG file.
pub fn lines(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let across = Coordinate::of(x.scale, points().map(|point| point.0)).with_context(|| x.name.clone())?;
    let up = Coordinate::of(y.scale, points().map(|point| point.1)).with_context(|| y.name.clone())?;
    draw(|area| {
        let mut chart = frame(area, title).build_cartesian_2d(across, up)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(&x.name).y_desc(&y.name).light_line_style(TRANSPARENT).draw()?;
        for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
            chart.draw_series(line.points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
            let through = line.points.iter().copied();
            let drawn = chart.draw_series(LineSeries::new(through, colour.stroke_width(2)))?;
            drawn
                .label(&line.name)
                .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}

/// Groups of bars side by side, as the text of an SVG file.
pub fn bars(title: &str, y: &Axis, groups: &[String], bars: &[Bars]) -> Result<String> {
    ensure!(bars.iter().all(|bars| bars.values.len() == groups.len()), "not one bar for each of the groups");
    let values = bars.iter().flat_map(|bars| &bars.values).flatten().copied();
    let up = Coordinate::of(y.scale, values).with_context(|| y.name.clone())?;
    let across = Coordinate::Groups(groups.to_vec());
    let foot = up.range().start;
    // A group takes its place but for a fifth.
    let width = 0.8 / bars.len().max(1) as f64;
    draw(|area| {
        let mut chart = frame(area, title).build_cartesian_2d(across, up)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().light_line_style(TRANSPARENT).y_desc(&y.name).draw()?;
        for (index, (bars, colour)) in bars.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let offset = 0.1 + width * index as f64;
            let rectangle = |(group, value): (usize, &Option<f64>)| {
                let left = group as f64 + offset;
                let corners = [(left, foot), (left + width * 0.92, (*value)?)];
                Some(Rectangle::new(corners, colour.filled()))
            };
            let drawn = chart.draw_series(bars.values.iter().enumerate().filter_map(rectangle))?;
            drawn
                .label(&bars.name)
                .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(paint: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        paint(&area)?;
        area.present()?;
    }
    Ok(text)
}

fn frame<'a, 'b>(area: &'a Area<'b>, title: &str) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder.caption(title, (FONT, 20)).margin(16).x_label_area_size(44).y_label_area_size(72);
    builder
}

fn legend<'a, 'b: 'a>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, Cartesian2d<Coordinate, Coordinate>>,
    position: SeriesLabelPosition,
) -> Result<()> {
    let labels = &mut chart.configure_series_labels();
    labels.position(position).border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.85));
    labels.label_font((FONT, 13)).draw()?;
    Ok(())
}

/// The part of a row of groups that they take; the names of the bars stand beside them.
const GROUPS_PART: f64 = 0.84;

/// What is shown along an axis.
#[derive(Debug, Clone)]
enum Coordinate {
    /// From and to.
    Linear(f64, f64),
    /// From and to, as decimal logarithms.
    Log(f64, f64),
    /// Each takes 1.
    Groups(Vec<String>),
}

impl Coordinate {
    fn of(scale: Scale, values: impl Iterator<Item = f64>) -> Result<Self> {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values {
            ensure!(value.is_finite(), "{value} has no place on an axis");
            ensure!(scale == Scale::Linear || value > 0.0, "{value} has no place on a logarithmic axis");
            (low, high) = (low.min(value), high.max(value));
        }
        ensure!(low <= high, "there is nothing to show");
        Ok(match scale {
            Scale::Linear => Self::Linear(low.min(0.0), if high > 0.0 { high * 1.05 } else { 1.0 }),
            Scale::Log => {
                let (low, high) = (low.log10().floor(), high.log10().ceil());
                Self::Log(low, high.max(low + 1.0))
            }
        })
    }

    /// How far along the axis a value is, from 0 to 1.
    fn part(&self, value: f64) -> f64 {
        match self {
            Self::Linear(low, high) => (value - low) / (high - low),
            Self::Log(low, high) => (value.log10() - low) / (high - low),
            Self::Groups(names) => value / names.len() as f64 * GROUPS_PART,
        }
    }
}

impl Ranged for Coordinate {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + (self.part(*value) * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        match self {
            Self::Linear(low, high) => {
                let step = step(high - low);
                let marks = ((low / step).ceil() as i32)..=((high / step).floor() as i32);
                marks.map(|mark| f64::from(mark) * step).collect()
            }
            Self::Log(low, high) => (*low as i32..=*high as i32).map(|power| 10f64.powi(power)).collect(),
            Self::Groups(names) => (0..names.len()).map(|group| group as f64 + 0.5).collect(),
        }
    }

    fn range(&self) -> std::ops::Range<f64> {
        match self {
            Self::Linear(low, high) => *low..*high,
            Self::Log(low, high) => 10f64.powf(*low)..10f64.powf(*high),
            Self::Groups(names) => 0.0..names.len() as f64 / GROUPS_PART,
        }
    }
}

impl ValueFormatter<f64> for Coordinate {
    fn format_ext(&self, value: &f64) -> String {
        match self {
            Self::Linear(..) | Self::Log(..) => short(*value),
            Self::Groups(names) => names.get(*value as usize).cloned().unwrap_or_default(),
        }
    }
}

/// Between marks on a linear axis: 1, 2 or 5 times a power of ten, some five to ten of them.
fn step(range: f64) -> f64 {
    let power = 10f64.powf((range / 5.0).log10().floor());
    let times = range / 5.0 / power;
    power
        * if times >= 5.0 {
            5.0
        } else if times >= 2.0 {
            2.0
        } else {
            1.0
        }
}

/// A number with its thousands as letters, without digits that say nothing.
fn short(value: f64) -> String {
    let (scaled, letter) = match value.abs() {
        magnitude if magnitude >= 1e9 => (value / 1e9, "G"),
        magnitude if magnitude >= 1e6 => (value / 1e6, "M"),
        magnitude if magnitude >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{scaled:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}{letter}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, points: &[(f64, f64)]) -> Line {
        Line { name: name.to_owned(), points: points.to_vec() }
    }

    #[test]
    fn lines_on_logarithmic_axes_show_title_axes_names_and_decades() {
        let shown =
            [line("build", &[(10.0, 0.2), (10_000.0, 18.0)]), line("plan", &[(10.0, 0.1), (10_000.0, 9.0)])];
        let (x, y) = (Axis::log("backends"), Axis::log("milliseconds"));
        let svg = lines("Control plane", &x, &y, &shown).unwrap();
        assert!(svg.trim_start().starts_with("<svg"), "{svg}");
        for word in
            ["Control plane", "backends", "milliseconds", "build", "plan", "\n10k\n", "\n0.1\n", "\n100\n"]
        {
            assert!(svg.contains(word), "{word:?} is not in:\n{svg}");
        }
    }

    #[test]
    fn bars_stand_in_named_groups_and_may_be_missing() {
        let groups = ["l2".to_owned(), "ipip".to_owned()];
        let shown = [
            Bars { name: "xlb".to_owned(), values: vec![Some(3.0), Some(4.0)] },
            Bars { name: "other".to_owned(), values: vec![Some(2.5), None] },
        ];
        let svg = bars("Requests", &Axis::linear("thousands a second"), &groups, &shown).unwrap();
        for word in ["Requests", "thousands a second", "\nl2\n", "\nipip\n", "xlb", "other"] {
            assert!(svg.contains(word), "{word:?} is not in:\n{svg}");
        }
        let short = [Bars { name: "xlb".to_owned(), values: vec![Some(1.0)] }];
        assert!(bars("Requests", &Axis::linear("n"), &groups, &short).is_err());
    }

    #[test]
    fn what_has_no_place_on_an_axis_is_an_error() {
        let (x, log) = (Axis::linear("x"), Axis::log("y"));
        assert!(lines("t", &x, &log, &[line("zero", &[(1.0, 0.0)])]).is_err());
        assert!(lines("t", &x, &x, &[line("not a number", &[(1.0, f64::NAN)])]).is_err());
        assert!(lines("t", &x, &x, &[]).is_err());
        assert!(lines("t", &x, &x, &[line("zeros", &[(0.0, 0.0)])]).is_ok());
    }

    #[test]
    fn numbers_on_axes_are_short() {
        for (value, text) in
            [(0.0, "0"), (0.01, "0.01"), (2_500.0, "2500"), (65_536.0, "65.536k"), (1e6, "1M")]
        {
            assert_eq!(short(value), text);
        }
        for (range, expected) in [(10.0, 2.0), (60.0, 10.0), (0.3, 0.05)] {
            assert!((step(range) - expected).abs() < 1e-9, "{range}: {}", step(range));
        }
    }
}
