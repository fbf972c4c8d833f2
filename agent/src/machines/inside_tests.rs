//! What guests tell and want, and what people say, of a lathed with fake monitors and a guest agent of its own.

use std::sync::{Arc, Mutex};

use lathe_guest::protocol::inside::{
    Amount, Application, Goal, Inside, Pursued, Settled, Want, Whole, Wished,
};
use lathe_guest::protocol::{FrameKind, Hello, Request, Response, decode_header, encode_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::core::unix_sec;
use super::tests::{Lathed, World, until};
use super::*;
use crate::api::wire::by_hand::{
    AnnounceRequest, BlueprintRequest, BlueprintStep, ForecastOf, Raise, RaiseView,
};
use crate::api::wire::forecast::ForecastView;

/// A guest agent that answers each question for what goes on inside as it is told to, and keeps what it hears.
struct Guest {
    answer: Mutex<Response>,
    heard: Mutex<Vec<Settled>>,
    version: u32,
}

impl Guest {
    fn new(lathed: &Lathed, name: &str, version: u32, answer: Response) -> Arc<Self> {
        let guest = Arc::new(Self { answer: Mutex::new(answer), heard: Mutex::default(), version });
        let path = lathed.machines.core.config.socket_dir(name).join("vsock.sock");
        let serving = Arc::clone(&guest);
        lathed.wait(async {
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).unwrap();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(Arc::clone(&serving).serve(stream));
                }
            });
        });
        guest
    }

    async fn serve(self: Arc<Self>, mut stream: UnixStream) -> std::io::Result<()> {
        stream.read_exact(&mut [0; 13]).await?;
        stream.write_all(b"OK 5\n").await?;
        loop {
            let mut header = [0; 5];
            stream.read_exact(&mut header).await?;
            let (_, length) = decode_header(header)?;
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).await?;
            let response = match serde_json::from_slice(&payload)? {
                Request::Hello { .. } => Response::Hello(Hello {
                    version: self.version,
                    oldest_version: 1,
                    build: "fake".into(),
                    kernel: "6.1".into(),
                    os: "fake".into(),
                    boot_id: "b".into(),
                }),
                Request::Inside { settled } => {
                    assert!(self.version >= 4, "it was not to be asked");
                    self.heard.lock().unwrap().extend(settled);
                    self.answer.lock().unwrap().clone()
                }
                _ => Response::Done {},
            };
            let bytes = serde_json::to_vec(&response)?;
            stream.write_all(&encode_frame(FrameKind::Message, &bytes)?).await?;
        }
    }
}

fn told(name: &str, wants: Vec<Want>) -> Response {
    let application = Application { name: name.into(), cpu_milli: 70, ..Application::default() };
    let machine = Whole { cpu_some_permille: Some(9999), ..Whole::default() };
    Response::Inside(Box::new(Inside {
        machine,
        applications: vec![application],
        wants,
        ..Inside::default()
    }))
}

fn forecast(lathed: &Lathed) -> ForecastView {
    lathed.wait(lathed.machines.forecast("demo")).unwrap()
}

#[test]
fn a_guest_is_asked_and_what_it_wants_is_settled() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(RunRequest { cpu_max_milli: Some(600), ..world.request("demo") }).unwrap();
    let want = Want { id: 3, resource: Wished::Cpu, amount: Amount::Up(2000), settled: None, left_sec: 60 };
    let guest = Guest::new(&lathed, "demo", 4, told("ng\u{1b}inx", vec![want]));
    until(|| !forecast(&lathed).wanted.is_empty());
    let view = forecast(&lathed);
    let inside = view.inside.expect("it was told");
    assert_eq!((inside.applications[0].name.as_str(), inside.cpu_some_permille), ("ng?inx", Some(1000)));
    let wanted = &view.wanted[0];
    assert_eq!((wanted.resource.as_str(), wanted.amount, wanted.source.as_str()), ("cpu", 600, "inside"));
    assert!(wanted.left_sec.is_some_and(|left| (50..=60).contains(&left)));
    assert_eq!(lathed.wait(lathed.machines.show("demo")).unwrap().wanted.len(), 1);
    until(|| !guest.heard.lock().unwrap().is_empty());
    let heard = guest.heard.lock().unwrap()[0].clone();
    assert_eq!((heard.id, heard.amount), (3, Some(600)));
    assert!(heard.words.contains("bounds") && heard.words.contains("observes"), "{heard:?}");
    // It does not want it any more.
    *guest.answer.lock().unwrap() = told("nginx", Vec::new());
    until(|| forecast(&lathed).wanted.is_empty());
}

#[test]
fn a_goal_that_is_missed_is_pursued_until_it_is_taken_back() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(RunRequest { cpu_max_milli: Some(600), ..world.request("demo") }).unwrap();
    let goal = Goal::Latency { permille: 950, under_usec: 1000 };
    let web = Pursued {
        name: "web\n".into(),
        goal,
        over_msec: 10_000,
        latency_usec: Some(90_000),
        rate_milli: Some(5000),
        wrong: None,
    };
    let Response::Inside(mut inside) = told("nginx", Vec::new()) else { panic!("what it tells") };
    inside.goals = vec![web];
    let guest = Guest::new(&lathed, "demo", 4, Response::Inside(inside));
    // Its tasks wait for a CPU all the time: half as much again, which nobody gives who only observes.
    until(|| !forecast(&lathed).wanted.is_empty());
    let view = forecast(&lathed);
    let wanted = &view.wanted[0];
    assert_eq!((wanted.resource.as_str(), wanted.amount, wanted.source.as_str()), ("cpu", 150, "goal"));
    assert_eq!(wanted.left_sec, None);
    let goal = view.inside.unwrap().goals.remove(0);
    assert_eq!(
        (goal.name.as_str(), goal.kind.as_str(), goal.stands.as_str()),
        ("web?", "latency", "wanting")
    );
    assert_eq!((goal.permille, goal.under_usec, goal.cpu_milli), (Some(950), Some(1000), Some(150)));
    // It is taken back.
    *guest.answer.lock().unwrap() = told("nginx", Vec::new());
    until(|| forecast(&lathed).wanted.is_empty());
}

#[test]
fn an_old_guest_is_not_asked_and_one_that_cannot_tell_is_left_alone() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let guest = Guest::new(&lathed, "demo", 3, told("x", Vec::new()));
    let answers = || lathed.wait(lathed.machines.show("demo")).unwrap().guest_agent;
    until(answers);
    assert!(forecast(&lathed).inside.is_none() && guest.heard.lock().unwrap().is_empty());
    lathed.run(world.request("other")).unwrap();
    let error = Response::Error { code: "unsupported".into(), message: "no".into() };
    Guest::new(&lathed, "other", 4, error);
    until(|| lathed.wait(lathed.machines.show("other")).unwrap().guest_agent);
    let mut beats = lathed.machines.heartbeat();
    for _ in 0..2 {
        lathed.wait(beats.changed()).unwrap();
        assert!(lathed.wait(lathed.machines.show("other")).unwrap().guest_agent, "its connection stays");
    }
}

fn step(resource: ForecastOf, from_sec: u64, for_sec: u64, amount: u64) -> BlueprintStep {
    BlueprintStep { resource, daily: false, from_sec, for_sec, p50: amount, p95: amount, p99: amount }
}

#[test]
fn what_people_say_outlives_lathed_and_not_its_machine() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let machines = &lathed.machines;
    let begin = unix_sec() / 60 * 60;
    let steps = vec![step(ForecastOf::Cpu, begin, 3600, 700), step(ForecastOf::Iops, begin, 3600, 50)];
    let request = BlueprintRequest { confidence_permille: 800, steps };
    let said = lathed.wait(machines.set_blueprint("demo", request)).unwrap();
    assert_eq!((said.steps.len(), said.confidence_permille), (2, 800));
    let raise = RaiseView { resource: ForecastOf::Cpu, raise: Raise::To(900) };
    let sale = AnnounceRequest { daily: true, from_sec: begin % 86_400, for_sec: 7200, raises: vec![raise] };
    lathed.wait(machines.announce("demo", "sale".into(), sale.clone())).unwrap();
    let before = forecast(&lathed);
    let of = |view: &ForecastView, resource: &str| {
        view.resources.iter().find(|one| one.resource == resource).cloned().expect("it is forecast")
    };
    let cpu = of(&before, "cpu");
    assert!(
        cpu.ahead.len() == 6 && cpu.ahead.iter().all(|ahead| ahead.by_hand && ahead.p95 == 900),
        "{cpu:?}"
    );
    assert_eq!(cpu.confidence_permille, Some(800));
    assert!(of(&before, "iops").ahead.iter().all(|ahead| ahead.p50 == 50), "what was never measured too");
    let wanted: Vec<_> = before.wanted.iter().map(|one| (one.resource.as_str(), one.amount)).collect();
    assert_eq!(wanted, [("cpu", 900), ("iops", 50)]);
    assert!(before.by_hand.events[0].now);
    lathed.kill();

    let lathed = world.lathed();
    let machines = &lathed.machines;
    assert_eq!(forecast(&lathed).by_hand, before.by_hand);
    let problem = |result: Result<_, Problem>| result.map(|_: ByHandView| ()).unwrap_err();
    let unordered = BlueprintStep { p50: 9, p95: 1, ..step(ForecastOf::Cpu, begin, 60, 1) };
    let request = BlueprintRequest { confidence_permille: 1000, steps: vec![unordered] };
    let wrong = problem(lathed.wait(machines.set_blueprint("demo", request)));
    assert_eq!(wrong.code, "bad-blueprint");
    assert!(wrong.message.contains("step 1") && wrong.message.contains("order"), "{wrong:?}");
    let empty = BlueprintRequest { confidence_permille: 1000, steps: Vec::new() };
    assert_eq!(problem(lathed.wait(machines.set_blueprint("demo", empty))).code, "bad-blueprint");
    let over = AnnounceRequest { daily: false, from_sec: 1000, ..sale.clone() };
    assert_eq!(problem(lathed.wait(machines.announce("demo", "old".into(), over))).code, "bad-event");
    assert_eq!(problem(lathed.wait(machines.announce("demo", "a/b".into(), sale))).code, "bad-event");
    assert_eq!(problem(lathed.wait(machines.withdraw("demo", "none"))).code, "no-such-event");
    assert_eq!(problem(lathed.wait(machines.unset_blueprint("none"))).code, "no-such-machine");
    assert_eq!(forecast(&lathed).by_hand, before.by_hand, "what was refused changed nothing");
    lathed.wait(machines.unset_blueprint("demo")).unwrap();
    let left = lathed.wait(machines.withdraw("demo", "sale")).unwrap();
    assert!(left.steps.is_empty() && left.events.is_empty());
    assert!(forecast(&lathed).wanted.is_empty());
    lathed.wait(machines.remove("demo", true, true)).unwrap();
    lathed.run(world.request("demo")).unwrap();
    assert!(forecast(&lathed).by_hand.events.is_empty());
}
