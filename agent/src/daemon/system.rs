//! What lathed and systemd tell each other (sd_notify(3), `org.freedesktop.systemd1`). Without systemd all of it is silence.

use std::time::Duration;

use sd_notify::NotifyState;

/// How long D-Bus may take to say whether the host goes down.
const BUS_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the watchdog is fed when systemd names no interval.
const FEED_DEFAULT: Duration = Duration::from_secs(10);

/// The manager that started us, if any did.
#[derive(Debug)]
pub struct Systemd {
    watchdog: Option<Duration>,
}

impl Systemd {
    /// As the environment says.
    pub fn from_environment() -> Self {
        Self { watchdog: sd_notify::watchdog_enabled() }
    }

    fn tell(&self, state: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(state) {
            tracing::debug!("notifying systemd: {error}");
        }
    }

    /// How often to call [`Systemd::alive`]: a third of what systemd waits.
    pub fn feed_every(&self) -> Duration {
        self.watchdog.map_or(FEED_DEFAULT, |interval| interval / 3)
    }

    /// Feeds the watchdog.
    pub fn alive(&self) {
        self.tell(&[NotifyState::Watchdog]);
    }

    /// Requests are answered from now on.
    pub fn ready(&self, headline: &str) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(headline)]);
    }

    /// The line that `systemctl status` shows.
    pub fn status(&self, headline: &str) {
        self.tell(&[NotifyState::Status(headline)]);
    }

    /// The configuration is being read again; [`Systemd::ready`] ends it.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(error) => tracing::debug!("the monotonic clock: {error}"),
        }
    }

    /// lathed is about to end.
    pub fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// Whether lathed ends because the host goes down. When that cannot be told, it does not: `lathe-machines.service` is there for that.
    pub async fn host_goes_down(&self) -> bool {
        if !sd_notify::booted().unwrap_or(false) {
            return false;
        }
        match tokio::time::timeout(BUS_TIMEOUT, system_state()).await {
            Ok(Ok(state)) => state == "stopping",
            Ok(Err(error)) => {
                tracing::warn!("asking systemd for its state: {error}");
                false
            }
            Err(_) => {
                tracing::warn!("systemd did not say its state within {} s", BUS_TIMEOUT.as_secs());
                false
            }
        }
    }
}

async fn system_state() -> zbus::Result<String> {
    let bus = zbus::Connection::system().await?;
    let manager = zbus::Proxy::new(
        &bus,
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    )
    .await?;
    manager.get_property("SystemState").await
}
