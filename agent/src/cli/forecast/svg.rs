//! The panels as one picture that needs nothing else: SVG 1.1, light or dark as the viewer is.
//!
//! The past and what is ahead have scales of their own, on both sides of the line of now; otherwise some minutes ahead would be invisible
//! beside a day. Lines differ in how they are broken and carry their names.

use std::fmt::Write;

use super::panel::{Panel, Span, time};
use crate::api::wire::forecast::{AheadView, ForecastView};

const WIDTH: f64 = 960.0;
const HEAD: f64 = 64.0;
const PANEL: f64 = 226.0;
const FOOT: f64 = 26.0;
/// Within a panel: where the plot is.
const LEFT: f64 = 92.0;
const RIGHT: f64 = 120.0;
const ABOVE: f64 = 54.0;
const BELOW: f64 = 34.0;
/// Share of the plot's width that the past has.
const PAST: f64 = 0.76;
/// Between two names of lines.
const APART: f64 = 13.0;
/// Steps of the time's axis, seconds.
const TICKS: [u64; 14] = [10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400];
const DAY: u64 = 86_400;

const STYLE: &str = "\
svg{background:#fff;color:#1b2733;font-family:'Inter','Segoe UI',Helvetica,Arial,sans-serif}\
text{fill:currentColor;font-size:12px}.title{font-size:19px;font-weight:600}.name{font-size:14px;font-weight:600}\
.soft{fill:#5d6b7a}.grid{stroke:#e3e8ee;stroke-width:1}.axis{stroke:#9aa7b4;stroke-width:1}\
.past{fill:none;stroke:#1f6feb;stroke-width:1.8;stroke-linejoin:round}.under{fill:#1f6feb;fill-opacity:.12}.dot{fill:#1f6feb}\
.band{fill:#d97706;fill-opacity:.22}.p50{fill:none;stroke:#b45309;stroke-width:2}\
.p95{fill:none;stroke:#d97706;stroke-width:1.4;stroke-dasharray:6 3}\
.grant{stroke:#2f855a;stroke-width:1.5;stroke-dasharray:2 4}.now{stroke:#5d6b7a;stroke-width:1}\
@media (prefers-color-scheme:dark){svg{background:#11171d;color:#e4eaf0}.soft{fill:#97a4b1}.grid{stroke:#26303a}.axis,.now{stroke:#5b6875}\
.past{stroke:#6aa5ff}.under,.dot{fill:#6aa5ff}.band{fill:#f0a33e}.p50{stroke:#ffc06b}.p95{stroke:#f0a33e}.grant{stroke:#5fc48f}}";

fn escaped(text: &str) -> String {
    text.chars()
        .filter(|character| !character.is_control())
        .map(|character| match character {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            '"' => "&quot;".to_owned(),
            '\'' => "&apos;".to_owned(),
            other => other.to_string(),
        })
        .collect()
}

/// Where things lie in one panel.
struct Plot {
    top: f64,
    most: u64,
    span_sec: u64,
    ahead_sec: u64,
    now_sec: u64,
}

impl Plot {
    const BEGIN: f64 = LEFT;
    const END: f64 = WIDTH - RIGHT;
    const NOW: f64 = LEFT + (WIDTH - LEFT - RIGHT) * PAST;

    fn y(&self, amount: u64) -> f64 {
        let height = PANEL - ABOVE - BELOW;
        let share = (amount as f64 / self.most.max(1) as f64).clamp(0.0, 1.0);
        self.top + ABOVE + height * (1.0 - share)
    }

    fn floor(&self) -> f64 {
        self.y(0)
    }

    fn x_ago(&self, age_sec: f64) -> f64 {
        Self::NOW - (Self::NOW - Self::BEGIN) * (age_sec / self.span_sec as f64).clamp(0.0, 1.0)
    }

    fn x_ahead(&self, at_sec: u64) -> f64 {
        let ahead = at_sec.saturating_sub(self.now_sec) as f64 / self.ahead_sec.max(1) as f64;
        Self::NOW + (Self::END - Self::NOW) * ahead.clamp(0.0, 1.0)
    }
}

/// Draws all panels.
pub fn draw(view: &ForecastView, panels: &[Panel], span: Span) -> String {
    let height = HEAD + PANEL * panels.len().max(1) as f64 + FOOT;
    let name = escaped(&view.name);
    let mut svg = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>What {name} asked for and will ask for</title>\n<style>{STYLE}</style>\n\
         <text class=\"title\" x=\"24\" y=\"34\">{name}</text>\n\
         <text class=\"soft\" x=\"24\" y=\"53\">{} UTC; the last {}, and what is ahead</text>\n",
        date(view.now_unix_sec),
        time(span.seconds),
    );
    if panels.is_empty() {
        svg.push_str("<text x=\"24\" y=\"100\">Nothing measured yet.</text>\n");
    }
    for (place, panel) in panels.iter().enumerate() {
        let plot = Plot {
            top: HEAD + PANEL * place as f64,
            most: panel.top,
            span_sec: span.seconds.max(1),
            ahead_sec: panel
                .ahead
                .last()
                .map_or(0, |last| last.until_unix_sec.saturating_sub(view.now_unix_sec)),
            now_sec: view.now_unix_sec,
        };
        // Writing into a text cannot fail.
        let _ = one(&mut svg, panel, &plot);
    }
    svg.push_str("</svg>\n");
    svg
}

fn one(svg: &mut String, panel: &Panel, plot: &Plot) -> std::fmt::Result {
    let (begin, end, now) = (Plot::BEGIN, Plot::END, Plot::NOW);
    let trust = [panel.trust.as_str(), panel.back.as_str()];
    let trust = trust.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
    let lines = [(22.0, format!("{}; next {}", panel.head, panel.next)), (38.0, trust)];
    let y = plot.top + 22.0;
    writeln!(svg, "<text class=\"name\" x=\"24\" y=\"{y}\">{}</text>", escaped(&panel.resource))?;
    for (below, line) in lines {
        let (x, y) = (begin + 8.0, plot.top + below);
        writeln!(svg, "<text class=\"soft\" x=\"{x}\" y=\"{y}\">{}</text>", escaped(&line))?;
    }
    for amount in [0, panel.top / 2, panel.top] {
        let y = plot.y(amount);
        writeln!(svg, "<line class=\"grid\" x1=\"{begin}\" y1=\"{y:.1}\" x2=\"{end}\" y2=\"{y:.1}\"/>")?;
        let label = escaped(&panel.amount(amount));
        let y = y + 4.0;
        writeln!(svg, "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{label}</text>", begin - 8.0)?;
    }
    times(svg, plot)?;
    past(svg, panel, plot)?;
    let mut names = ahead(svg, panel, plot)?;
    if let Some(grant) = panel.grant {
        let y = plot.y(grant);
        writeln!(svg, "<line class=\"grant\" x1=\"{begin}\" y1=\"{y:.1}\" x2=\"{end}\" y2=\"{y:.1}\"/>")?;
        names.push((y, format!("granted {}", panel.amount(grant))));
    }
    let (top, floor) = (plot.y(panel.top), plot.floor());
    writeln!(
        svg,
        "<line class=\"now\" x1=\"{now:.1}\" y1=\"{:.1}\" x2=\"{now:.1}\" y2=\"{floor:.1}\"/>",
        top - 6.0
    )?;
    writeln!(svg, "<line class=\"axis\" x1=\"{begin}\" y1=\"{floor:.1}\" x2=\"{end}\" y2=\"{floor:.1}\"/>")?;
    for (y, name) in apart(names) {
        writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", end + 6.0, y + 4.0, escaped(&name))?;
    }
    Ok(())
}

/// Marks and times below the plot.
fn times(svg: &mut String, plot: &Plot) -> std::fmt::Result {
    let y = plot.floor();
    let every = TICKS.into_iter().find(|every| plot.span_sec / every <= 7).unwrap_or(5 * DAY);
    let first = plot.now_sec.saturating_sub(plot.span_sec).next_multiple_of(every);
    let ticks = (0..16).map(|tick| first + tick * every).take_while(|at| *at < plot.now_sec);
    for at in ticks {
        let x = plot.x_ago((plot.now_sec - at) as f64);
        // The word "now" needs its room.
        if Plot::NOW - x < 26.0 {
            continue;
        }
        let text = if every < DAY { clock(at) } else { date(at)[5..10].to_owned() };
        writeln!(
            svg,
            "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>",
            y + 4.0
        )?;
        writeln!(
            svg,
            "<text class=\"soft\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
            y + 18.0
        )?;
    }
    let mut word = |x: f64, anchor: &str, text: &str| {
        let y = y + 18.0;
        writeln!(svg, "<text class=\"soft\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>")
    };
    word(Plot::NOW, "middle", "now")?;
    if plot.ahead_sec > 0 {
        word(Plot::END, "end", &clock(plot.now_sec + plot.ahead_sec))?;
    }
    Ok(())
}

/// A line for each stretch without a gap, and what is below it.
fn past(svg: &mut String, panel: &Panel, plot: &Plot) -> std::fmt::Result {
    let middle = |age_sec: u64, length_sec: u64| plot.x_ago(age_sec as f64 - length_sec as f64 / 2.0);
    for stretch in panel.past.split(|step| step.amount.is_none()).filter(|stretch| !stretch.is_empty()) {
        let points: Vec<(f64, f64)> = stretch
            .iter()
            .map(|step| (middle(step.age_sec, step.length_sec), plot.y(step.amount.unwrap_or(0))))
            .collect();
        if let [(x, y)] = points[..] {
            writeln!(svg, "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2\"/>")?;
            continue;
        }
        let line = joined(&points);
        let (first, last) = (points[0].0, points[points.len() - 1].0);
        let floor = plot.floor();
        writeln!(
            svg,
            "<polygon class=\"under\" points=\"{first:.1},{floor:.1} {line} {last:.1},{floor:.1}\"/>"
        )?;
        writeln!(svg, "<polyline class=\"past\" points=\"{line}\"/>")?;
    }
    Ok(())
}

fn joined(points: &[(f64, f64)]) -> String {
    points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ")
}

/// The band, its edges, and their names with where they end.
fn ahead(svg: &mut String, panel: &Panel, plot: &Plot) -> Result<Vec<(f64, String)>, std::fmt::Error> {
    let Some(last) = panel.ahead.last() else { return Ok(Vec::new()) };
    // Each minute is a step: a straight line from one to the next would promise what nobody said.
    let edge = |of: fn(&AheadView) -> u64| -> Vec<(f64, f64)> {
        let step = |ahead: &AheadView| {
            let y = plot.y(of(ahead));
            [(plot.x_ahead(ahead.from_unix_sec), y), (plot.x_ahead(ahead.until_unix_sec), y)]
        };
        panel.ahead.iter().flat_map(step).collect()
    };
    let (p50, p95) = (edge(|ahead| ahead.p50), edge(|ahead| ahead.p95));
    let back: Vec<_> = p50.iter().rev().copied().collect();
    writeln!(svg, "<polygon class=\"band\" points=\"{} {}\"/>", joined(&p95), joined(&back))?;
    writeln!(svg, "<polyline class=\"p95\" points=\"{}\"/>", joined(&p95))?;
    writeln!(svg, "<polyline class=\"p50\" points=\"{}\"/>", joined(&p50))?;
    Ok(vec![
        (plot.y(last.p95), format!("p95 {}", panel.amount(last.p95))),
        (plot.y(last.p50), format!("p50 {}", panel.amount(last.p50))),
    ])
}

/// Names moved downwards until none covers another.
fn apart(mut names: Vec<(f64, String)>) -> Vec<(f64, String)> {
    names.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let mut least = f64::NEG_INFINITY;
    for (y, _) in &mut names {
        *y = y.max(least);
        least = *y + APART;
    }
    names
}

/// `2026-11-22 17:05`, UTC.
pub fn date(unix_sec: u64) -> String {
    // Civil date from days: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    let days = unix_sec / DAY + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {}", clock(unix_sec))
}

fn clock(unix_sec: u64) -> String {
    format!("{:02}:{:02}", unix_sec % DAY / 3600, unix_sec % 3600 / 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;

    /// Whether every tag is closed in its turn and no text has a stray mark.
    fn is_well_formed(xml: &str) -> bool {
        let mut open = Vec::new();
        for piece in xml.split('<').skip(1) {
            let Some((tag, text)) = piece.split_once('>') else { return false };
            let entities = ["&amp;", "&lt;", "&gt;", "&quot;", "&apos;"];
            if entities.iter().fold(text.to_owned(), |text, entity| text.replace(entity, "")).contains('&') {
                return false;
            }
            let name = tag.split([' ', '/']).find(|word| !word.is_empty()).unwrap_or_default();
            match tag {
                tag if tag.starts_with('?') || tag.ends_with('/') => {}
                tag if tag.starts_with('/') => match open.pop() {
                    Some(opened) if opened == name => {}
                    _ => return false,
                },
                _ => open.push(name),
            }
            if tag.matches('"').count() % 2 == 1 {
                return false;
            }
        }
        open.is_empty()
    }

    #[test]
    fn it_is_well_formed_whatever_the_name_and_the_past() {
        let mut view = fake::forecast("a<&>\"'\u{1}b");
        for seconds in [60, 600, 3600, 86_400, 30 * 86_400] {
            let span = Span::of(seconds);
            let panels: Vec<_> =
                view.resources.iter().map(|one| Panel::new(one, span, view.now_unix_sec)).collect();
            let svg = draw(&view, &panels, span);
            assert!(is_well_formed(&svg) && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        view.resources.iter_mut().for_each(|one| one.ahead.clear());
        let panels: Vec<_> =
            view.resources.iter().map(|one| Panel::new(one, Span::of(600), view.now_unix_sec)).collect();
        assert!(is_well_formed(&draw(&view, &panels, Span::of(600))));
        assert!(is_well_formed(&draw(&view, &[], Span::of(600))));
        assert!(!is_well_formed("<a><b></a></b>") && !is_well_formed("<a>&</a>"), "the check checks");
    }

    #[test]
    fn days_have_their_dates() {
        assert_eq!(date(0), "1970-01-01 00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00");
        assert_eq!(date(1_795_367_150), "2026-11-22 17:05");
        assert_eq!(date(1_798_761_599), "2026-12-31 23:59");
    }

    #[test]
    fn names_do_not_cover_each_other() {
        let names = apart(vec![(20.0, "b".into()), (10.0, "a".into()), (21.0, "c".into())]);
        let places: Vec<f64> = names.iter().map(|(y, _)| *y).collect();
        assert_eq!(places, [10.0, 23.0, 36.0]);
    }
}
