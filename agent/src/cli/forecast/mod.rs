//! `lathe forecast NAME`: what a machine asked for, what it is likely to ask for, and what it is granted.
//!
//! | file | what |
//! |---|---|
//! | [`panel`] | one resource, fit to be drawn: which past, which scale, which words |
//! | [`chart`] | the same in a terminal |
//! | [`svg`] | the same as a picture |
//!
//! | [`said`] | what people say of what is ahead, what is wanted, and the applications inside, in words |
//! | [`blueprint`], [`when`] | files and times as people write them |
//!
//! The drawing ones are pure. Nothing is said by colour alone.

pub mod blueprint;
pub mod chart;
pub mod panel;
pub mod said;
pub mod svg;
pub mod when;

use std::io::IsTerminal;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use self::panel::{Panel, Span};
use super::args::ForecastArgs;
use super::output::{print, print_json, say};
use super::stream::window_size;
use crate::api::wire::by_hand::ByHandView;
use crate::api::wire::forecast::ForecastView;
use crate::cli::client::Client;
use crate::cli::machine::machine_path;
use crate::cli::{Verdict, exit, why};
use crate::problem::{Kind, Problem};

/// Columns where there is no terminal and `COLUMNS` does not tell.
const PLAIN_COLUMNS: usize = 80;

/// `lathe forecast`.
pub async fn forecast(client: &Client, json: bool, args: &ForecastArgs) -> Verdict {
    if args.settings.mode.is_some() || args.settings.aggressiveness.is_some() {
        return why::set(client, json, &args.name, &args.settings).await;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    if let Some(verdict) = said::say(client, json, args, now).await {
        return verdict;
    }
    let view: ForecastView = client.get(&format!("{}/forecast", machine_path(&args.name)?)).await?;
    if args.by_hand.apps {
        return said::applications(json, &view);
    }
    let span = args.over.map_or_else(|| Span::fitting(&view), |over| Span::of(over.as_secs()));
    let panels: Vec<Panel> =
        view.resources.iter().map(|one| Panel::new(one, span, view.now_unix_sec)).collect();
    if let Some(file) = &args.svg {
        write(file, &svg::draw(&view, &panels, span))?;
    }
    match (json, &args.svg) {
        (true, _) => print_json(&view)?,
        (false, Some(file)) => say(&format!("drawn into {}", file.display())),
        (false, None) => print(&text(&view, &panels, span, columns(), is_utf8())),
    }
    Ok(exit::DONE)
}

fn text(view: &ForecastView, panels: &[Panel], span: Span, columns: usize, utf8: bool) -> String {
    let mut text = if panels.is_empty() {
        format!("{}  nothing measured yet; a machine is measured while it runs\n", view.name)
    } else {
        let charts = panels.iter().map(|panel| chart::draw(&view.name, panel, span, columns, utf8));
        format!("{}\n{}\n", charts.collect::<Vec<_>>().join("\n"), chart::legend(utf8))
    };
    text.push_str(&said::wanted(&view.wanted));
    if view.by_hand != ByHandView::default() {
        text.push_str(&said::by_hand(&view.by_hand, view.now_unix_sec));
    }
    text
}

fn write(file: &Path, svg: &str) -> Result<(), Problem> {
    std::fs::write(file, svg).map_err(|cause| {
        let message = format!("cannot write {}: {cause}", file.display());
        Problem::new(Kind::BadRequest, "no-such-file", message)
            .fix("name a file in a folder that you may write to")
    })
}

fn columns() -> usize {
    let told = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = std::io::stdout().is_terminal();
    told.unwrap_or_else(|| if terminal { usize::from(window_size().0) } else { PLAIN_COLUMNS })
}

/// Whether the locale has block elements: the first of these that is set counts (locale(7)).
fn is_utf8() -> bool {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default();
    let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
    let locale = locale.to_ascii_lowercase();
    !dumb && (locale.contains("utf-8") || locale.contains("utf8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;

    fn drawn(columns: usize, utf8: bool) -> String {
        let view = fake::forecast("web");
        let span = Span::fitting(&view);
        let panels: Vec<_> =
            view.resources.iter().map(|one| Panel::new(one, span, view.now_unix_sec)).collect();
        text(&view, &panels, span, columns, utf8)
    }

    /// `LATHE_BLESS=1 cargo test -p lathe-agent forecast` writes the pictures anew.
    #[test]
    fn the_pictures_are_those_in_the_tree() {
        let view = fake::forecast("web");
        let span = Span::fitting(&view);
        let panels: Vec<_> =
            view.resources.iter().map(|one| Panel::new(one, span, view.now_unix_sec)).collect();
        let pictures = [
            ("forecast-80.txt", drawn(80, true)),
            ("forecast-ascii-60.txt", drawn(60, false)),
            ("forecast.svg", svg::draw(&view, &panels, span)),
        ];
        for (name, picture) in pictures {
            let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
            if std::env::var_os("LATHE_BLESS").is_some() {
                std::fs::write(&path, &picture).unwrap();
            }
            let expected = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(expected == picture, "{path} is out of date; now:\n{picture}");
        }
    }

    #[test]
    fn every_width_holds_and_ascii_is_ascii() {
        for columns in [1, 20, 50, 80, 132, 500] {
            for utf8 in [false, true] {
                let text = drawn(columns, utf8);
                assert!(utf8 || text.is_ascii(), "{text}");
                let widest =
                    text.lines().filter(|line| line.contains(['|', '│'])).map(|line| line.chars().count());
                assert!(widest.max() <= Some(columns.max(chart::LEAST_COLUMNS)), "{columns}:\n{text}");
            }
        }
    }

    #[test]
    fn what_was_never_measured_says_so() {
        let view = ForecastView { name: "new".to_owned(), ..ForecastView::default() };
        assert!(text(&view, &[], Span::of(600), 80, true).starts_with("new  nothing measured yet"));
    }
}
