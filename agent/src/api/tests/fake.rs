//! A lathed without machines: [`FakeCore`] keeps views in memory and remembers what it was told.

use std::collections::BTreeMap;
use std::sync::Mutex;

use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc};

use super::super::access::{Access, Accounts};
use super::super::core::{Cluster, Console, Core, Doctor, Later, Reply};
use super::super::wire::by_hand::{
    AnnounceRequest, AnnouncedView, BlueprintRequest, BlueprintStep, ByHandView, ForecastOf, Raise, RaiseView,
};
use super::super::wire::forecast::{AheadView, CycleView, ForecastResource, ForecastView, RingView};
use super::super::wire::foresight::*;
use super::super::wire::inside::{ApplicationView, GoalView, InsideView, WantedView};
use super::super::wire::*;
use crate::machines::enforced::{Limit, Took};
use crate::machines::{DiskChange, DiskChanged, NicChange, NicChanged, SculptCounts};
use crate::problem::{Kind, Problem};

pub fn amounts(desired: u64) -> Amounts {
    Amounts { desired, granted: desired, actual: desired, used: desired / 2 }
}

pub fn machine(name: &str) -> MachineView {
    MachineView {
        schema: SCHEMA,
        name: name.to_owned(),
        state: MachineState::Running,
        revision: 1,
        cpu: amounts(500),
        memory: amounts(512 << 20),
        net: amounts(40_000_000),
        iops: Amounts::default(),
        tier: Tier::Standard,
        cpus: CpusView {
            wanted: Some("0-7".to_owned()),
            actual: Some("0-7".to_owned()),
            ..CpusView::default()
        },
        tier_actual: Some(Tier::Standard),
        vcpus: 1,
        addresses: vec!["10.77.0.2/16".to_owned()],
        mac: "52:54:00:12:34:56".to_owned(),
        source: "built-in guest, kernel 6.1.0-37-amd64".to_owned(),
        guest_agent: true,
        restart: RestartPolicy::No,
        on_panic: OnTrouble::Report,
        watchdog: None,
        autostart: false,
        unit: format!("lathe-vm@{name}.service"),
        pid: Some(4242),
        uptime_sec: Some(60),
        restarts: 0,
        reason: String::new(),
        cpu_throttled_usec: 1000,
        cpu_usage_usec: 2_000_000,
        disk_operations: 70,
        disk_read_bytes: 4096,
        disk_written_bytes: 8192,
        net_rx_bytes: 3000,
        net_tx_bytes: 4000,
        cpu_max_milli: None,
        memory_max_bytes: None,
        cpu_min_milli: None,
        memory_min_bytes: None,
        foresight: ForesightView {
            mode: ForesightMode::Observe,
            aggressiveness_permille: 500,
            ..ForesightView::default()
        },
        operation: None,
        back_unix_msec: None,
        delivered: delivered(),
        stalls: Stalls { memory_centipercent: Some(12), ..Stalls::default() },
        wanted: Vec::new(),
    }
}

fn delivered() -> Delivered {
    let share = |window_msec, asked, delivered, permille| DeliveredShare {
        measured_msec: window_msec,
        asked,
        delivered,
        permille,
    };
    Delivered {
        cpu: Some(DeliveredWindows {
            sec_1: share(1000, 500, 500, Some(1000)),
            sec_10: share(10_000, 500, 499, Some(998)),
            sec_60: share(42_000, 480, 479, Some(998)),
        }),
        net_to_guest: Some(DeliveredWindows {
            sec_1: share(1000, 0, 0, None),
            sec_10: share(10_000, 20_000_000, 20_000_000, Some(1000)),
            sec_60: share(42_000, 4_700_000, 4_700_000, Some(1000)),
        }),
        net_from_guest: None,
    }
}

/// Forty minutes of a load that came after half of them, with a gap, and memory that grows; 2026-11-22 17:05:50.
pub fn forecast(name: &str) -> ForecastView {
    let now_unix_sec = 1_795_367_150;
    let minute = now_unix_sec / 60;
    let resource = |resource: &str, granted: u64, amounts: Vec<Option<u64>>, p50: u64, p95: u64| {
        let ring = |step_sec: u64, newest: u64, mean: Vec<Option<u64>>, max| {
            let from_unix_sec = (newest + 1).saturating_sub(mean.len() as u64) * step_sec;
            RingView { step_sec, from_unix_sec, mean, max }
        };
        let ahead = |step: u64| AheadView {
            from_unix_sec: (minute + step) * 60,
            until_unix_sec: (minute + step + 1) * 60,
            p50,
            p95: p95 + p95 / 20 * step,
            p99: p95 * 2,
            by_hand: step > 3,
        };
        ForecastResource {
            resource: resource.to_owned(),
            granted,
            now: amounts.last().copied().flatten(),
            of: if resource == "memory" { "max" } else { "mean" }.to_owned(),
            measured_min: amounts.iter().flatten().count() as u64,
            confidence_permille: Some(290),
            judged: 36,
            held: 34,
            ahead: (0..6).map(ahead).collect(),
            cycle: (resource == "cpu").then(|| CycleView {
                period_sec: 240,
                cycles: 3,
                from_unix_sec: now_unix_sec - 10,
                step_sec: 10,
                ahead: (0..24).map(|step| if (9..14).contains(&step) { 470 } else { 60 }).collect(),
            }),
            seconds: ring(1, now_unix_sec - 1, amounts.clone(), Vec::new()),
            minutes: ring(60, minute - 1, amounts.clone(), amounts.clone()),
            hours: ring(3600, now_unix_sec / 3600 - 1, amounts[..3].to_vec(), amounts[..3].to_vec()),
        }
    };
    let minutes = |of: fn(u64) -> u64| (0..40).map(|at| (at / 2 != 6).then(|| of(at))).collect();
    ForecastView {
        schema: SCHEMA,
        name: name.to_owned(),
        mode: "observe".to_owned(),
        now_unix_sec,
        resources: vec![
            resource(
                "cpu",
                500,
                minutes(|at| if at < 20 { 40 + at % 3 * 15 } else { 300 + at % 5 * 22 }),
                330,
                420,
            ),
            resource("memory", 512 << 20, minutes(|at| (96 + at * 6) << 20), 340 << 20, 372 << 20),
            resource("net", 0, minutes(|at| at % 7 * 1_300_000), 3_000_000, 8_000_000),
        ],
        wanted: vec![WantedView {
            resource: "cpu".to_owned(),
            amount: 1500,
            source: "inside".to_owned(),
            left_sec: Some(540),
        }],
        by_hand: by_hand(),
        inside: Some(inside()),
    }
}

pub fn by_hand() -> ByHandView {
    let raise = |resource, raise| RaiseView { resource, raise };
    let event = |name: &str, daily, from_sec, raises, next_unix_sec, now| AnnouncedView {
        name: name.to_owned(),
        daily,
        from_sec,
        for_sec: 7200,
        raises,
        next_unix_sec,
        now,
    };
    let doubled = vec![
        raise(ForecastOf::Cpu, Raise::UpCentipercent(10_000)),
        raise(ForecastOf::Memory, Raise::Up(256 << 20)),
    ];
    ByHandView {
        confidence_permille: 900,
        steps: vec![BlueprintStep {
            resource: ForecastOf::Memory,
            daily: true,
            from_sec: 8 * 3600,
            for_sec: 10 * 3600,
            p50: 256 << 20,
            p95: 512 << 20,
            p99: 512 << 20,
        }],
        events: vec![
            event("backup", true, 3 * 3600, Vec::new(), Some(1_795_402_800), false),
            event("sale", false, 1_795_366_800, doubled, Some(1_795_366_800), true),
        ],
    }
}

fn inside() -> InsideView {
    let application = |name: &str, cpu_milli, memory_bytes| ApplicationView {
        name: name.to_owned(),
        cpu_milli,
        memory_bytes,
        anon_bytes: memory_bytes / 2,
        file_bytes: memory_bytes / 2,
        working_set_bytes: memory_bytes / 4 * 3,
        read_bytes_per_sec: 4096,
        written_bytes_per_sec: 1 << 20,
        operations_per_sec: Some(70),
        cpu_some_permille: Some(35),
        memory_some_permille: Some(0),
        io_some_permille: None,
    };
    InsideView {
        age_msec: 400,
        kind: "units".to_owned(),
        cpu_some_permille: Some(41),
        memory_some_permille: Some(0),
        io_some_permille: None,
        swap_used_bytes: 0,
        net_rx_bit_per_sec: 120_000,
        net_tx_bit_per_sec: 5_000_000,
        applications: vec![
            application("nginx.service", 310, 64 << 20),
            application("cron.service", 0, 2 << 20),
        ],
        others: Some(application("", 12, 40 << 20)),
        others_count: 7,
        goals: vec![GoalView {
            name: "web".to_owned(),
            kind: "latency".to_owned(),
            permille: Some(950),
            under_usec: Some(20_000),
            over_msec: 10_000,
            latency_usec: Some(31_400),
            rate_milli: Some(412_300),
            wrong: String::new(),
            stands: "trying".to_owned(),
            cpu_milli: Some(750),
            memory_bytes: None,
        }],
    }
}

fn grown(name: &str) -> DecisionView {
    DecisionView {
        at_unix_msec: 1_795_367_120_000,
        until_unix_msec: 1_795_367_120_000,
        times: 1,
        resource: "cpu".to_owned(),
        from: 300,
        to: 500,
        cause: "reached".to_owned(),
        why: "it asked for 0.30 cpu of 0.30".to_owned(),
        demand: Some(300),
        recent: Some(300),
        p50: Some(120),
        p95: Some(280),
        p99: Some(410),
        ahead_sec: 360,
        confidence_permille: Some(290),
        forecast_counts: false,
        cycle_sec: None,
        cycles: None,
        changes_a_day: 2,
        options: vec![
            OptionView {
                amount: 500,
                over_sec: 3600,
                unserved: 40,
                slack: 200,
                change: 20,
                total: 260,
                rejected: None,
            },
            OptionView {
                amount: 300,
                over_sec: 3600,
                unserved: 900,
                slack: 0,
                change: 0,
                total: 900,
                rejected: Some("it would be short".to_owned()),
            },
        ],
        outcome: "applied".to_owned(),
        reason: String::new(),
        operation: Some(format!("{name}-7")),
    }
}

fn shrunk(name: &str) -> DecisionView {
    DecisionView {
        at_unix_msec: 1_795_366_000_000,
        until_unix_msec: 1_795_367_100_000,
        times: 220,
        resource: "memory".to_owned(),
        from: 512 << 20,
        to: 256 << 20,
        cause: "idle".to_owned(),
        why: "no more than 198 MiB is likely to be asked for".to_owned(),
        demand: Some(180 << 20),
        recent: Some(181 << 20),
        options: Vec::new(),
        outcome: "observed".to_owned(),
        operation: None,
        p50: None,
        p95: None,
        p99: None,
        confidence_permille: None,
        ..grown(name)
    }
}

/// A growth that was carried out, a shrinking that was only observed.
pub fn why(name: &str) -> WhyView {
    let quality = QualityView {
        resource: "cpu".to_owned(),
        judged: 1000,
        held: 947,
        measured_sec: 7200,
        granted: 400,
        asked: 250,
        slack_permille: 380,
        shortfall_permille: 4,
        short_sec: 12,
    };
    WhyView {
        schema: SCHEMA,
        name: name.to_owned(),
        foresight: ForesightView {
            mode: ForesightMode::On,
            aggressiveness_permille: 500,
            own_mode: Some(ForesightMode::On),
            own_aggressiveness_permille: None,
        },
        now_unix_sec: 1_795_367_150,
        now: "it is looked at every 5 s".to_owned(),
        since_unix_sec: 1_795_360_000,
        decisions: vec![grown(name), shrunk(name)],
        weighings: vec![WeighingView {
            resource: "cpu".to_owned(),
            granted: 500,
            amount: 500,
            need: 300,
            ..WeighingView::default()
        }],
        quality: vec![quality],
    }
}

pub fn uplink() -> UplinkView {
    let share = |rate_bit_per_sec| UplinkShare {
        rate_bit_per_sec,
        ceil_bit_per_sec: 960_000_000,
        sent_bytes: 3 << 20,
        dropped_packets: 2,
        backlog_bytes: 1514,
    };
    UplinkView {
        schema: SCHEMA,
        enabled: true,
        device: "eth0".to_owned(),
        capacity_bit_per_sec: 1_000_000_000,
        reserved_bit_per_sec: 50_000_000,
        granted_bit_per_sec: 40_000_000,
        before: "mq 1:".to_owned(),
        problem: String::new(),
        fix: String::new(),
        host: Some(UplinkShare { ceil_bit_per_sec: 1_000_000_000, ..share(40_000_000) }),
        machines: vec![UplinkMachine {
            machine: "web".to_owned(),
            share: Some(share(40_000_000)),
            problem: String::new(),
        }],
    }
}

pub fn host() -> HostView {
    let amounts = |capacity: u64| HostAmounts {
        capacity,
        reserved: capacity / 16,
        granted: capacity / 2,
        promised: capacity / 2,
        used: capacity / 4,
        free: capacity - capacity / 16 - capacity / 2,
    };
    HostView {
        schema: SCHEMA,
        name: "web-03".to_owned(),
        state: "healthy".to_owned(),
        revision: 7,
        version: "0.1.0".to_owned(),
        uptime_sec: 120,
        resources: HostResources {
            cpu: amounts(8000),
            memory: amounts(32 << 30),
            disk: amounts(1 << 40),
            net: Some(amounts(1_000_000_000)),
        },
        machines: 1,
        peers_alive: 0,
        launcher: "systemd".to_owned(),
        psi_cpu_centipercent: Some(40),
        psi_memory_centipercent: Some(0),
        psi_io_centipercent: None,
        worst_delivered: vec![WorstDelivered {
            resource: "cpu".to_owned(),
            machine: "web".to_owned(),
            permille: 998,
        }],
        foresight: ForesightMode::Observe,
        machines_sculpted: 0,
    }
}

pub fn resized(machine: &MachineView, outcome: ResizeOutcome) -> ResizeView {
    ResizeView {
        schema: SCHEMA,
        operation: "op-1".to_owned(),
        outcome,
        reason: String::new(),
        took_usec: 1500,
        name: machine.name.clone(),
        state: machine.state,
        revision: machine.revision,
        cpu: machine.cpu,
        memory: machine.memory,
        net: machine.net,
        iops: machine.iops,
        tier: machine.tier,
        tier_actual: machine.tier_actual,
    }
}

pub fn operation(name: &str) -> OperationView {
    let from = ShapeView {
        cpu_milli: 500,
        memory_bytes: 1 << 30,
        net_bit_per_sec: 0,
        iops: 0,
        tier: Tier::Standard,
    };
    OperationView {
        schema: SCHEMA,
        operation: format!("{name}-1"),
        name: name.to_owned(),
        outcome: ResizeOutcome::UnderWay,
        reason: "384 MiB of the guest's memory is not movable now".to_owned(),
        by: AskedBy::Person,
        background: false,
        began_unix_msec: 1_700_000_000_000,
        deadline_unix_msec: Some(1_700_000_030_000),
        ended_unix_msec: None,
        from,
        to: ShapeView { memory_bytes: 256 << 20, ..from },
    }
}

pub fn nic(machine: &str, name: &str) -> NicView {
    NicView {
        schema: SCHEMA,
        machine: machine.to_owned(),
        name: name.to_owned(),
        state: NicState::Attached,
        mac: "2e:ce:87:e6:69:92".to_owned(),
        addresses: vec!["10.77.0.6/16".to_owned()],
        tap: format!("lt-{machine}_1"),
        bit_per_sec: 20_000_000,
        to_guest_bit_per_sec: Some(20_000_000),
        from_guest_bit_per_sec: Some(20_000_000),
        rx_bytes: 1,
        tx_bytes: 2,
        configured: true,
        reason: String::new(),
    }
}

pub fn disk(machine: &str, name: &str) -> DiskView {
    DiskView {
        schema: SCHEMA,
        machine: machine.to_owned(),
        name: name.to_owned(),
        size_bytes: Some(10 << 30),
        read_only: false,
        boots: false,
        state: DiskState::Attached,
        source: "empty".to_owned(),
        path: format!("/var/lib/lathe/machines/{machine}/disk-{name}.raw"),
        wall: String::new(),
    }
}

pub fn peers() -> PeerList {
    let resources = host().resources;
    let own = PeerView {
        name: "web-03".to_owned(),
        state: "self".to_owned(),
        address: "10.0.0.13:7946".to_owned(),
        revision: 7,
        heard_msec: None,
        rtt_usec: None,
        version: "0.1.0".to_owned(),
        cpu: resources.cpu,
        memory: resources.memory,
    };
    let other = PeerView {
        name: "build-01".into(),
        state: "alive".into(),
        heard_msec: Some(600),
        rtt_usec: Some(400),
        ..own.clone()
    };
    PeerList { schema: SCHEMA, cluster: "garage".to_owned(), peers: vec![own, other] }
}

pub struct FakeCore {
    pub machines: Mutex<BTreeMap<String, MachineView>>,
    pub events: broadcast::Sender<EventView>,
    pub output: broadcast::Sender<Vec<u8>>,
    pub typed: Mutex<Option<mpsc::Receiver<Vec<u8>>>>,
    /// The far end of the last guest stream.
    pub guest: Mutex<Option<UnixStream>>,
}

impl Default for FakeCore {
    fn default() -> Self {
        let machines = Mutex::new(BTreeMap::from([("web".to_owned(), machine("web"))]));
        let (events, output) = (broadcast::channel(4).0, broadcast::channel(4).0);
        Self { machines, events, output, typed: Mutex::default(), guest: Mutex::default() }
    }
}

impl FakeCore {
    fn find(&self, name: &str) -> Result<MachineView, Problem> {
        let missing =
            || Problem::new(Kind::NotFound, "no-such-machine", format!("there is no machine {name}"));
        self.machines.lock().unwrap().get(name).cloned().ok_or_else(missing)
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut MachineView)) -> Result<MachineView, Problem> {
        let mut view = self.find(name)?;
        change(&mut view);
        self.machines.lock().unwrap().insert(name.to_owned(), view.clone());
        Ok(view)
    }

    fn plan(&self, name: &str, revision: u64) -> PlanView {
        let steps =
            vec![PlanStep { resource: "cpu".into(), from: 500, to: 1500, how: "quota of 1 vCPU".into() }];
        PlanView { schema: SCHEMA, name: name.to_owned(), revision, steps, host_after: host().resources }
    }
}

impl Core for FakeCore {
    fn list(&self) -> Later<'_, Vec<MachineView>> {
        Box::pin(async { self.machines.lock().unwrap().values().cloned().collect() })
    }

    fn show<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(async { self.find(name) })
    }

    fn run(&self, request: RunRequest) -> Reply<'_, MachineView> {
        Box::pin(async move {
            if self.find(&request.name).is_ok() {
                return Err(Problem::new(
                    Kind::Conflict,
                    "name-taken",
                    format!("there is a machine {} already", request.name),
                ));
            }
            let view = MachineView { cpu: amounts(request.cpu_milli), ..machine(&request.name) };
            self.machines.lock().unwrap().insert(request.name, view.clone());
            Ok(view)
        })
    }

    fn plan_run<'a>(&'a self, request: &'a RunRequest) -> Reply<'a, PlanView> {
        Box::pin(async { Ok(self.plan(&request.name, 0)) })
    }

    fn resize<'a>(
        &'a self,
        name: &'a str,
        request: ResizeRequest,
        if_revision: Option<u64>,
    ) -> Reply<'a, ResizeView> {
        Box::pin(async move {
            let now = self.find(name)?.revision;
            if if_revision.is_some_and(|wanted| wanted != now) {
                return Err(Problem::new(Kind::Conflict, "revision", format!("{name} is at revision {now}")));
            }
            let view = self.change(name, |view| {
                view.revision += 1;
                view.cpu = request.cpu_milli.map_or(view.cpu, amounts);
            })?;
            let outcome =
                if request.memory_bytes.is_some() { ResizeOutcome::Partial } else { ResizeOutcome::Applied };
            Ok(resized(&view, outcome))
        })
    }

    fn plan_resize<'a>(&'a self, name: &'a str, _: &'a ResizeRequest, _: Option<u64>) -> Reply<'a, PlanView> {
        Box::pin(async { Ok(self.plan(name, self.find(name)?.revision)) })
    }

    fn forecast<'a>(&'a self, name: &'a str) -> Reply<'a, ForecastView> {
        Box::pin(async { self.find(name).map(|view| forecast(&view.name)) })
    }

    fn set_foresight<'a>(&'a self, name: &'a str, request: ForesightRequest) -> Reply<'a, MachineView> {
        Box::pin(async move {
            self.change(name, |view| {
                view.foresight.own_aggressiveness_permille = request.aggressiveness_permille;
            })
        })
    }

    fn why<'a>(&'a self, name: &'a str) -> Reply<'a, WhyView> {
        Box::pin(async { self.find(name).map(|view| why(&view.name)) })
    }

    fn sculpted(&self) -> SculptCounts {
        SculptCounts::default()
    }

    fn set_blueprint<'a>(&'a self, name: &'a str, _: BlueprintRequest) -> Reply<'a, ByHandView> {
        Box::pin(async { self.find(name).map(|_| by_hand()) })
    }

    fn unset_blueprint<'a>(&'a self, name: &'a str) -> Reply<'a, ByHandView> {
        Box::pin(async { self.find(name).map(|_| by_hand()) })
    }

    fn announce<'a>(&'a self, name: &'a str, _: String, _: AnnounceRequest) -> Reply<'a, ByHandView> {
        Box::pin(async { self.find(name).map(|_| by_hand()) })
    }

    fn withdraw<'a>(&'a self, name: &'a str, _: &'a str) -> Reply<'a, ByHandView> {
        Box::pin(async { self.find(name).map(|_| by_hand()) })
    }

    fn operations<'a>(&'a self, name: &'a str) -> Reply<'a, OperationList> {
        Box::pin(async {
            self.find(name)?;
            Ok(OperationList { schema: SCHEMA, operations: vec![operation(name)] })
        })
    }

    fn operation<'a>(&'a self, id: &'a str) -> Reply<'a, OperationView> {
        Box::pin(async move {
            let known = id == "web-1";
            let missing =
                || Problem::new(Kind::NotFound, "no-such-operation", format!("there is no operation {id}"));
            known.then(|| operation("web")).ok_or_else(missing)
        })
    }

    fn cancel<'a>(&'a self, id: &'a str) -> Reply<'a, OperationView> {
        Box::pin(async { Ok(OperationView { outcome: ResizeOutcome::Failed, ..self.operation(id).await? }) })
    }

    fn stop<'a>(&'a self, name: &'a str, _: StopRequest) -> Reply<'a, MachineView> {
        Box::pin(async { self.change(name, |view| view.state = MachineState::Stopped) })
    }

    fn start<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(async { self.change(name, |view| view.state = MachineState::Running) })
    }

    fn pause<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(async { self.change(name, |view| view.state = MachineState::Paused) })
    }

    fn resume<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(async { self.change(name, |view| view.state = MachineState::Running) })
    }

    fn remove<'a>(&'a self, name: &'a str, purge: bool, force: bool) -> Reply<'a, Removed> {
        Box::pin(async move {
            if self.find(name)?.state == MachineState::Running && !force {
                return Err(Problem::new(Kind::Conflict, "machine-running", format!("{name} runs")));
            }
            self.machines.lock().unwrap().remove(name);
            let kept = (!purge).then(|| format!("/var/lib/lathe/kept/{name}"));
            Ok(Removed { schema: SCHEMA, name: name.to_owned(), kept })
        })
    }

    fn disks<'a>(&'a self, name: &'a str) -> Reply<'a, DiskList> {
        Box::pin(async {
            self.find(name)?;
            Ok(DiskList { schema: SCHEMA, disks: vec![disk(name, "data1")] })
        })
    }

    fn change_disk<'a>(&'a self, name: &'a str, change: DiskChange) -> Reply<'a, DiskChanged> {
        Box::pin(async move {
            self.find(name)?;
            Ok(match change {
                DiskChange::Add(request) => {
                    DiskChanged::Disk(disk(name, request.name.as_deref().unwrap_or("data1")))
                }
                DiskChange::Grow { disk: grown, size_bytes } => {
                    DiskChanged::Disk(DiskView { size_bytes: Some(size_bytes), ..disk(name, &grown) })
                }
                DiskChange::Remove { disk, purge, .. } => {
                    let kept = (!purge).then(|| format!("/var/lib/lathe/kept/{name}-5/disk-{disk}.raw"));
                    DiskChanged::Removed(Removed { schema: SCHEMA, name: disk, kept })
                }
            })
        })
    }

    fn plan_disk<'a>(&'a self, name: &'a str, _: &'a DiskChange) -> Reply<'a, PlanView> {
        Box::pin(async { Ok(self.plan(name, self.find(name)?.revision)) })
    }

    fn nics<'a>(&'a self, name: &'a str) -> Reply<'a, NicList> {
        Box::pin(async {
            self.find(name)?;
            Ok(NicList { schema: SCHEMA, nics: vec![nic(name, "net1")] })
        })
    }

    fn change_nic<'a>(&'a self, name: &'a str, change: NicChange) -> Reply<'a, NicChanged> {
        Box::pin(async move {
            self.find(name)?;
            Ok(match change {
                NicChange::Add(request) => {
                    NicChanged::Nic(nic(name, request.name.as_deref().unwrap_or("net1")))
                }
                NicChange::Limit { nic: limited, bit_per_sec } => {
                    NicChanged::Nic(NicView { bit_per_sec, ..nic(name, &limited) })
                }
                NicChange::Remove { nic, .. } => {
                    NicChanged::Removed(Removed { schema: SCHEMA, name: nic, kept: None })
                }
            })
        })
    }

    fn plan_nic<'a>(&'a self, name: &'a str, _: &'a NicChange) -> Reply<'a, PlanView> {
        Box::pin(async { Ok(self.plan(name, self.find(name)?.revision)) })
    }

    fn guest_stream<'a>(&'a self, name: &'a str) -> Reply<'a, UnixStream> {
        Box::pin(async {
            self.find(name)?;
            let (near, far) = UnixStream::pair().unwrap();
            *self.guest.lock().unwrap() = Some(far);
            Ok(near)
        })
    }

    fn console<'a>(&'a self, name: &'a str) -> Reply<'a, Console> {
        Box::pin(async {
            self.find(name)?;
            let (input, typed) = mpsc::channel(4);
            *self.typed.lock().unwrap() = Some(typed);
            Ok(Console { backlog: b"login: ".to_vec(), output: self.output.subscribe(), input })
        })
    }

    fn logs<'a>(&'a self, name: &'a str, lines: usize) -> Reply<'a, String> {
        Box::pin(async move {
            self.find(name)?;
            Ok((0..lines.min(3)).map(|line| format!("line {line}\n")).collect())
        })
    }

    fn logs_follow<'a>(
        &'a self,
        name: &'a str,
        lines: usize,
    ) -> Reply<'a, (String, broadcast::Receiver<Vec<u8>>)> {
        Box::pin(async move { Ok((self.logs(name, lines).await?, self.output.subscribe())) })
    }

    fn host(&self) -> HostView {
        host()
    }

    fn uplink(&self) -> Later<'_, UplinkView> {
        Box::pin(async { uplink() })
    }

    fn enable_uplink(&self, request: UplinkRequest) -> Reply<'_, UplinkView> {
        Box::pin(async move {
            let capacity_bit_per_sec = request.capacity_bit_per_sec.unwrap_or(1_000_000_000);
            Ok(UplinkView { device: request.device.unwrap_or_default(), capacity_bit_per_sec, ..uplink() })
        })
    }

    fn plan_uplink<'a>(&'a self, _: &'a UplinkRequest) -> Reply<'a, PlanView> {
        Box::pin(async { Ok(self.plan("eth0", 7)) })
    }

    fn enforced(&self) -> Vec<(Limit, Took)> {
        vec![(Limit::Cpu, Took::default())]
    }

    fn disable_uplink(&self) -> Reply<'_, UplinkView> {
        Box::pin(async { Ok(UplinkView { schema: SCHEMA, ..UplinkView::default() }) })
    }

    fn events(&self) -> broadcast::Receiver<EventView> {
        self.events.subscribe()
    }
}

pub struct FakeCluster;

impl Cluster for FakeCluster {
    fn peers(&self) -> Reply<'_, PeerList> {
        Box::pin(async { Ok(peers()) })
    }

    fn alive(&self) -> Later<'_, u64> {
        Box::pin(async { 1 })
    }

    fn init(&self, request: ClusterInit) -> Reply<'_, ClusterView> {
        let view = ClusterView {
            schema: SCHEMA,
            cluster: request.name,
            node: "web-03".into(),
            address: "10.0.0.13:7946".into(),
        };
        Box::pin(async { Ok(view) })
    }

    fn token(&self, ttl_sec: u64) -> Reply<'_, TokenView> {
        Box::pin(async move { Ok(TokenView { schema: SCHEMA, token: "secret".into(), ttl_sec }) })
    }

    fn join(&self, _: JoinRequest) -> Reply<'_, ClusterView> {
        Box::pin(async {
            Err(Problem::new(Kind::NotPermitted, "peer-token-rejected", "the token was refused"))
        })
    }
}

pub struct FakeDoctor;

impl Doctor for FakeDoctor {
    fn examine(&self) -> DoctorReport {
        let check = Check {
            code: "kvm".into(),
            verdict: Verdict::Ok,
            message: "/dev/kvm works".into(),
            fix: String::new(),
        };
        DoctorReport { schema: SCHEMA, checks: vec![check] }
    }
}

/// Says of everybody the same groups.
struct SameFor(Vec<u32>);

impl Accounts for SameFor {
    fn groups_of(&self, _: u32, _: u32) -> Vec<u32> {
        self.0.clone()
    }

    fn group(&self, name: &str) -> Option<u32> {
        Some(if name == "lathe" { 70_050 } else { 70_051 })
    }

    fn user(&self, _: u32) -> Option<String> {
        Some("tester".to_owned())
    }
}

/// Who the tests are for the server.
#[derive(Clone, Copy)]
pub enum As {
    Owner,
    Member,
    Viewer,
    Stranger,
}

/// Rules under which whoever runs the tests, root too, is the one given.
pub fn access(who: As) -> Access {
    let groups = match who {
        As::Member => vec![70_050],
        As::Viewer => vec![70_051],
        As::Owner | As::Stranger => Vec::new(),
    };
    let own = nix::unistd::Uid::effective().as_raw();
    let owners = if matches!(who, As::Owner) { vec![own] } else { Vec::new() };
    Access {
        owners,
        group: "lathe".into(),
        view_group: "lathe-view".into(),
        accounts: Box::new(SameFor(groups)),
    }
}
