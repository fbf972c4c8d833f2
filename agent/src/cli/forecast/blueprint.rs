//! A blueprint by hand as people write it: CSV, or JSON with the same fields.
//!
//! ```csv
//! from,until,resource,p50,p95
//! 08:00,18:00,cpu,0.5,1.5
//! 2026-11-24T18:00,2026-11-24T20:00,memory,1G,2G
//! ```
//! Nothing unknown is passed over: a misspelt column would otherwise be a promise that nobody keeps.

use std::io::Read;
use std::path::Path;

use lathe_shard::{BitRate, Bytes, Iops, MilliCpu, ParseAmountError};
use serde::Deserialize;

use super::when::{self, At, DAY};
use crate::api::wire::by_hand::{BlueprintRequest, BlueprintStep, ForecastOf};
use crate::problem::{Kind, Problem};

/// Longest file, bytes.
const MAX_BYTES: u64 = 256 << 10;
const COLUMNS: [&str; 6] = ["from", "until", "resource", "p50", "p95", "p99"];
/// Of these, those that must be there.
const NEEDED: [&str; 4] = ["from", "until", "resource", "p95"];

/// A row as it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    from: String,
    until: String,
    resource: String,
    p50: Option<String>,
    p95: String,
    p99: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    /// 1 where it is written.
    schema: Option<u32>,
    /// 0 to 1.
    confidence: Option<f64>,
    steps: Vec<Row>,
}

/// Reads a file; `-` is the standard input.
///
/// # Errors
/// `bad-blueprint` with file and place.
pub fn read(path: &Path) -> Result<BlueprintRequest, Problem> {
    let mut text = String::new();
    let standard = path.as_os_str() == "-";
    let read = if standard {
        std::io::stdin().lock().take(MAX_BYTES + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text))
    };
    let name = if standard { "standard input".to_owned() } else { path.display().to_string() };
    read.map_err(|cause| {
        Problem::new(Kind::BadRequest, "no-such-file", format!("cannot read {name}: {cause}"))
            .fix("name a file of CSV or JSON, or - for the standard input")
    })?;
    if text.len() as u64 > MAX_BYTES {
        return Err(wrong(format!("{name}: it is longer than {} KiB", MAX_BYTES >> 10)));
    }
    parse(&name, &text).map_err(wrong)
}

fn wrong(message: String) -> Problem {
    Problem::new(Kind::BadRequest, "bad-blueprint", message).fix(
        "lathe forecast --help        for example: printf 'from,until,resource,p95\\n08:00,18:00,cpu,1.5\\n'",
    )
}

fn parse(name: &str, text: &str) -> Result<BlueprintRequest, String> {
    let rows = if text.trim_start().starts_with('{') { json(text) } else { csv(text) };
    let (confidence_permille, rows) = rows.map_err(|cause| format!("{name}: {cause}"))?;
    let steps =
        rows.iter().map(|(place, row)| step(row).map_err(|cause| format!("{name}: {place}: {cause}")));
    Ok(BlueprintRequest { confidence_permille, steps: steps.collect::<Result<_, _>>()? })
}

type Rows = Vec<(String, Row)>;

fn json(text: &str) -> Result<(u32, Rows), String> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let document: Document = serde_path_to_error::deserialize(&mut reader)
        .map_err(|cause| format!("{}: {}", cause.path(), cause.inner()))?;
    reader.end().map_err(|cause| cause.to_string())?;
    if document.schema.is_some_and(|schema| schema != 1) {
        return Err("schema: only 1 is known".to_owned());
    }
    let confidence = document.confidence.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&confidence) {
        return Err(format!("confidence: {confidence} is not between 0 and 1"));
    }
    let place = |(at, row): (usize, Row)| (format!("steps[{at}]"), row);
    Ok(((confidence * 1000.0).round() as u32, document.steps.into_iter().enumerate().map(place).collect()))
}

fn csv(text: &str) -> Result<(u32, Rows), String> {
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    let mut lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let (_, head) = lines.next().ok_or("it is empty")?;
    let columns: Vec<&str> = head.split(',').map(str::trim).collect();
    for (at, column) in columns.iter().enumerate() {
        if !COLUMNS.contains(column) {
            return Err(format!("line 1: there is no column {column:?}, only {}", COLUMNS.join(", ")));
        }
        if columns[..at].contains(column) {
            return Err(format!("line 1: column {column} is there twice"));
        }
    }
    if let Some(missing) = NEEDED.iter().find(|needed| !columns.contains(needed)) {
        return Err(format!("line 1: column {missing} is missing"));
    }
    let row = |(line, text): (usize, &str)| {
        let cells: Vec<&str> = text.split(',').map(str::trim).collect();
        if cells.len() != columns.len() {
            return Err(format!("line {line}: {} cells under {} columns", cells.len(), columns.len()));
        }
        let cell = |column: &str| {
            let at = columns.iter().position(|other| *other == column)?;
            Some(cells[at].to_owned()).filter(|cell| !cell.is_empty())
        };
        let needed = |column: &str| cell(column).ok_or_else(|| format!("line {line}: {column} is empty"));
        let row = Row {
            from: needed("from")?,
            until: needed("until")?,
            resource: needed("resource")?,
            p50: cell("p50"),
            p95: needed("p95")?,
            p99: cell("p99"),
        };
        Ok((format!("line {line}"), row))
    };
    Ok((1000, lines.map(row).collect::<Result<_, _>>()?))
}

fn resource(word: &str) -> Result<ForecastOf, String> {
    match word {
        "cpu" => Ok(ForecastOf::Cpu),
        "memory" => Ok(ForecastOf::Memory),
        "net" => Ok(ForecastOf::Net),
        "iops" => Ok(ForecastOf::Iops),
        other => Err(format!("{other:?} is no resource: write cpu, memory, net or iops")),
    }
}

/// An amount in the resource's smallest unit.
fn amount(resource: ForecastOf, text: &str) -> Result<u64, ParseAmountError> {
    match resource {
        ForecastOf::Cpu => text.parse().map(|MilliCpu(milli)| milli),
        ForecastOf::Memory => text.parse().map(|Bytes(bytes)| bytes),
        ForecastOf::Net => text.parse().map(|BitRate(rate)| rate),
        ForecastOf::Iops => text.parse().map(|Iops(iops)| iops),
    }
}

fn step(row: &Row) -> Result<BlueprintStep, String> {
    let resource = resource(&row.resource)?;
    let named = |name: &str, text: &str| amount(resource, text).map_err(|cause| format!("{name}: {cause}"));
    let p95 = named("p95", &row.p95)?;
    let p50 = row.p50.as_deref().map_or(Ok(p95), |text| named("p50", text))?;
    let p99 = row.p99.as_deref().map_or(Ok(p95), |text| named("p99", text))?;
    if p50 > p95 || p95 > p99 {
        return Err("p50, p95 and p99 are not in order: each is at least the one before".to_owned());
    }
    let (daily, from_sec, for_sec) = match (when::parse(&row.from)?, when::parse(&row.until)?) {
        // From 22:00 until 06:00 is over midnight, from 00:00 until 24:00 a whole day.
        (At::OfDay(from), At::OfDay(until)) => (true, from, (until + DAY - from - 1) % DAY + 1),
        (At::Once(from), At::Once(until)) if until > from => (false, from, until - from),
        (At::Once(_), At::Once(_)) => {
            return Err(format!("until {} is not after from {}", row.until, row.from));
        }
        _ => return Err("from and until are both a time of day, or both with a date".to_owned()),
    };
    Ok(BlueprintStep { resource, daily, from_sec, for_sec, p50, p95, p99 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn csv_and_json_say_the_same() {
        let csv = "# shop\nfrom,until,resource,p50,p95,p99\n08:00,18:00,cpu,0.5,1.5,\n\n22:00,06:00,memory,,2G,3G\n\
                   2026-11-24T18:00,2026-11-24T20:00,net,,40mbit,\n00:00,24:00,iops,,300iops,\n";
        let json = r#"{"confidence":0.9,"steps":[
            {"from":"08:00","until":"18:00","resource":"cpu","p50":"0.5","p95":"1.5"},
            {"from":"22:00","until":"06:00","resource":"memory","p95":"2G","p99":"3G"},
            {"from":"2026-11-24T18:00","until":"2026-11-24T20:00","resource":"net","p95":"40mbit"},
            {"from":"00:00","until":"24:00","resource":"iops","p95":"300iops"}]}"#;
        let (csv, json) = (parse("a", csv).unwrap(), parse("b", json).unwrap());
        assert_eq!(csv.steps, json.steps);
        assert_eq!((csv.confidence_permille, json.confidence_permille), (1000, 900));
        let step = |daily, resource, from_sec, for_sec, p50, p95, p99| BlueprintStep {
            resource,
            daily,
            from_sec,
            for_sec,
            p50,
            p95,
            p99,
        };
        let expected = [
            step(true, ForecastOf::Cpu, 28_800, 36_000, 500, 1500, 1500),
            step(true, ForecastOf::Memory, 79_200, 28_800, 2 << 30, 2 << 30, 3 << 30),
            step(false, ForecastOf::Net, 1_795_543_200, 7200, 40_000_000, 40_000_000, 40_000_000),
            step(true, ForecastOf::Iops, 0, 86_400, 300, 300, 300),
        ];
        assert_eq!(csv.steps, expected);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let wrong = |text: &str| parse("plan.csv", text).unwrap_err();
        let row = |row: &str| wrong(&format!("from,until,resource,p50,p95\n08:00,09:00,cpu,1,2\n{row}\n"));
        assert_eq!(wrong(""), "plan.csv: it is empty");
        assert!(wrong("from,until,ressource,p95\n").contains("line 1: there is no column \"ressource\""));
        assert_eq!(wrong("from,until,resource\n"), "plan.csv: line 1: column p95 is missing");
        assert!(wrong("from,from,until,resource,p95\n").contains("twice"));
        assert_eq!(row("09:00,10:00,cpu,1"), "plan.csv: line 3: 4 cells under 5 columns");
        assert_eq!(row("09:00,10:00,cpu,1,"), "plan.csv: line 3: p95 is empty");
        assert!(
            row("09:00,10:00,cpu,2,1").starts_with("plan.csv: line 3: p50, p95 and p99 are not in order")
        );
        assert!(row("09:00,10:00,gpu,1,2").contains("\"gpu\" is no resource"));
        assert!(row("09:00,10:00,cpu,1,many").starts_with("plan.csv: line 3: p95: "));
        assert!(row("9:00,10:00,cpu,1,2").contains("is no time"));
        assert!(row("09:00,2026-11-24T10:00,cpu,1,2").contains("both"));
        assert!(row("2026-11-24T10:00,2026-11-24T10:00,cpu,1,2").contains("not after"));
        assert!(wrong(r#"{"steps":[{"from":"1"}]}"#).starts_with("plan.csv: steps[0]: missing field"));
        assert!(wrong(r#"{"steps":[],"more":1}"#).contains("unknown field"));
        let json = |confidence: &str| format!("{{\"confidence\":{confidence},\"steps\":[]}}");
        assert!(wrong(&json("1.5")).contains("between 0 and 1") && wrong(&json("-0.1")).contains("between"));
        assert!(wrong(r#"{"steps":[]} x"#).contains("trailing"));
        let number = r#"{"steps":[{"from":"08:00","until":"09:00","resource":"cpu","p95":2}]}"#;
        assert!(wrong(number).starts_with("plan.csv: steps[0].p95: "), "of 2 nobody knows the unit");
    }

    #[test]
    fn a_file_is_read_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.csv");
        assert_eq!(read(&path).unwrap_err().code, "no-such-file");
        std::fs::write(&path, "#".repeat(MAX_BYTES as usize + 1)).unwrap();
        assert!(read(&path).unwrap_err().message.contains("longer than 256 KiB"));
        std::fs::write(&path, "from,until,resource,p95\n00:00,24:00,cpu,1\n").unwrap();
        assert_eq!(read(&path).unwrap().steps.len(), 1);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-z0-9:,.{}\"\\[\\]\\n -]{0,200}") {
            let _ = parse("x", &text);
            let _ = parse("x", &format!("{{{text}"));
            let _ = parse("x", &format!("from,until,resource,p95\n{text}"));
        }
    }
}
