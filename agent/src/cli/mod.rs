//! The command `lathe`: one verb, one function; everything it knows it asks of `lathed` over the Unix socket.
//!
//! - [`args`]: the definition of every verb and option, from which help, man page and completions are made
//! - [`client`]: HTTP over the Unix socket
//! - [`output`]: tables, amounts, errors as people read them
//! - [`machine`], [`resize`], [`disk`], [`nic`], [`host`], [`uplink`], [`image`], [`cluster`]: the verbs
//! - [`forecast`]: what a machine asked for and will ask for, drawn
//! - [`why`]: what was decided about its shape
//! - [`stream`]: `exec` and `console`
//! - [`top`]: the screen that refreshes once a second
//!
//! Data goes to standard output, talk to standard error. Exit codes: [`exit`].

pub mod args;
pub mod client;
pub mod cluster;
pub mod disk;
pub mod forecast;
pub mod host;
pub mod image;
pub mod machine;
pub mod nic;
pub mod output;
pub mod resize;
pub mod stream;
pub mod top;
pub mod uplink;
pub mod why;

use crate::cli::args::{Cli, HostVerb, Verb};
use crate::cli::client::Client;
use crate::problem::Problem;

/// Exit codes of `lathe`; the first eight are those of the Linux Standard Base for init scripts.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// Failed.
    pub const FAILED: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// Not permitted.
    pub const NOT_PERMITTED: u8 = 4;
    /// Not configured.
    pub const NOT_CONFIGURED: u8 = 6;
    /// lathed is not running.
    pub const DAEMON_DOWN: u8 = 7;
    /// No such machine, image or peer.
    pub const NO_SUCH: u8 = 8;
    /// A conflict: name taken, other revision, in use.
    pub const CONFLICT: u8 = 9;
    /// Accepted, but not (wholly) in force yet.
    pub const CONVERGING: u8 = 10;
    /// `--plan --exit-code` found something to do.
    pub const CHANGES: u8 = 11;
    /// `lathe exec`: there is no such command inside the machine; shells say the same.
    pub const COMMAND_NOT_FOUND: u8 = 127;
}

/// What a verb ended with: an exit code, or an error to print.
pub type Verdict = Result<u8, Problem>;

/// Carries one command line out.
///
/// # Errors
/// What went wrong, to be printed by [`output::print_problem`].
pub async fn execute(cli: Cli) -> Verdict {
    let client = Client::new(cli.socket.clone());
    let json = cli.json;
    match cli.verb {
        Verb::Run(args) => machine::run(&client, json, args).await,
        Verb::List(args) => machine::list(&client, json, &args).await,
        Verb::Show { name } => machine::show(&client, json, &name).await,
        Verb::Resize(args) => resize::resize(&client, json, &args).await,
        Verb::Start { name } => machine::change(&client, json, &name, "start").await,
        Verb::Pause { name } => machine::change(&client, json, &name, "pause").await,
        Verb::Resume { name } => machine::change(&client, json, &name, "resume").await,
        Verb::Stop(args) => machine::stop(&client, json, &args).await,
        Verb::Rm(args) => machine::remove(&client, json, &args).await,
        Verb::Logs(args) => machine::logs(&client, &args).await,
        Verb::Exec(args) => stream::exec(&client, args).await,
        Verb::Console { name } => stream::console(&client, &name).await,
        Verb::Host { verb: None } => host::host(&client, json).await,
        Verb::Host { verb: Some(HostVerb::Uplink(verb)) } => uplink::uplink(&client, json, verb).await,
        Verb::Top(args) => top::top(&client, json, &cli.socket, &args).await,
        Verb::Forecast(args) => forecast::forecast(&client, json, &args).await,
        Verb::Why(args) => why::why(&client, json, &args).await,
        Verb::Peers => host::peers(&client, json).await,
        Verb::Doctor => host::doctor(&client, json).await,
        Verb::Events => host::events(&client).await,
        Verb::Disk(verb) => disk::disk(&client, json, verb).await,
        Verb::Nic(verb) => nic::nic(&client, json, verb).await,
        Verb::Image(verb) => image::image(&client, json, verb).await,
        Verb::Cluster(verb) => cluster::cluster(&client, json, verb).await,
        Verb::Completions { shell } => {
            args::completions(shell);
            Ok(exit::DONE)
        }
        Verb::Man => args::man().map(|()| exit::DONE),
    }
}

/// The exit code that an error ends with.
pub fn exit_code(problem: &Problem) -> u8 {
    use crate::problem::Kind;
    match (problem.kind, problem.code) {
        (_, "daemon-down") => exit::DAEMON_DOWN,
        (_, "peer-no-cluster") => exit::NOT_CONFIGURED,
        (_, "command-not-found") => exit::COMMAND_NOT_FOUND,
        (_, "usage" | "bad-amount") => exit::USAGE,
        (Kind::BadRequest, _) => exit::USAGE,
        (Kind::NotPermitted, _) => exit::NOT_PERMITTED,
        (Kind::NotFound, _) => exit::NO_SUCH,
        (Kind::Conflict, _) => exit::CONFLICT,
        (Kind::Impossible | Kind::Internal | Kind::Unavailable, _) => exit::FAILED,
    }
}
