//! Monitors as systemd units: `lathe-vm@NAME.socket` and `lathe-vm@NAME.service`, over systemd's D-Bus interface.
//!
//! Only verbs that the polkit rule grants are used: `StartUnit`, `StopUnit`, `ResetFailedUnit` (org.freedesktop.systemd1(5)). A job is
//! followed to its `JobRemoved` signal, to which we subscribe before we start it. Nothing here sets properties: limits are written
//! in the cgroups that the unit delegates.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lathe_cgroup::MachineTree;
use tokio::sync::broadcast;
use zbus::export::ordered_stream::OrderedStreamExt;
use zbus::{ObjectPath, OwnedObjectPath};

use super::{Launched, Launcher, Pending};
use crate::machines::life::{End, EndKind};
use crate::problem::{Kind, Problem};

/// How long systemd may take for one job; the units' own time-outs are shorter.
const JOB_TIMEOUT: Duration = Duration::from_secs(90);
/// Ended jobs that a slow waiter may lag behind.
const JOB_QUEUE: usize = 256;
/// `CLD_EXITED` of waitid(2), as `ExecMainCode` has it.
const CLD_EXITED: i32 = 1;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn subscribe(&self) -> zbus::Result<()>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: ObjectPath<'_>, unit: String, result: String) -> zbus::Result<()>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
trait Unit {
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_state(&self) -> zbus::Result<String>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
trait Service {
    #[zbus(property(emits_changed_signal = "false"), name = "MainPID")]
    fn main_pid(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn control_group(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn exec_main_code(&self) -> zbus::Result<i32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn exec_main_status(&self) -> zbus::Result<i32>;
}

/// Starts monitors as units.
pub struct SystemdLauncher {
    bus: zbus::Connection,
    manager: ManagerProxy<'static>,
    ended_jobs: broadcast::Sender<(String, String)>,
    sockets: PathBuf,
    cgroups: PathBuf,
}

fn service(name: &str) -> String {
    format!("lathe-vm@{}.service", escape(name))
}

fn socket(name: &str) -> String {
    format!("lathe-vm@{}.socket", escape(name))
}

/// Names of machines have `-`, which unit names use for `/` (systemd.unit(5), "String escaping"); systemd does not undo it for `%i`, so
/// only what is not allowed in a unit name would need escaping, and machines' names have nothing of the kind.
fn escape(name: &str) -> &str {
    name
}

fn failed(what: String) -> impl FnOnce(zbus::Error) -> Problem {
    move |cause| match &cause {
        zbus::Error::MethodError(name, text, _)
            if name.contains("AccessDenied") || name.contains("InteractiveAuth") =>
        {
            let message = format!("{what}: systemd refused: {}", text.clone().unwrap_or_default());
            Problem::new(Kind::Internal, "launch-failed", message)
                .detail("polkit does not let lathed manage its units")
                .fix("lathe doctor")
        }
        _ => Problem::internal(what, cause),
    }
}

impl SystemdLauncher {
    /// Connects to the system bus. Control sockets are `sockets/NAME.sock`.
    ///
    /// # Errors
    /// `internal` without a bus or systemd on it.
    pub async fn connect(sockets: PathBuf) -> Result<Self, Problem> {
        let no_bus = || failed("cannot reach systemd over D-Bus".to_owned());
        let bus = zbus::Connection::system().await.map_err(no_bus())?;
        let manager = ManagerProxy::new(&bus).await.map_err(no_bus())?;
        let mut removed = manager.receive_job_removed().await.map_err(no_bus())?;
        manager.subscribe().await.map_err(no_bus())?;
        let (ended_jobs, _) = broadcast::channel(JOB_QUEUE);
        let sender = ended_jobs.clone();
        tokio::spawn(async move {
            while let Some(signal) = removed.next().await {
                if let Ok(arguments) = signal.args() {
                    // Nobody may be waiting at the moment.
                    let _ = sender.send((arguments.job.to_string(), arguments.result.clone()));
                }
            }
        });
        Ok(Self { bus, manager, ended_jobs, sockets, cgroups: PathBuf::from("/sys/fs/cgroup") })
    }

    /// Waits for a job that was started after `ended` was subscribed; its result: `done`, `failed`, `timeout`, ….
    async fn job_result(
        job: &OwnedObjectPath,
        ended: &mut broadcast::Receiver<(String, String)>,
    ) -> Result<String, Problem> {
        let wait = async {
            loop {
                match ended.recv().await {
                    Ok((path, result)) if path == job.as_str() => return result,
                    Ok(_) => {}
                    // Among the missed ones may be ours: what the unit is now tells, see the callers.
                    Err(broadcast::error::RecvError::Lagged(_)) => return "unknown".to_owned(),
                    Err(broadcast::error::RecvError::Closed) => return "canceled".to_owned(),
                }
            }
        };
        tokio::time::timeout(JOB_TIMEOUT, wait).await.map_err(|_| {
            Problem::internal("systemd", format!("job {} did not end within {JOB_TIMEOUT:?}", job.as_str()))
        })
    }

    async fn start(&self, unit: &str) -> Result<(), Problem> {
        let mut ended = self.ended_jobs.subscribe();
        let started = self.manager.start_unit(unit, "replace").await;
        let job = started.map_err(failed(format!("cannot start {unit}")))?;
        let result = Self::job_result(&job, &mut ended).await?;
        if result == "done" || (result == "unknown" && self.state_of(unit).await? == "active") {
            return Ok(());
        }
        let message = format!("{unit} did not start: its job ended as `{result}`");
        Err(Problem::new(Kind::Internal, "launch-failed", message).fix(format!("journalctl -u {unit} -n 20")))
    }

    async fn stop(&self, unit: &str) -> Result<(), Problem> {
        if matches!(self.state_of(unit).await?.as_str(), "inactive" | "failed") {
            return Ok(());
        }
        let mut ended = self.ended_jobs.subscribe();
        let job = match self.manager.stop_unit(unit, "replace").await {
            Ok(job) => job,
            Err(zbus::Error::MethodError(name, ..)) if name.ends_with("NoSuchUnit") => return Ok(()),
            Err(cause) => return Err(failed(format!("cannot stop {unit}"))(cause)),
        };
        Self::job_result(&job, &mut ended).await?;
        match self.state_of(unit).await?.as_str() {
            "inactive" | "failed" => Ok(()),
            state => Err(Problem::internal(format!("{unit} does not stop"), format!("it is `{state}`"))),
        }
    }

    async fn path_of(&self, unit: &str) -> Result<OwnedObjectPath, Problem> {
        self.manager.load_unit(unit).await.map_err(failed(format!("cannot look at {unit}")))
    }

    async fn state_of(&self, unit: &str) -> Result<String, Problem> {
        let looking = || failed(format!("cannot look at {unit}"));
        let path = self.path_of(unit).await?;
        let builder = UnitProxy::builder(&self.bus).path(path);
        let proxy =
            builder.cache_properties(zbus::proxy::CacheProperties::No).build().await.map_err(looking())?;
        proxy.active_state().await.map_err(looking())
    }

    async fn service_of(&self, unit: &str) -> Result<ServiceProxy<'static>, Problem> {
        let looking = || failed(format!("cannot look at {unit}"));
        let path = self.path_of(unit).await?;
        let builder = ServiceProxy::builder(&self.bus).path(path);
        builder.cache_properties(zbus::proxy::CacheProperties::No).build().await.map_err(looking())
    }

    async fn describe(&self, name: &str) -> Result<Launched, Problem> {
        let unit = service(name);
        let proxy = self.service_of(&unit).await?;
        let looking = || failed(format!("cannot look at {unit}"));
        let pid = proxy.main_pid().await.map_err(looking())?;
        let group = proxy.control_group().await.map_err(looking())?;
        let folder = self.cgroups.join(group.trim_start_matches('/'));
        let tree = MachineTree::open(&folder)
            .map_err(|cause| Problem::internal(format!("the cgroups of {unit}"), cause))?;
        Ok(Launched {
            socket: self.sockets.join(format!("{name}.sock")),
            pid: (pid != 0).then_some(pid),
            unit,
            tree: Some(tree),
        })
    }

    async fn ended_as(&self, name: &str) -> Result<End, Problem> {
        let unit = service(name);
        let proxy = self.service_of(&unit).await?;
        let looking = || failed(format!("cannot look at {unit}"));
        let result = proxy.result().await.map_err(looking())?;
        let code = proxy.exec_main_code().await.map_err(looking())?;
        let status = proxy.exec_main_status().await.map_err(looking())?;
        Ok(end_of(&result, code, status))
    }
}

/// What systemd's `Result`, `ExecMainCode` and `ExecMainStatus` say (systemd.exec(5), `$SERVICE_RESULT`).
fn end_of(result: &str, code: i32, status: i32) -> End {
    let failure = |reason: String| End { kind: EndKind::Failure, reason };
    match (result, code) {
        ("oom-kill", _) => failure("monitor killed: out of memory".to_owned()),
        ("success", CLD_EXITED) if status == 0 => {
            End { kind: EndKind::PowerOff, reason: "its monitor ended in order".to_owned() }
        }
        (_, 0) => failure("its monitor is gone".to_owned()),
        (_, CLD_EXITED) => failure(format!("monitor ended with status {status}")),
        (_, _) => failure(format!("monitor killed by signal {status}")),
    }
}

impl Launcher for SystemdLauncher {
    fn kind(&self) -> &'static str {
        "systemd"
    }

    fn launch<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Launched, Problem>> {
        Box::pin(async move {
            self.start(&socket(name)).await?;
            self.start(&service(name)).await?;
            self.describe(name).await
        })
    }

    fn find<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Option<Launched>, Problem>> {
        Box::pin(async move {
            if self.state_of(&service(name)).await? != "active" {
                return Ok(None);
            }
            self.describe(name).await.map(Some)
        })
    }

    fn how_it_ended<'a>(&'a self, name: &'a str) -> Pending<'a, End> {
        Box::pin(async move {
            // Its process may be gone a moment before systemd has noticed.
            for _ in 0..50 {
                match self.state_of(&service(name)).await.as_deref() {
                    Ok("active" | "deactivating") => tokio::time::sleep(Duration::from_millis(20)).await,
                    _ => break,
                }
            }
            self.ended_as(name).await.unwrap_or_else(|problem| {
                tracing::warn!(machine = name, %problem, "cannot learn how a monitor ended");
                End { kind: EndKind::Failure, reason: "its monitor is gone".to_owned() }
            })
        })
    }

    fn end<'a>(&'a self, name: &'a str) -> Pending<'a, Result<(), Problem>> {
        Box::pin(async move {
            // The socket first, so that nothing starts the service again.
            self.stop(&socket(name)).await?;
            self.stop(&service(name)).await?;
            for unit in [service(name), socket(name)] {
                // Not failed, or not loaded any more: then there is nothing to forget.
                let _ = self.manager.reset_failed_unit(&unit).await;
            }
            remove_socket(&self.sockets.join(format!("{name}.sock")))
        })
    }
}

/// The socket unit removes its file (`RemoveOnStop=`); one left by a crash goes here.
fn remove_socket(path: &Path) -> Result<(), Problem> {
    match std::fs::remove_file(path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        // Its folder may belong to systemd; the unit takes it over at its next start.
        Err(cause) if cause.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        Err(cause) => Err(Problem::internal(format!("cannot remove {}", path.display()), cause)),
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_systemd_says_that_a_monitor_ended() {
        assert_eq!(end_of("success", 1, 0).kind, EndKind::PowerOff);
        assert_eq!(end_of("signal", 2, 9).reason, "monitor killed by signal 9");
        assert_eq!(end_of("core-dump", 3, 6).reason, "monitor killed by signal 6");
        assert_eq!(end_of("exit-code", 1, 70).reason, "monitor ended with status 70");
        assert_eq!(end_of("oom-kill", 2, 9).reason, "monitor killed: out of memory");
        assert_eq!(end_of("success", 0, 0).kind, EndKind::Failure);
    }
}
