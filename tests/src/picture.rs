//! A picture of what machines had and used over time, as SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 200.0;
/// Room for the scale, and above and below each panel.
const LEFT: f64 = 52.0;
const ABOVE: f64 = 40.0;
const BELOW: f64 = 34.0;

/// An amount at a time, seconds from the beginning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Seconds.
    pub x: f64,
    /// Amount.
    pub y: f64,
}

/// One machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// What it used: an area.
    pub used: Vec<Point>,
    /// What it was granted: a line of steps.
    pub granted: Vec<Point>,
    /// Times that are numbered, seconds.
    pub marks: Vec<f64>,
}

/// All panels below each other, on one scale of time.
pub fn drawn(panels: &[Panel]) -> String {
    let ends = panels.iter().filter_map(|panel| panel.granted.last());
    let end = ends.map(|point| point.x).fold(1.0, f64::max);
    let (width, height) = (LEFT + WIDTH + 16.0, (ABOVE + HEIGHT + BELOW) * panels.len() as f64);
    let mut svg = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for (at, panel) in panels.iter().enumerate() {
        // Writing to a text cannot fail.
        let _ = one(&mut svg, panel, end, (ABOVE + HEIGHT + BELOW) * at as f64 + ABOVE);
    }
    svg + "</svg>\n"
}

fn one(svg: &mut String, panel: &Panel, end: f64, top: f64) -> std::fmt::Result {
    let most = panel.used.iter().chain(&panel.granted).map(|point| point.y).fold(0.1, f64::max) * 1.08;
    let (floor, right) = (top + HEIGHT, LEFT + WIDTH);
    let x = |seconds: f64| LEFT + WIDTH * seconds / end;
    let y = |amount: f64| floor - HEIGHT * amount.clamp(0.0, most) / most;
    for minute in 0..=(end / 60.0) as u32 {
        let at = x(f64::from(minute) * 60.0);
        if minute % 3 == 0 {
            writeln!(
                svg,
                "<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{floor}\" stroke=\"#eee\"/>"
            )?;
            let below = floor + 16.0;
            writeln!(
                svg,
                "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\" fill=\"#666\">{minute} min</text>"
            )?;
        }
    }
    for part in 0..=2 {
        let amount = most * f64::from(part) / 2.0;
        let (left, at) = (LEFT - 6.0, y(amount) + 4.0);
        writeln!(
            svg,
            "<text x=\"{left}\" y=\"{at:.1}\" text-anchor=\"end\" fill=\"#666\">{amount:.2}</text>"
        )?;
    }
    let area: Vec<String> =
        panel.used.iter().map(|point| format!("{:.1},{:.1}", x(point.x), y(point.y))).collect();
    let last = panel.used.last().map_or(LEFT, |point| x(point.x));
    writeln!(
        svg,
        "<polygon points=\"{LEFT},{floor} {} {last:.1},{floor}\" fill=\"#9ecae1\"/>",
        area.join(" ")
    )?;
    let mut steps = Vec::new();
    for pair in panel.granted.windows(2) {
        steps.push(format!(
            "{:.1},{:.1} {:.1},{:.1}",
            x(pair[0].x),
            y(pair[0].y),
            x(pair[1].x),
            y(pair[0].y)
        ));
    }
    writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#08519c\" stroke-width=\"2\"/>",
        steps.join(" ")
    )?;
    for (number, mark) in (1..).zip(&panel.marks) {
        let at = x(*mark);
        writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{floor}\" stroke=\"#c33\" stroke-dasharray=\"3 3\"/>"
        )?;
        let above = top - 4.0;
        writeln!(
            svg,
            "<text x=\"{at:.1}\" y=\"{above}\" text-anchor=\"middle\" fill=\"#c33\">{number}</text>"
        )?;
    }
    let title = top - 22.0;
    writeln!(svg, "<text x=\"{LEFT}\" y=\"{title}\" fill=\"#222\">{}</text>", panel.title)?;
    let legend = [("#5a9fc4", "used"), ("#08519c", "granted"), ("#c33", "it begins")];
    for (at, (colour, text)) in (0_u8..).zip(legend) {
        let at = right - 210.0 + 70.0 * f64::from(at);
        writeln!(svg, "<text x=\"{at}\" y=\"{title}\" fill=\"{colour}\">{text}</text>")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_and_something_are_drawn() {
        assert!(drawn(&[]).ends_with("</svg>\n"));
        let line =
            |amount: f64| (0..10).map(|x| Point { x: f64::from(x) * 30.0, y: amount }).collect::<Vec<_>>();
        let panel = Panel { title: "one".to_owned(), used: line(0.5), granted: line(1.0), marks: vec![60.0] };
        let svg = drawn(&[panel.clone(), panel]);
        assert_eq!(svg.matches("<polygon").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let empty = Panel { title: String::new(), used: Vec::new(), granted: Vec::new(), marks: Vec::new() };
        assert!(!drawn(&[empty]).contains("NaN"));
    }
}
