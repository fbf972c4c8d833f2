//! The daemon `lathed`; see [`lathe_agent::daemon`].

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lathe_agent::cli::output;
use lathe_agent::config::{Config, EXIT_CONFIG};
use lathe_agent::daemon::{self, helper, host_setup};
use lathe_agent::problem::Problem;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// Agent that shapes microVMs on this host. systemd runs it; to speak with it: lathe
#[derive(Debug, Parser)]
#[command(name = "lathed", version)]
struct Arguments {
    /// Read the configuration, say ok or what is wrong with it, and end
    #[arg(long)]
    check: bool,
    /// Read this file only, no drop-ins
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// As root, once after boot: load kernel modules, turn IP forwarding on, weigh machines against the host
    HostSetup,
    /// What units run
    #[command(subcommand)]
    Helper(Helper),
}

#[derive(Debug, Subcommand)]
enum Helper {
    /// As root: make the cgroups of a machine whose monitor is $MAINPID
    Cgroup {
        /// The machine
        name: String,
    },
    /// Press the power button of every machine and wait
    PowerOff,
}

fn load(file: Option<&Path>) -> Result<Config, String> {
    let config = match file {
        Some(file) => Config::load_file(file),
        None => Config::load(Path::new("/")),
    };
    let config = config.map_err(|error| error.to_string())?;
    EnvFilter::try_new(&config.log_level)
        .map_err(|error| format!("[log] level \"{}\": {error}", config.log_level))?;
    Ok(config)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Task::Helper(Helper::Cgroup { name })) = &arguments.task {
        return finished(helper::cgroup(name, std::env::var("MAINPID").ok().as_deref()));
    }
    let config = match load(arguments.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error[config]: {error}\n  fix: correct it, then check with: lathed --check");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&error)]);
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    match arguments.task {
        _ if arguments.check => {
            println!("ok");
            ExitCode::SUCCESS
        }
        Some(Task::HostSetup) => {
            host_setup::run(&config);
            ExitCode::SUCCESS
        }
        Some(Task::Helper(_)) => {
            finished(with_runtime(async { helper::power_off(&config).await.map(|_| ()) }))
        }
        None => daemon(config, arguments.config),
    }
}

/// Runs a future to its end.
fn with_runtime(future: impl Future<Output = Result<(), Problem>>) -> Result<(), Problem> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build();
    let runtime = runtime.map_err(|error| Problem::internal("starting", error))?;
    let result = runtime.block_on(future);
    runtime.shutdown_background();
    result
}

/// Threads that answer requests; more would only cost memory.
const WORKERS: usize = 2;

fn daemon(config: Config, file: Option<PathBuf>) -> ExitCode {
    let level = match start_log(&config.log_level) {
        Ok(level) => level,
        Err(error) => {
            eprintln!("error[internal]: the journal: {error}");
            return ExitCode::FAILURE;
        }
    };
    let set_level = move |text: &str| {
        let filter = EnvFilter::try_new(text).map_err(|error| error.to_string())?;
        level.reload(filter).map_err(|error| error.to_string())
    };
    let again = Box::new(move || load(file.as_deref()));
    let result = with_runtime(daemon::run(config, again, set_level));
    if let Err(problem) = &result {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&problem.message)]);
    }
    finished(result)
}

/// To the journal with fields where it is the journal that reads, to standard error otherwise.
fn start_log(level: &str) -> anyhow::Result<reload::Handle<EnvFilter, Registry>> {
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(level)?);
    let registry = tracing_subscriber::registry().with(filter);
    match tracing_journald::layer() {
        Ok(journal) if std::env::var_os("JOURNAL_STREAM").is_some() => {
            registry.with(journal.with_field_prefix(None)).try_init()?;
        }
        _ => registry
            .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false))
            .try_init()?,
    }
    Ok(handle)
}

fn finished(result: Result<(), Problem>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            output::print_problem(&problem, false);
            ExitCode::FAILURE
        }
    }
}
