//! A panel in a terminal: bars of the past, the band of what is ahead, the grant as a line. Block elements, or plain ASCII.

use super::panel::{Panel, Span, time};

/// Narrower than this it is not drawn.
pub const LEAST_COLUMNS: usize = 50;
/// Nor wider.
const MOST_COLUMNS: usize = 160;
/// Rows of the scale.
const ROWS: usize = 6;
/// Columns of what is ahead: two a minute.
const AHEAD_COLUMNS: usize = 12;

/// What is drawn with.
struct Glyphs {
    /// Eighths of a cell, from the least to a full one.
    bars: [char; 8],
    likely: char,
    possible: char,
    grant: char,
    wall: char,
    corner: char,
    floor: char,
    now: char,
    foot: char,
}

const BLOCKS: Glyphs = Glyphs {
    bars: ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'],
    likely: '▒',
    possible: '░',
    grant: '┄',
    wall: '┤',
    corner: '└',
    floor: '─',
    now: '│',
    foot: '┴',
};
const ASCII: Glyphs = Glyphs {
    bars: ['_', '_', '_', '+', '+', '+', '#', '#'],
    likely: ':',
    possible: '.',
    grant: '-',
    wall: '|',
    corner: '+',
    floor: '-',
    now: '|',
    foot: '+',
};

fn glyphs(utf8: bool) -> &'static Glyphs {
    if utf8 { &BLOCKS } else { &ASCII }
}

/// What the glyphs mean.
pub fn legend(utf8: bool) -> String {
    let Glyphs { bars, likely, possible, grant, .. } = glyphs(utf8);
    format!("{} asked for   {likely} up to p50   {possible} up to p95   {grant} granted", bars[7])
}

/// The chart with its words; each line ends with a line feed.
pub fn draw(name: &str, panel: &Panel, span: Span, columns: usize, utf8: bool) -> String {
    let glyphs = glyphs(utf8);
    let labels = [(ROWS - 1, panel.amount(panel.top)), (ROWS / 2 - 1, panel.amount(panel.top / 2))];
    let margin = labels.iter().map(|(_, label)| label.chars().count()).max().unwrap_or(0).max(6);
    let columns = columns.clamp(LEAST_COLUMNS, MOST_COLUMNS);
    // The margin, a blank, the wall; the line of now.
    let width = columns.saturating_sub(margin + 3 + AHEAD_COLUMNS).max(1);
    let past = past(panel, span, width);
    let ahead = ahead(panel);
    let grant = panel.grant.map(|grant| row_of(grant, panel.top));
    let mut text = format!("{name}  {}  {}\n", panel.resource, panel.head);
    for row in (0..ROWS).rev() {
        let label = labels.iter().find(|(of, _)| *of == row).map_or("", |(_, label)| label);
        text.push_str(&format!("{label:>margin$} {}", glyphs.wall));
        let empty = if grant == Some(row) { glyphs.grant } else { ' ' };
        text.extend(past.iter().map(|eighths| bar(glyphs, *eighths, row).unwrap_or(empty)));
        text.push(glyphs.now);
        text.extend(ahead.iter().map(|(p50, p95)| band(glyphs, *p50, *p95, row).unwrap_or(empty)));
        text.push('\n');
    }
    let floor = |count| glyphs.floor.to_string().repeat(count);
    text.push_str(&format!(
        "{:>margin$} {}{}{}{}\n",
        panel.amount(0),
        glyphs.corner,
        floor(width),
        glyphs.foot,
        floor(AHEAD_COLUMNS)
    ));
    let (begin, end) = (format!("-{}", time(span.seconds)), ahead_label(panel));
    text.push_str(&format!("{:margin$}  {begin:<width$}now{end:>rest$}\n", "", rest = AHEAD_COLUMNS - 2));
    text.push_str(&format!("  next   {}\n  trust  {}\n", panel.next, panel.trust));
    if !panel.back.is_empty() {
        text.push_str(&format!("  again  {}\n", panel.back));
    }
    text.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn ahead_label(panel: &Panel) -> String {
    let end = panel.ahead.last().zip(panel.ahead.first());
    end.map_or(String::new(), |(last, first)| {
        format!("+{}", time(last.until_unix_sec.saturating_sub(first.from_unix_sec)))
    })
}

/// `amount` in cells of the scale, times 8.
fn eighths(amount: u64, top: u64) -> usize {
    let cells = u128::from(amount) * (ROWS as u128 * 8) / u128::from(top.max(1));
    usize::try_from(cells).unwrap_or(usize::MAX)
}

fn row_of(amount: u64, top: u64) -> usize {
    // What is exactly on the line between two rows belongs to the lower one.
    (eighths(amount, top).saturating_sub(1) / 8).min(ROWS - 1)
}

/// Of each column the largest that was asked for in its time, in eighths of a cell; `None` where nothing was measured.
fn past(panel: &Panel, span: Span, width: usize) -> Vec<Option<usize>> {
    let mut columns = vec![None; width];
    let place = |age_sec: u64| {
        let from = span.seconds.saturating_sub(age_sec);
        usize::try_from(u128::from(from) * width as u128 / u128::from(span.seconds)).unwrap_or(0)
    };
    for step in &panel.past {
        let Some(amount) = step.amount else { continue };
        // Up to the column in which its last moment is.
        let first = place(step.age_sec).min(width - 1);
        let end = step.age_sec.saturating_sub(step.length_sec);
        let last = place(end).saturating_sub(1).clamp(first, width - 1);
        for column in &mut columns[first..=last] {
            *column = (*column).max(Some(eighths(amount, panel.top)));
        }
    }
    columns
}

/// The median and the 95 % quantile of each column, in eighths of a cell.
fn ahead(panel: &Panel) -> Vec<(usize, usize)> {
    let of = |column: usize| {
        let at = column * panel.ahead.len() / AHEAD_COLUMNS;
        panel.ahead.get(at).map_or((0, 0), |ahead| {
            // What is likely at all is seen.
            let p95 = eighths(ahead.p95, panel.top);
            (eighths(ahead.p50, panel.top), if ahead.p95 > 0 { p95.max(4) } else { p95 })
        })
    };
    (0..AHEAD_COLUMNS).map(of).collect()
}

fn bar(glyphs: &Glyphs, eighths: Option<usize>, row: usize) -> Option<char> {
    // Measured and nothing is seen, too.
    let filled = eighths?.max(1).saturating_sub(row * 8).min(8);
    filled.checked_sub(1).map(|place| glyphs.bars[place])
}

fn band(glyphs: &Glyphs, p50: usize, p95: usize, row: usize) -> Option<char> {
    let middle = row * 8 + 4;
    match (p50 >= middle, p95 >= middle) {
        (true, _) => Some(glyphs.likely),
        (false, true) => Some(glyphs.possible),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::panel::Step;
    use super::*;

    fn panel(past: Vec<Step>) -> Panel {
        Panel {
            resource: "cpu".to_owned(),
            past,
            ahead: Vec::new(),
            grant: Some(480),
            top: 480,
            head: String::new(),
            next: String::new(),
            trust: String::new(),
            back: String::new(),
        }
    }

    #[test]
    fn a_column_shows_the_most_of_its_time_and_a_gap_stays_one() {
        let step = |age_sec, amount| Step { age_sec, length_sec: 10, amount };
        let panel = panel(vec![
            step(100, Some(80)),
            step(90, None),
            step(80, Some(0)),
            step(50, Some(480)),
            step(45, Some(10)),
        ]);
        let columns = past(&panel, Span { seconds: 100 }, 10);
        assert_eq!(columns, [Some(8), None, Some(0), None, None, Some(48), None, None, None, None]);
        assert_eq!(past(&panel, Span { seconds: 100 }, 1), [Some(48)]);
    }

    #[test]
    fn bars_bands_and_lines_lie_where_they_should() {
        assert_eq!([row_of(480, 480), row_of(240, 480), row_of(241, 480), row_of(0, 480)], [5, 2, 2, 0]);
        assert_eq!(bar(&BLOCKS, Some(20), 1), Some('█'));
        assert_eq!(bar(&BLOCKS, Some(20), 2), Some('▄'));
        assert_eq!(bar(&BLOCKS, Some(20), 3), None);
        assert_eq!((bar(&BLOCKS, Some(0), 0), bar(&BLOCKS, None, 0)), (Some('▁'), None));
        assert_eq!(
            [band(&ASCII, 12, 20, 1), band(&ASCII, 11, 20, 1), band(&ASCII, 0, 0, 0)],
            [Some(':'), Some('.'), None]
        );
    }
}
