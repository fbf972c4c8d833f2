//! Goals as a whole: applications over HTTP and by files, what is refused, what is kept.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::time::SystemTime;

use super::*;

const LATENCY: Goal = Goal::Latency { permille: 950, under_usec: 20_000 };

fn set(name: &str, goal: Goal, metrics: &str, metric: Option<&str>) -> Question {
    Question::Set { name: name.into(), goal, metrics: metrics.into(), metric: metric.map(Into::into) }
}

/// Goals whose thread runs, and the folder where they are kept.
fn goals() -> (&'static Goals, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let goals: &Goals = Box::leak(Box::new(Goals::new()));
    goals.load(Store::new(folder.path()), Instant::now());
    std::thread::spawn(|| goals.read_for_ever());
    (goals, folder)
}

/// An application that answers each question with ten requests more than the last, all of 15 ms.
fn application() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("http://{}/metrics", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for (at, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let question = BufReader::new(stream.try_clone().unwrap());
            question.lines().find(|line| line.as_ref().is_ok_and(String::is_empty));
            let count = at * 10;
            write!(
                stream,
                "HTTP/1.0 200 OK\r\n\r\n# TYPE web_seconds histogram\nweb_seconds_bucket{{le=\"0.01\"}} 0\n\
                 web_seconds_bucket{{le=\"0.02\"}} {count}\nweb_seconds_bucket{{le=\"+Inf\"}} {count}\nweb_seconds_count {count}\n"
            )
            .unwrap();
        }
    });
    place
}

/// What is told once there are figures, and what the host asks meanwhile.
fn figures(goals: &Goals) -> Pursued {
    loop {
        if let Some(told) = goals.look(Instant::now()).pop()
            && told.over_msec > 0
        {
            return told;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn an_application_is_followed_over_http() {
    let (goals, folder) = goals();
    let answer = goals.answer(set("web", LATENCY, &application(), None));
    let changed = answer.changed.unwrap();
    assert!(
        changed.starts_with("web     goal taken: p95 under 20.0 ms, by web_seconds at http://127.0.0.1:"),
        "{changed}"
    );
    assert!(answer.unheard && answer.wrong.is_none());
    let told = figures(goals);
    assert_eq!(
        (told.name.as_str(), told.goal, told.latency_usec, told.wrong),
        ("web", LATENCY, Some(19_500), None)
    );
    assert!(told.rate_milli.is_some_and(|rate| (1000..6000).contains(&rate)), "{:?}", told.rate_milli);
    assert!(!goals.answer(Question::Show {}).unheard);
    let again = Goals::new();
    again.load(Store::new(folder.path()), Instant::now());
    assert_eq!(again.table().terms(), goals.table().terms(), "kept");
    assert_eq!(goals.answer(Question::None { name: "web".into() }).goals, []);
    assert_eq!(Store::new(folder.path()).load(), Ok(vec![]));
}

#[test]
fn an_application_is_followed_by_its_file() {
    let (goals, folder) = goals();
    let path = folder.path().join("batch.prom");
    let write = |jobs: u32, age: Duration| {
        let new = folder.path().join("new");
        std::fs::write(&new, format!("# TYPE jobs_total counter\njobs_total {jobs}\n")).unwrap();
        let written = SystemTime::now() - age;
        File::options().write(true).open(&new).unwrap().set_modified(written).unwrap();
        std::fs::rename(&new, &path).unwrap();
    };
    goals.look(Instant::now());
    write(10, Duration::from_secs(5));
    let answer = goals.answer(set("batch", Goal::Throughput, path.to_str().unwrap(), None));
    assert_eq!((answer.wrong, answer.unheard), (None, false));
    write(5010, Duration::ZERO);
    let told = figures(goals);
    assert_eq!((told.latency_usec, told.wrong), (None, None));
    assert!((5000..7000).contains(&told.over_msec), "by when it was written: {} ms", told.over_msec);
    assert!(
        told.rate_milli.is_some_and(|rate| (700_000..=1_000_000).contains(&rate)),
        "{:?}",
        told.rate_milli
    );
    std::fs::remove_file(&path).unwrap();
    let wrong = loop {
        if let Some(wrong) = goals.look(Instant::now()).remove(0).wrong {
            break wrong;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(wrong, format!("no such file at {}", path.display()));
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let (goals, folder) = goals();
    let page = folder.path().join("web.prom");
    std::fs::write(&page, samples::OPENMETRICS).unwrap();
    let page = page.to_str().unwrap();
    for (question, why) in [
        (set("web", LATENCY, "http://10.0.0.1/", None), "is not on this machine"),
        (
            set("web", LATENCY, "http://127.0.0.1:1/", None),
            "connection refused at http://127.0.0.1:1/; does the application run",
        ),
        (set("web", LATENCY, "/nowhere", None), "no such file at /nowhere; has the application"),
        (
            set("web", LATENCY, page, Some("jobs_done")),
            "and latency needs a histogram, a summary or a gauge at /",
        ),
        (set("web", LATENCY, page, Some("http")), "there is no metric http at /"),
        (set("web", LATENCY, page, Some("a{}")), "no name of a metric"),
        (set("web", Goal::Throughput, page, None), "more than one metric fits at /"),
        (set("web", Goal::Other, page, None), "of a later version"),
        (set("a b", LATENCY, page, None), "no name of a goal"),
        (Question::None { name: "web".into() }, "there is no goal web"),
    ] {
        let answer = goals.answer(question);
        let wrong = answer.wrong.unwrap();
        assert!(wrong.contains(why), "{wrong}");
        assert_eq!((answer.changed, answer.goals.len()), (None, 0));
    }
    assert!(!Store::new(folder.path()).path().exists());
    for name in ["a", "b", "c", "d"] {
        assert_eq!(goals.answer(set(name, LATENCY, page, None)).wrong, None);
    }
    assert!(goals.answer(set("e", LATENCY, "/nowhere", None)).wrong.unwrap().contains("4 goals already"));
    let bytes = serde_json::to_vec(&goals.answer(Question::Show {})).unwrap();
    assert!((bytes.len() as u64) < super::super::socket::MAX_BYTES / 4);
}

#[test]
fn what_cannot_be_kept_holds_even_so_and_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("web.prom");
    std::fs::write(&page, samples::OPENMETRICS).unwrap();
    let goals = Goals::new();
    goals.load(Store::new(&page.join("lathe-guest")), Instant::now());
    let answer = goals.answer(set("web", LATENCY, page.to_str().unwrap(), None));
    let unkept = answer.unkept.unwrap();
    assert!(unkept.starts_with("the agent's end: /") && unkept.contains("goals.json: "), "{unkept}");
    assert_eq!((answer.wrong, answer.goals.len()), (None, 1));
}
