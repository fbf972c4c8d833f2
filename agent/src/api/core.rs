//! What the API needs of the rest of lathed. [`crate::machines::Machines`] and [`crate::peer::PeerHandle`] implement it, and fakes in
//! tests.

use std::future::Future;
use std::pin::Pin;

use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc};

use super::wire::by_hand::{AnnounceRequest, BlueprintRequest, ByHandView};
use super::wire::forecast::ForecastView;
use super::wire::foresight::{ForesightRequest, WhyView};
use super::wire::{
    ClusterInit, ClusterView, DiskList, DoctorReport, EventView, HostView, JoinRequest, MachineView, NicList,
    OperationList, OperationView, PeerList, PlanView, Removed, ResizeRequest, ResizeView, RunRequest,
    StopRequest, TokenView, UplinkRequest, UplinkView,
};
use crate::machines::enforced::{Limit, Took};
use crate::machines::{
    ConsoleHandle, DiskChange, DiskChanged, Machines, NicChange, NicChanged, SculptCounts,
};
use crate::problem::Problem;

/// An answer that takes its time.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
/// The same, or a problem.
pub type Reply<'a, T> = Later<'a, Result<T, Problem>>;

/// A machine's console, attached.
#[derive(Debug)]
pub struct Console {
    /// What it said lately.
    pub backlog: Vec<u8>,
    /// What it says from now on.
    pub output: broadcast::Receiver<Vec<u8>>,
    /// What is typed.
    pub input: mpsc::Sender<Vec<u8>>,
}

/// Machines and the host's books.
pub trait Core: Send + Sync {
    /// All machines, by name.
    fn list(&self) -> Later<'_, Vec<MachineView>>;
    /// One machine.
    fn show<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView>;
    /// Makes a machine; answers when it runs.
    fn run(&self, request: RunRequest) -> Reply<'_, MachineView>;
    /// What [`Core::run`] would do.
    fn plan_run<'a>(&'a self, request: &'a RunRequest) -> Reply<'a, PlanView>;
    /// Changes a machine's shape, if its revision is still the one given.
    fn resize<'a>(
        &'a self,
        name: &'a str,
        request: ResizeRequest,
        if_revision: Option<u64>,
    ) -> Reply<'a, ResizeView>;
    /// What [`Core::resize`] would do.
    fn plan_resize<'a>(
        &'a self,
        name: &'a str,
        request: &'a ResizeRequest,
        if_revision: Option<u64>,
    ) -> Reply<'a, PlanView>;
    /// What a machine asked for over time, and what comes.
    fn forecast<'a>(&'a self, name: &'a str) -> Reply<'a, ForecastView>;
    /// Changes what a machine has of its own about its future.
    fn set_foresight<'a>(&'a self, name: &'a str, request: ForesightRequest) -> Reply<'a, MachineView>;
    /// The last decisions about a machine's shape.
    fn why<'a>(&'a self, name: &'a str) -> Reply<'a, WhyView>;
    /// What was decided about all machines' shapes, and what became of it.
    fn sculpted(&self) -> SculptCounts;
    /// Says by hand what a machine will ask for.
    fn set_blueprint<'a>(&'a self, name: &'a str, request: BlueprintRequest) -> Reply<'a, ByHandView>;
    /// Takes that back.
    fn unset_blueprint<'a>(&'a self, name: &'a str) -> Reply<'a, ByHandView>;
    /// Announces an event.
    fn announce<'a>(
        &'a self,
        name: &'a str,
        event: String,
        request: AnnounceRequest,
    ) -> Reply<'a, ByHandView>;
    /// Takes it back.
    fn withdraw<'a>(&'a self, name: &'a str, event: &'a str) -> Reply<'a, ByHandView>;
    /// The operations of a machine.
    fn operations<'a>(&'a self, name: &'a str) -> Reply<'a, OperationList>;
    /// One operation.
    fn operation<'a>(&'a self, id: &'a str) -> Reply<'a, OperationView>;
    /// Ends an operation as if it had not been asked for.
    fn cancel<'a>(&'a self, id: &'a str) -> Reply<'a, OperationView>;
    /// Powers a machine off.
    fn stop<'a>(&'a self, name: &'a str, request: StopRequest) -> Reply<'a, MachineView>;
    /// Starts a stopped machine.
    fn start<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView>;
    /// Stops a machine's vCPUs.
    fn pause<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView>;
    /// Lets a paused machine go on.
    fn resume<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView>;
    /// Removes a machine.
    fn remove<'a>(&'a self, name: &'a str, purge: bool, force: bool) -> Reply<'a, Removed>;
    /// A machine's disks.
    fn disks<'a>(&'a self, name: &'a str) -> Reply<'a, DiskList>;
    /// Adds, grows or removes one of them.
    fn change_disk<'a>(&'a self, name: &'a str, change: DiskChange) -> Reply<'a, DiskChanged>;
    /// What [`Core::change_disk`] would do.
    fn plan_disk<'a>(&'a self, name: &'a str, change: &'a DiskChange) -> Reply<'a, PlanView>;
    /// A machine's nics.
    fn nics<'a>(&'a self, name: &'a str) -> Reply<'a, NicList>;
    /// Adds, limits or removes one of them.
    fn change_nic<'a>(&'a self, name: &'a str, change: NicChange) -> Reply<'a, NicChanged>;
    /// What [`Core::change_nic`] would do.
    fn plan_nic<'a>(&'a self, name: &'a str, change: &'a NicChange) -> Reply<'a, PlanView>;
    /// A stream to the guest agent, ready for its protocol.
    fn guest_stream<'a>(&'a self, name: &'a str) -> Reply<'a, UnixStream>;
    /// The console.
    fn console<'a>(&'a self, name: &'a str) -> Reply<'a, Console>;
    /// The console's last lines, of a stopped machine too.
    fn logs<'a>(&'a self, name: &'a str, lines: usize) -> Reply<'a, String>;
    /// The same, and what comes.
    fn logs_follow<'a>(
        &'a self,
        name: &'a str,
        lines: usize,
    ) -> Reply<'a, (String, broadcast::Receiver<Vec<u8>>)>;
    /// The books; `peers_alive` is not filled in.
    fn host(&self) -> HostView;
    /// How long it took until decisions were in force.
    fn enforced(&self) -> Vec<(Limit, Took)>;
    /// The uplink and what machines have of it.
    fn uplink(&self) -> Later<'_, UplinkView>;
    /// Shares it between machines.
    fn enable_uplink(&self, request: UplinkRequest) -> Reply<'_, UplinkView>;
    /// What [`Core::enable_uplink`] would do.
    fn plan_uplink<'a>(&'a self, request: &'a UplinkRequest) -> Reply<'a, PlanView>;
    /// Puts back what was there.
    fn disable_uplink(&self) -> Reply<'_, UplinkView>;
    /// What happens from now on.
    fn events(&self) -> broadcast::Receiver<EventView>;
}

/// Peers.
pub trait Cluster: Send + Sync {
    /// This host first, then by name.
    fn peers(&self) -> Reply<'_, PeerList>;
    /// Peers alive, without this host; 0 when that cannot be told.
    fn alive(&self) -> Later<'_, u64>;
    /// Makes a cluster.
    fn init(&self, request: ClusterInit) -> Reply<'_, ClusterView>;
    /// A token for one more host.
    fn token(&self, ttl_sec: u64) -> Reply<'_, TokenView>;
    /// Becomes a member.
    fn join(&self, request: JoinRequest) -> Reply<'_, ClusterView>;
}

/// What the host has and lacks.
pub trait Doctor: Send + Sync {
    /// Looks at everything; blocks for as long as the host's files take.
    fn examine(&self) -> DoctorReport;
}

impl Core for Machines {
    fn list(&self) -> Later<'_, Vec<MachineView>> {
        Box::pin(Machines::list(self))
    }

    fn show<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(Machines::show(self, name))
    }

    fn run(&self, request: RunRequest) -> Reply<'_, MachineView> {
        Box::pin(Machines::run(self, request))
    }

    fn plan_run<'a>(&'a self, request: &'a RunRequest) -> Reply<'a, PlanView> {
        Box::pin(Machines::plan_run(self, request))
    }

    fn resize<'a>(
        &'a self,
        name: &'a str,
        request: ResizeRequest,
        if_revision: Option<u64>,
    ) -> Reply<'a, ResizeView> {
        Box::pin(Machines::resize(self, name, request, if_revision))
    }

    fn plan_resize<'a>(
        &'a self,
        name: &'a str,
        request: &'a ResizeRequest,
        if_revision: Option<u64>,
    ) -> Reply<'a, PlanView> {
        Box::pin(Machines::plan_resize(self, name, request, if_revision))
    }

    fn forecast<'a>(&'a self, name: &'a str) -> Reply<'a, ForecastView> {
        Box::pin(Machines::forecast(self, name))
    }

    fn set_foresight<'a>(&'a self, name: &'a str, request: ForesightRequest) -> Reply<'a, MachineView> {
        Box::pin(Machines::set_foresight(self, name, request))
    }

    fn why<'a>(&'a self, name: &'a str) -> Reply<'a, WhyView> {
        Box::pin(Machines::why(self, name))
    }

    fn sculpted(&self) -> SculptCounts {
        Machines::sculpted(self)
    }

    fn set_blueprint<'a>(&'a self, name: &'a str, request: BlueprintRequest) -> Reply<'a, ByHandView> {
        Box::pin(Machines::set_blueprint(self, name, request))
    }

    fn unset_blueprint<'a>(&'a self, name: &'a str) -> Reply<'a, ByHandView> {
        Box::pin(Machines::unset_blueprint(self, name))
    }

    fn announce<'a>(
        &'a self,
        name: &'a str,
        event: String,
        request: AnnounceRequest,
    ) -> Reply<'a, ByHandView> {
        Box::pin(Machines::announce(self, name, event, request))
    }

    fn withdraw<'a>(&'a self, name: &'a str, event: &'a str) -> Reply<'a, ByHandView> {
        Box::pin(Machines::withdraw(self, name, event))
    }

    fn operations<'a>(&'a self, name: &'a str) -> Reply<'a, OperationList> {
        Box::pin(Machines::operations(self, name))
    }

    fn operation<'a>(&'a self, id: &'a str) -> Reply<'a, OperationView> {
        Box::pin(Machines::operation(self, id))
    }

    fn cancel<'a>(&'a self, id: &'a str) -> Reply<'a, OperationView> {
        Box::pin(Machines::cancel(self, id))
    }

    fn stop<'a>(&'a self, name: &'a str, request: StopRequest) -> Reply<'a, MachineView> {
        Box::pin(Machines::stop(self, name, request))
    }

    fn start<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(Machines::start_machine(self, name))
    }

    fn pause<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(Machines::pause(self, name))
    }

    fn resume<'a>(&'a self, name: &'a str) -> Reply<'a, MachineView> {
        Box::pin(Machines::resume(self, name))
    }

    fn remove<'a>(&'a self, name: &'a str, purge: bool, force: bool) -> Reply<'a, Removed> {
        Box::pin(Machines::remove(self, name, purge, force))
    }

    fn disks<'a>(&'a self, name: &'a str) -> Reply<'a, DiskList> {
        Box::pin(Machines::disks(self, name))
    }

    fn change_disk<'a>(&'a self, name: &'a str, change: DiskChange) -> Reply<'a, DiskChanged> {
        Box::pin(Machines::change_disk(self, name, change))
    }

    fn plan_disk<'a>(&'a self, name: &'a str, change: &'a DiskChange) -> Reply<'a, PlanView> {
        Box::pin(Machines::plan_disk(self, name, change))
    }

    fn nics<'a>(&'a self, name: &'a str) -> Reply<'a, NicList> {
        Box::pin(Machines::nics(self, name))
    }

    fn change_nic<'a>(&'a self, name: &'a str, change: NicChange) -> Reply<'a, NicChanged> {
        Box::pin(Machines::change_nic(self, name, change))
    }

    fn plan_nic<'a>(&'a self, name: &'a str, change: &'a NicChange) -> Reply<'a, PlanView> {
        Box::pin(Machines::plan_nic(self, name, change))
    }

    fn guest_stream<'a>(&'a self, name: &'a str) -> Reply<'a, UnixStream> {
        Box::pin(Machines::guest_stream(self, name))
    }

    fn console<'a>(&'a self, name: &'a str) -> Reply<'a, Console> {
        Box::pin(async move {
            let ConsoleHandle { backlog, output, input } = Machines::console(self, name).await?;
            Ok(Console { backlog, output, input })
        })
    }

    fn logs<'a>(&'a self, name: &'a str, lines: usize) -> Reply<'a, String> {
        Box::pin(Machines::logs(self, name, lines))
    }

    fn logs_follow<'a>(
        &'a self,
        name: &'a str,
        lines: usize,
    ) -> Reply<'a, (String, broadcast::Receiver<Vec<u8>>)> {
        Box::pin(Machines::logs_follow(self, name, lines))
    }

    fn host(&self) -> HostView {
        Machines::host(self)
    }

    fn enforced(&self) -> Vec<(Limit, Took)> {
        Machines::enforced(self)
    }

    fn uplink(&self) -> Later<'_, UplinkView> {
        Box::pin(Machines::uplink(self))
    }

    fn enable_uplink(&self, request: UplinkRequest) -> Reply<'_, UplinkView> {
        Box::pin(async move { Machines::enable_uplink(self, &request).await })
    }

    fn plan_uplink<'a>(&'a self, request: &'a UplinkRequest) -> Reply<'a, PlanView> {
        Box::pin(Machines::plan_uplink(self, request))
    }

    fn disable_uplink(&self) -> Reply<'_, UplinkView> {
        Box::pin(Machines::disable_uplink(self))
    }

    fn events(&self) -> broadcast::Receiver<EventView> {
        Machines::events(self)
    }
}
