//! What makes it better.

use super::{Host, fail, ok, warn};
use crate::api::wire::Check;
use crate::images::receive::free_bytes;

/// Room for one small machine beyond the reserve, in bytes.
const COMFORTABLE_BYTES: u64 = 1 << 30;

/// There is room below the state directory.
pub fn space(host: Host<'_>) -> Check {
    let folder = &host.config.host.state_dir;
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let reserve = host.config.reserve.disk.0;
    match free_bytes(&host.path(folder)) {
        Err(problem) => fail("space", problem.message, "sudo systemd-tmpfiles --create lathe.conf"),
        Ok(free) if free <= reserve => {
            let message = format!(
                "{} free below {}, and {} are kept for the host",
                gib(free),
                folder.display(),
                gib(reserve)
            );
            fail("space", message, "lathe image list, then lathe image rm NAME")
        }
        Ok(free) if free < reserve + COMFORTABLE_BYTES => warn(
            "space",
            format!("only {} free below {}", gib(free), folder.display()),
            "lathe image list, then lathe image rm NAME",
        ),
        Ok(free) => ok("space", format!("{} free below {}", gib(free), folder.display())),
    }
}

/// Pressure stall information.
pub fn pressure(host: Host<'_>) -> Check {
    if host.read("/proc/pressure/cpu").is_some_and(|text| text.starts_with("some ")) {
        return ok("pressure", "pressure information (PSI) is on");
    }
    let fix = "add psi=1 to GRUB_CMDLINE_LINUX in /etc/default/grub, then: sudo update-grub && sudo reboot";
    warn("pressure", "pressure information (PSI) is off: nobody sees who waits for what", fix)
}

/// Swap makes squeezing slow instead of visible.
pub fn swap(host: Host<'_>) -> Check {
    let table = host.read("/proc/swaps").unwrap_or_default();
    match table.lines().nth(1).and_then(|line| line.split_whitespace().next()) {
        None => ok("swap", "no swap"),
        Some(device) if device.starts_with("/dev/zram") => ok("swap", format!("swap on {device} only")),
        Some(device) => {
            let message =
                format!("swap on {device}: a machine whose memory is squeezed may swap instead of shrinking");
            warn("swap", message, "sudo systemctl edit lathe.slice   # [Slice] MemorySwapMax=0")
        }
    }
}

/// Peers compare times.
pub fn time(host: Host<'_>) -> Check {
    let signs = [
        "/run/systemd/timesync/synchronized",
        "/run/chrony/chronyd.pid",
        "/run/ntpd.pid",
        "/run/openntpd.pid",
    ];
    if signs.iter().any(|sign| host.exists(sign)) {
        return ok("time", "the clock is kept by a time service");
    }
    warn(
        "time",
        "nobody is seen to keep the clock: join tokens and certificates depend on it",
        "sudo apt install systemd-timesyncd",
    )
}
