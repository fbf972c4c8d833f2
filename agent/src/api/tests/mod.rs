//! The API through its socket, over a fake core.

pub mod fake;
mod manual;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use self::fake::{As, FakeCluster, FakeCore, FakeDoctor};
use super::wire::*;
use super::*;

/// Longest that any answer may take here.
const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    core: Arc<FakeCore>,
    app: App,
    socket: PathBuf,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    dir: tempfile::TempDir,
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// Status and code of an error, whose body must be whole.
    fn error(&self) -> (u16, String) {
        let body: ErrorBody =
            serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body));
        assert!(!body.error.message.is_empty() && body.error.docs == "man lathe-errors");
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        (self.status, body.error.code)
    }
}

fn serve(who: As) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let core = Arc::new(FakeCore::default());
    let app = App {
        core: Arc::clone(&core) as _,
        cluster: Arc::new(FakeCluster),
        doctor: Arc::new(FakeDoctor),
        images: Arc::new(Images::open(dir.path(), 0).unwrap()),
        uploads: Arc::new(Uploads::open(dir.path().join("uploads")).unwrap()),
        access: Arc::new(fake::access(who)),
        streams: Arc::new(Semaphore::new(2)),
    };
    let socket = dir.path().join("lathe.sock");
    let listener = server::listener(&socket).unwrap();
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(server::serve(listener, app.clone(), stopped));
    Server { core, app, socket, stop, task, dir }
}

impl Server {
    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).await.unwrap()
    }

    /// One request on a connection of its own; `extra` are more header lines.
    async fn ask(&self, line: &str, extra: &str, body: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        let head = format!(
            "{line} HTTP/1.1\r\nhost: lathe\r\nconnection: close\r\ncontent-length: {}\r\n{extra}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let _ = stream.write_all(body).await; // the server may have answered already
        let mut answer = Vec::new();
        let _ =
            tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer in time");
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {answer}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Reply { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    async fn get(&self, path: &str) -> Reply {
        self.ask(&format!("GET {path}"), "", b"").await
    }

    async fn send(&self, line: &str, body: &Value) -> Reply {
        self.ask(line, "content-type: application/json\r\n", body.to_string().as_bytes()).await
    }
}

fn run_request(name: &str) -> Value {
    json!({ "name": name, "cpu_milli": 500, "memory_bytes": 512 << 20, "net": true })
}

#[tokio::test]
async fn a_machine_from_run_to_rm() {
    let server = serve(As::Owner);
    let made = server.send("POST /v1/machines", &run_request("db")).await;
    assert_eq!((made.status, &made.json()["name"]), (201, &json!("db")));
    assert!(made.head.contains("etag: \"1\""), "{}", made.head);
    assert_eq!(server.get("/v1/machines").await.json()["machines"].as_array().unwrap().len(), 2);
    let resized = server.send("PATCH /v1/machines/db", &json!({ "cpu_milli": 1500 })).await;
    assert_eq!((resized.status, &resized.json()["cpu"]["desired"]), (200, &json!(1500)));
    let shown = server.get("/v1/machines/db").await;
    assert_eq!((shown.status, &shown.json()["revision"]), (200, &json!(2)));
    let stopped =
        server.send("POST /v1/machines/db/stop", &json!({ "timeout_sec": 5, "force": false })).await;
    assert_eq!(stopped.json()["state"], "stopped");
    let paused = server.send("POST /v1/machines/db/pause", &Value::Null).await;
    assert_eq!(paused.json()["state"], "paused");
    let resumed = server.send("POST /v1/machines/db/resume", &Value::Null).await;
    assert_eq!(resumed.json()["state"], "running");
    let started = server.send("POST /v1/machines/db/start", &Value::Null).await;
    assert_eq!((started.status, &started.json()["state"]), (200, &json!("running")));
    assert_eq!(server.ask("DELETE /v1/machines/db", "", b"").await.error(), (409, "machine-running".into()));
    let removed = server.ask("DELETE /v1/machines/db?force=true&purge=true", "", b"").await;
    assert_eq!((removed.status, removed.json()["kept"].clone()), (200, Value::Null));
    assert_eq!(server.get("/v1/machines/db").await.error(), (404, "no-such-machine".into()));
}

#[tokio::test]
async fn a_plan_changes_nothing() {
    let server = serve(As::Owner);
    let plan = server.send("POST /v1/machines?plan=true", &run_request("db")).await;
    assert_eq!((plan.status, &plan.json()["steps"][0]["resource"]), (200, &json!("cpu")));
    let plan = server.send("PATCH /v1/machines/web?plan=true", &json!({ "cpu_milli": 1500 })).await;
    assert_eq!((plan.status, &plan.json()["revision"]), (200, &json!(1)));
    assert_eq!(server.core.machines.lock().unwrap().len(), 1);
    assert_eq!(server.core.machines.lock().unwrap()["web"].revision, 1);
}

#[tokio::test]
async fn a_resize_is_guarded_by_the_revision_and_says_when_it_goes_on() {
    let server = serve(As::Owner);
    let json_type = "content-type: application/json\r\n";
    let with = |tag: &str| format!("{json_type}if-match: {tag}\r\n");
    let line = "PATCH /v1/machines/web";
    let body = br#"{"cpu_milli":700}"#;
    assert_eq!(server.ask(line, &with("5"), body).await.error(), (409, "revision".into()));
    assert_eq!(server.ask(line, &with("five"), body).await.error(), (400, "bad-value".into()));
    assert_eq!(server.ask(line, &with("\"1\""), body).await.status, 200);
    let partial = server.ask(line, json_type, br#"{"memory_bytes":268435456}"#).await;
    assert_eq!((partial.status, &partial.json()["outcome"]), (202, &json!("partial")));
}

#[tokio::test]
async fn bad_requests_get_a_whole_error_and_change_nothing() {
    let server = serve(As::Owner);
    let mut extra = run_request("db");
    extra["colour"] = json!("red");
    let mut negative = run_request("db");
    negative["cpu_milli"] = json!(-1);
    let stop = json!({ "timeout_sec": 3601, "force": false });
    let cases = [
        (server.send("POST /v1/machines", &extra).await, 400, "unknown-field"),
        (server.send("POST /v1/machines", &negative).await, 400, "bad-value"),
        (server.send("POST /v1/machines", &run_request("No/Name")).await, 400, "bad-name"),
        (server.send("POST /v1/machines", &run_request("web")).await, 409, "name-taken"),
        (server.send("POST /v1/machines?paln=true", &run_request("db")).await, 400, "unknown-field"),
        (server.send("POST /v1/machines?plan=maybe", &run_request("db")).await, 400, "bad-value"),
        (server.send("POST /v1/machines/web/stop", &stop).await, 400, "bad-value"),
        (server.ask("POST /v1/machines", "content-type: text/plain\r\n", b"{}").await, 400, "bad-json"),
        (server.ask("POST /v1/machines", "content-type: application/json\r\n", b"{").await, 400, "bad-json"),
        (
            server.ask("POST /v1/machines", "", &vec![b' '; answer::MAX_JSON_BYTES + 1]).await,
            413,
            "body-too-large",
        ),
        (server.ask("PUT /v1/machines/web", "", b"").await, 405, "method-not-allowed"),
        (server.get("/v2/machines").await, 404, "no-such-route"),
        (server.get("/v1/machines/..%2fweb").await, 400, "bad-name"),
        (server.get("/v1/machines/%ff").await, 400, "bad-name"),
        (server.get("/v1/machines/web/logs?lines=-1").await, 400, "bad-value"),
        (server.send("POST /v1/cluster/token", &json!({ "ttl_sec": 59 })).await, 400, "bad-value"),
        (server.send("POST /v1/machines/web/exec", &json!({})).await, 400, "upgrade-needed"),
    ];
    for (number, (reply, status, code)) in cases.iter().enumerate() {
        assert_eq!(reply.error(), (*status, (*code).to_owned()), "case {number}: {}", reply.body);
    }
    assert_eq!(server.core.machines.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn who_may_only_look_is_refused_before_anything_happens() {
    let routes = [
        ("GET /v1/version", false),
        ("GET /v1/host", false),
        ("GET /v1/machines/web/forecast", false),
        ("GET /v1/machines/web/why", false),
        ("PATCH /v1/machines/web/foresight", true),
        ("GET /v1/machines", false),
        ("GET /v1/machines/web", false),
        ("GET /v1/machines/web/logs", false),
        ("GET /v1/images", false),
        ("GET /v1/peers", false),
        ("GET /v1/doctor", false),
        ("GET /v1/openapi.json", false),
        ("GET /metrics", false),
        ("POST /v1/machines", true),
        ("PATCH /v1/machines/web", true),
        ("PUT /v1/machines/web/forecast/blueprint", true),
        ("DELETE /v1/machines/web/forecast/blueprint", true),
        ("PUT /v1/machines/web/forecast/events/sale", true),
        ("DELETE /v1/machines/web/forecast/events/sale", true),
        ("DELETE /v1/machines/web?force=true", true),
        ("POST /v1/machines/web/stop", true),
        ("POST /v1/machines/web/start", true),
        ("POST /v1/machines/web/pause", true),
        ("POST /v1/machines/web/resume", true),
        ("POST /v1/machines/web/exec", true),
        ("POST /v1/machines/web/console", true),
        ("PUT /v1/images/a", true),
        ("DELETE /v1/images/a", true),
        ("PUT /v1/uploads", true),
        ("DELETE /v1/uploads/0a", true),
        ("POST /v1/cluster/init", true),
        ("POST /v1/cluster/token", true),
        ("POST /v1/cluster/join", true),
    ];
    let (viewer, stranger, member) = (serve(As::Viewer), serve(As::Stranger), serve(As::Member));
    for (line, change) in routes {
        assert_eq!(
            stranger.ask(line, "", b"").await.error(),
            (403, "not-permitted".into()),
            "a stranger: {line}"
        );
        let reply = viewer.ask(line, "", b"").await;
        assert_eq!(reply.status == 403, change, "a viewer: {line}: {}", reply.body);
        if change {
            let body: ErrorBody = serde_json::from_str(&reply.body).unwrap();
            assert_eq!(body.error.fix, "sudo usermod -aG lathe tester");
        } else {
            assert_eq!(reply.status, 200, "{line}: {}", reply.body);
        }
        assert_ne!(member.ask(line, "", b"").await.status, 403, "a member: {line}");
    }
    assert_eq!(viewer.core.machines.lock().unwrap()["web"].state, MachineState::Running);
}

#[tokio::test]
async fn images_come_and_go() {
    let server = serve(As::Member);
    let disk = vec![7; 100_000];
    let made = server.ask("PUT /v1/images/debian-12", "", &disk).await;
    assert_eq!((made.status, &made.json()["size_bytes"]), (200, &json!(100_352)), "{}", made.body);
    assert_eq!(server.ask("PUT /v1/images/debian-12", "", &disk).await.error(), (409, "image-exists".into()));
    assert_eq!(
        server.ask("PUT /v1/images/q", "", &b"QFI\xfb".repeat(300)).await.error(),
        (400, "image-format".into())
    );
    assert_eq!(server.ask("PUT /v1/images/q?format=iso", "", &disk).await.error().0, 400);
    assert_eq!(server.get("/v1/images").await.json()["images"][0]["name"], "debian-12");
    assert_eq!(server.ask("DELETE /v1/images/debian-12", "", b"").await.status, 200);
    assert_eq!(
        server.ask("DELETE /v1/images/debian-12", "", b"").await.error(),
        (404, "no-such-image".into())
    );
}

#[tokio::test]
async fn an_upload_lies_under_its_id() {
    let server = serve(As::Member);
    let made = server.ask("PUT /v1/uploads", "", b"kernel").await;
    let upload: Upload = serde_json::from_str(&made.body).unwrap();
    assert_eq!(upload.size_bytes, 6);
    assert_eq!(std::fs::read(server.dir.path().join("uploads").join(&upload.id)).unwrap(), b"kernel");
    assert_eq!(server.ask(&format!("DELETE /v1/uploads/{}", upload.id), "", b"").await.status, 200);
    for id in [upload.id.as_str(), "..%2Fuploads"] {
        let again = server.ask(&format!("DELETE /v1/uploads/{id}"), "", b"").await;
        assert_eq!(again.error(), (404, "no-such-upload".into()), "{id}");
    }
    assert_eq!(std::fs::read_dir(server.dir.path().join("uploads")).unwrap().count(), 0);
    let head = "content-type: application/octet-stream\r\nexpect: 100-continue\r\n";
    let mut stream = server.connect().await;
    let too_much = format!(
        "PUT /v1/uploads HTTP/1.1\r\nhost: l\r\nconnection: close\r\n{head}content-length: {}\r\n\r\n",
        u64::MAX / 2
    );
    stream.write_all(too_much.as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, b"disk-full").await;
    assert!(answer.starts_with("HTTP/1.1 422"), "{answer}");
}

/// Reads until `end` has come.
async fn read_until(stream: &mut UnixStream, end: &[u8]) -> String {
    let mut read = Vec::new();
    let wait = async {
        while !read.windows(end.len()).any(|window| window == end) {
            let mut chunk = [0; 1024];
            let count = stream.read(&mut chunk).await.unwrap();
            assert_ne!(count, 0, "ended early: {}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("in time");
    String::from_utf8_lossy(&read).into_owned()
}

async fn upgraded(server: &Server, path: &str, protocol: &str) -> UnixStream {
    let mut stream = server.connect().await;
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: l\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    stream
}

#[tokio::test]
async fn exec_carries_bytes_both_ways_and_each_end_of_file() {
    let server = serve(As::Member);
    let mut client = upgraded(&server, "/v1/machines/web/exec", "lathe-guest").await;
    let mut guest = server.core.guest.lock().unwrap().take().unwrap();
    client.write_all(b"request").await.unwrap();
    client.shutdown().await.unwrap();
    let mut at_guest = String::new();
    guest.read_to_string(&mut at_guest).await.unwrap();
    guest.write_all(b"answer").await.unwrap();
    drop(guest);
    let mut at_client = String::new();
    client.read_to_string(&mut at_client).await.unwrap();
    assert_eq!((at_guest.as_str(), at_client.as_str()), ("request", "answer"));
}

#[tokio::test]
async fn the_console_shows_what_was_and_what_comes_and_takes_what_is_typed() {
    let server = serve(As::Member);
    let mut client = upgraded(&server, "/v1/machines/web/console", "lathe-console").await;
    assert_eq!(read_until(&mut client, b"login: ").await, "login: ");
    client.write_all(b"root\n").await.unwrap();
    let mut typed = server.core.typed.lock().unwrap().take().unwrap();
    assert_eq!(typed.recv().await.unwrap(), b"root\n");
    server.core.output.send(b"Password: ".to_vec()).unwrap();
    assert_eq!(read_until(&mut client, b"Password: ").await, "Password: ");
}

#[tokio::test]
async fn streams_are_bounded() {
    let server = serve(As::Member);
    let one = upgraded(&server, "/v1/machines/web/exec", "lathe-guest").await;
    let _two = upgraded(&server, "/v1/machines/web/exec", "lathe-guest").await;
    let extra = "upgrade: lathe-guest\r\nconnection: upgrade\r\n";
    assert_eq!(
        server.ask("POST /v1/machines/web/exec", extra, b"").await.error(),
        (503, "too-many-streams".into())
    );
    drop(one);
    server.core.guest.lock().unwrap().take();
    let freed = async {
        while server.app.streams.available_permits() == 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.expect("a place is free again");
}

#[tokio::test]
async fn events_and_followed_logs_go_on_until_the_client_leaves() {
    let server = serve(As::Viewer);
    let mut events = server.connect().await;
    events.write_all(b"GET /v1/events HTTP/1.1\r\nhost: l\r\n\r\n").await.unwrap();
    read_until(&mut events, b":\n\n").await;
    let event = EventView {
        schema: SCHEMA,
        kind: "machine-stopped".into(),
        name: "web".into(),
        message: "web powered off".into(),
    };
    server.core.events.send(event).unwrap();
    let text = read_until(&mut events, b"powered off").await;
    assert!(text.contains("event: machine-stopped\ndata: {"), "{text}");
    let mut logs = server.connect().await;
    logs.write_all(b"GET /v1/machines/web/logs?follow=true HTTP/1.1\r\nhost: l\r\n\r\n").await.unwrap();
    read_until(&mut logs, b"line 2").await;
    server.core.output.send(b"line 3".to_vec()).unwrap();
    read_until(&mut logs, b"line 3").await;
}

#[tokio::test]
async fn stopping_lets_the_socket_go() {
    let server = serve(As::Owner);
    let mut idle = server.connect().await;
    idle.write_all(b"GET /v1/version HTTP/1.1\r\nhost: l\r\n\r\n").await.unwrap();
    read_until(&mut idle, b"}").await;
    server.stop.send(true).unwrap();
    tokio::time::timeout(PATIENCE, server.task).await.expect("in time").unwrap();
    assert!(UnixStream::connect(&server.socket).await.is_err());
}

#[tokio::test]
async fn disks_come_grow_and_go() {
    let server = serve(As::Owner);
    let made = server.send("POST /v1/machines/web/disks", &json!({ "size_bytes": 1 << 30 })).await;
    assert!(made.status == 201 && made.body.contains("\"data1\""), "{}", made.body);
    let plan = server.send("POST /v1/machines/web/disks?plan=true", &json!({ "size_bytes": 1 << 30 })).await;
    assert!(plan.status == 200 && plan.body.contains("host_after"), "{}", plan.body);
    let grown =
        server.send("PATCH /v1/machines/web/disks/data1", &json!({ "size_bytes": 2_u64 << 30 })).await;
    assert!(grown.status == 200 && grown.body.contains("2147483648"), "{}", grown.body);
    let kept = server.ask("DELETE /v1/machines/web/disks/data1", "", b"").await;
    assert!(kept.status == 200 && kept.body.contains("kept/web-5"), "{}", kept.body);
    let purged = server.ask("DELETE /v1/machines/web/disks/data1?purge=true&timeout_sec=5", "", b"").await;
    assert!(purged.status == 200 && purged.body.contains("null"), "{}", purged.body);
    assert_eq!(server.get("/v1/machines/web/disks").await.status, 200);
    assert_eq!(server.get("/v1/machines/none/disks").await.status, 404);
    let typo = server.send("POST /v1/machines/web/disks", &json!({ "size": 5 })).await;
    assert!(typo.status == 400 && typo.body.contains("unknown-field"), "{}", typo.body);
    let viewer = serve(As::Viewer);
    assert_eq!(viewer.ask("DELETE /v1/machines/web/disks/data1", "", b"").await.status, 403);
    assert_eq!(viewer.get("/v1/machines/web/disks").await.status, 200);
}

#[tokio::test]
async fn nics_come_change_and_go() {
    let server = serve(As::Owner);
    let made = server.send("POST /v1/machines/web/nics", &json!({ "bit_per_sec": 20_000_000 })).await;
    assert!(made.status == 201 && made.body.contains("\"net1\""), "{}", made.body);
    let plan = server.send("POST /v1/machines/web/nics?plan=true", &json!({})).await;
    assert!(plan.status == 200 && plan.body.contains("host_after"), "{}", plan.body);
    let limited = server.send("PATCH /v1/machines/web/nics/net1", &json!({ "bit_per_sec": 5000 })).await;
    assert!(limited.status == 200 && limited.body.contains("5000"), "{}", limited.body);
    let removed = server.ask("DELETE /v1/machines/web/nics/net1?timeout_sec=5", "", b"").await;
    assert!(removed.status == 200 && removed.body.contains("net1"), "{}", removed.body);
    assert_eq!(server.ask("DELETE /v1/machines/web/nics/net1?purge=true", "", b"").await.status, 400);
    assert_eq!(server.get("/v1/machines/web/nics").await.status, 200);
    assert_eq!(server.get("/v1/machines/none/nics").await.status, 404);
    let typo = server.send("POST /v1/machines/web/nics", &json!({ "rate": 5 })).await;
    assert!(typo.status == 400 && typo.body.contains("unknown-field"), "{}", typo.body);
    let viewer = serve(As::Viewer);
    assert_eq!(viewer.send("POST /v1/machines/web/nics", &json!({})).await.status, 403);
    assert_eq!(viewer.get("/v1/machines/web/nics").await.status, 200);
}

#[tokio::test]
async fn the_uplink_is_shared_and_put_back() {
    let server = serve(As::Owner);
    let shown = server.get("/v1/host/uplink").await;
    assert!(shown.status == 200 && shown.json()["machines"][0]["machine"] == "web", "{}", shown.body);
    let request = json!({ "device": "up0", "capacity_bit_per_sec": 5_000_000 });
    let enabled = server.send("PUT /v1/host/uplink", &request).await;
    assert!(enabled.status == 200 && enabled.json()["device"] == "up0", "{}", enabled.body);
    let plan = server.send("PUT /v1/host/uplink?plan=true", &json!({})).await;
    assert!(plan.status == 200 && plan.body.contains("host_after"), "{}", plan.body);
    let disabled = server.ask("DELETE /v1/host/uplink", "", b"").await;
    assert!(disabled.status == 200 && disabled.json()["enabled"] == false, "{}", disabled.body);
    let typo = server.send("PUT /v1/host/uplink", &json!({ "rate": 5 })).await;
    assert!(typo.status == 400 && typo.body.contains("unknown-field"), "{}", typo.body);
    for who in [As::Member, As::Viewer] {
        let other = serve(who);
        assert_eq!(other.send("PUT /v1/host/uplink", &json!({})).await.status, 403);
        assert_eq!(other.ask("DELETE /v1/host/uplink", "", b"").await.status, 403);
        assert_eq!(other.get("/v1/host/uplink").await.status, 200);
        // By no other name either: only what a path is written as leads to it.
        for alias in [
            "/v1/host/%75plink",
            "/v1/host/uplink/",
            "/v1//host/uplink",
            "/v1/host/./uplink",
            "/V1/host/uplink",
        ] {
            let refused = other.send(&format!("PUT {alias}"), &request).await.status;
            assert!([403, 404].contains(&refused), "{alias}: {refused}");
        }
        for method in ["POST", "PATCH"] {
            let refused = other.send(&format!("{method} /v1/host/uplink"), &request).await.status;
            assert_eq!(refused, 403, "{method}");
        }
    }
}

/// `LATHE_BLESS=1` writes the golden files anew.
fn golden(name: &str, value: &impl serde::Serialize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = serde_json::to_string_pretty(value).unwrap() + "\n";
    if std::env::var_os("LATHE_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        text,
        "{} is what others rely on: fields are only ever added",
        path.display()
    );
}

#[test]
fn the_black_box_is_stable() {
    let machine = fake::machine("web");
    golden("host.json", &fake::host());
    golden("machine.json", &machine);
    golden("machines.json", &MachineList { schema: SCHEMA, machines: vec![machine.clone()] });
    golden("resize.json", &fake::resized(&machine, ResizeOutcome::Applied));
    golden("peers.json", &fake::peers());
    golden("uplink.json", &fake::uplink());
    golden("why.json", &fake::why("web"));
    let problem = crate::problem::Problem::new(
        crate::problem::Kind::Impossible,
        "cpu-over-capacity",
        "web cannot have 9.00 cpu",
    );
    golden("error.json", &ErrorBody { error: problem.fix("lathe resize web --cpu 2").view() });
}
