//! After a restart of lathed: looks what there is of a machine, and takes its running monitor over.

use lathe_vmm::control::wire::{Answer, Command, Phase};
use std::os::fd::AsFd;
use tokio::sync::{mpsc, oneshot};

use super::super::core::Entry;
use super::super::launch::{self, Live};
use super::super::life::{self, Decision, Effect, Found, Life};
use super::super::record::Record;
use super::super::{disks, nics, resize};
use super::{Actor, Storing, end_of};
use crate::launcher::Launched;
use crate::monitor::{Monitor, Notice};
use crate::problem::Problem;

impl Actor {
    pub(super) async fn resume(&mut self, reboot: bool, decided: oneshot::Sender<()>) {
        let record = self.entry.with(|shared| shared.record.clone());
        let (found, adopted) = self.look().await;
        let mut decision = life::resume(&record.life, found, reboot, record.autostart);
        if decision.life.holds_shards() && !record.life.holds_shards() {
            let after = Record { life: decision.life.clone(), ..record.clone() };
            if let Err(problem) = self.core.with_books(|books| books.set(&record.name, after.booking())) {
                decision = Decision {
                    life: Life::Failed { reason: self.fail(problem) },
                    effects: vec![Effect::Clear],
                };
            }
        }
        if let Some((live, notices)) = adopted
            && decision.life.has_monitor()
        {
            self.adopt(live, notices).await;
        } else {
            disks::down(self).await;
            nics::down(self).await;
        }
        let (before, after) = (record.life.state(), decision.life.state());
        tracing::info!(machine = record.name, "{} was {before:?} and is now {after:?}", record.name);
        let _ = self.enter(decision.life, Storing::Should).await;
        let _ = decided.send(());
        self.carry_out(decision.effects).await;
    }

    /// What there is of the machine.
    async fn look(&self) -> (Found, Option<(Live, mpsc::Receiver<Notice>)>) {
        let name = &self.entry.name;
        let launched = match self.core.launcher.find(name).await {
            Ok(launched) => launched,
            Err(problem) => {
                tracing::error!(machine = name, %problem, "cannot look for a monitor");
                None
            }
        };
        let Some(launched) = launched else {
            return (Found::Nothing(self.core.launcher.how_it_ended(name).await), None);
        };
        match greet(launched).await {
            Ok((live, notices, Phase::Running)) => {
                let panic = live.monitor.status().await.ok().and_then(|status| status.panic);
                (panic.map_or(Found::Alive, Found::Panicked), Some((live, notices)))
            }
            Ok((live, notices, Phase::Paused)) => (Found::Still, Some((live, notices))),
            Ok((live, _, Phase::Ended)) => {
                let exit = live.monitor.status().await.ok().and_then(|status| status.exit);
                let end = match exit {
                    Some(exit) => end_of(exit),
                    None => self.core.launcher.how_it_ended(name).await,
                };
                (Found::Nothing(end), None)
            }
            Ok((_, _, phase)) => {
                tracing::info!(machine = name, ?phase, "found a monitor that was never told all");
                (Found::HalfMade, None)
            }
            Err(problem) => {
                tracing::warn!(machine = name, %problem, "a monitor does not answer");
                (Found::HalfMade, None)
            }
        }
    }

    /// Takes a running monitor over from an earlier lathed: console, limits, rates, counters.
    async fn adopt(&mut self, live: Live, notices: mpsc::Receiver<Notice>) {
        let record = self.entry.with(|shared| shared.record.clone());
        if let Ok(status) = live.monitor.status().await {
            self.entry.with(|shared| {
                (shared.reboots, shared.panic) = (status.reboots, status.panic);
                shared.expired = status.watchdog_expired;
            });
        }
        if let Err(problem) = reattach(&live, &self.entry).await {
            tracing::warn!(machine = record.name, %problem, "its console is not attached again");
        }
        self.connect(live, notices).await;
        if let Err(problem) = launch::find_ports(&self.core, &record).await {
            tracing::warn!(machine = record.name, %problem, "its ports stay as they were found");
        }
        resize::settle(self).await;
        disks::settle(self).await;
        nics::settle(self).await;
        self.core.tell("machine-adopted", &record.name, format!("{} ran on and is found again", record.name));
    }
}

async fn greet(launched: Launched) -> Result<(Live, mpsc::Receiver<Notice>, Phase), Problem> {
    let name = launched.unit.clone();
    let failed = |error| launch::monitor_problem(&name, "greeting it", error);
    let (monitor, notices) = Monitor::connect(&launched.socket).map_err(failed)?;
    let phase = monitor.hello().await.map_err(failed)?;
    Ok((Live { monitor, launched }, notices, phase))
}

/// A new console stream for a monitor that lives, after what it printed meanwhile.
async fn reattach(live: &Live, entry: &Entry) -> Result<(), Problem> {
    let failed = |error| launch::monitor_problem(&entry.name, "attaching its console", error);
    if let Ok(Answer::Console { text }) = live.monitor.call(Command::ConsoleTail {}, &[]).await {
        entry.console.catch_up(&text);
    }
    let (ours, theirs) = launch::new_console()?;
    let attach = Command::ConsoleAttach { fd: Some(0) };
    live.monitor.call(attach, &[theirs.as_fd()]).await.map_err(failed)?;
    entry.console.attach(ours);
    Ok(())
}
