//! Starts and ends monitors: through systemd where it is, by itself where it is not.
//!
//! ```text
//! launch(NAME) ─► a monitor in phase `Empty`, listening on its control socket, in its own cgroup tree
//! end(NAME)    ─► no monitor, however it was; says how it ended
//! ```
//! Both are idempotent. It never speaks the control protocol and knows nothing of machines but their names.

pub mod direct;
pub mod systemd;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use lathe_cgroup::MachineTree;

use crate::machines::life::End;
use crate::problem::Problem;

/// A future as trait objects need it.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A monitor that was started or found.
#[derive(Clone, Debug)]
pub struct Launched {
    /// Its control socket.
    pub socket: PathBuf,
    /// Its process.
    pub pid: Option<u32>,
    /// Its systemd unit, empty without systemd.
    pub unit: String,
    /// Its cgroups; `None` where there are none to write to.
    pub tree: Option<MachineTree>,
}

/// Starts, finds and ends monitors.
pub trait Launcher: Send + Sync {
    /// `systemd` or `direct`.
    fn kind(&self) -> &'static str;
    /// Starts a monitor for machine `name`; there must be none.
    fn launch<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Launched, Problem>>;
    /// The monitor of `name`, if one lives.
    fn find<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Option<Launched>, Problem>>;
    /// How the last monitor of `name` ended, as far as is known.
    fn how_it_ended<'a>(&'a self, name: &'a str) -> Pending<'a, End>;
    /// Ends whatever there is of `name`, waits until it is gone, and forgets it.
    fn end<'a>(&'a self, name: &'a str) -> Pending<'a, Result<(), Problem>>;
}
