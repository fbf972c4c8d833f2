//! From a request to a record: everything that can be refused without touching anything is refused here.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use lathe_shard::{Bytes, MEMORY_SHARD, MilliCpu};

use super::config::CoreConfig;
use super::life::Life;
use super::record::{Desired, Disk, Drive, FIRST_NIC, Foresight, Initrd, Kernel, Record, Source, vcpus_for};
use crate::api::wire::{Cores, DiskSource, ResizeRequest, RunRequest, Tier};
use crate::foresight::MAX_AGGRESSIVENESS;
use crate::host;
use crate::problem::{Kind, Problem};

/// Least CPU of a machine, milliCPU.
pub const MIN_CPU_MILLI: u64 = 50;
/// Least memory of a machine, bytes.
pub const MIN_MEMORY_BYTES: u64 = 64 << 20;
/// Least bandwidth, bit/s.
pub const MIN_NET_BIT_PER_SEC: u64 = 1000;
/// Most bandwidth, bit/s: what a 64-bit counter of bytes in tc can hold many times over.
pub const MAX_NET_BIT_PER_SEC: u64 = 1_000_000_000_000;
/// Most I/O operations per second: one a nanosecond.
pub const MAX_IOPS: u64 = 1_000_000_000;
/// Most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 64;
/// Most disks of a machine.
pub const MAX_DISKS: usize = 16;
/// Most nics of a machine: with as many disks as possible and all other devices, what fits on its PCI bus.
pub const MAX_NICS: usize = 6;
/// Longest kernel command line in bytes.
const MAX_CMDLINE_BYTES: usize = 2047;
/// Longest name in bytes.
const MAX_NAME_BYTES: usize = 28;
/// Length of an upload's id.
const MAX_UPLOAD_ID_BYTES: usize = 64;

fn bad(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(Kind::BadRequest, code, message)
}

/// Checks a machine's name.
///
/// # Errors
/// `bad-name`.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let fine = (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.bytes().all(allowed)
        && name.as_bytes().first().is_some_and(u8::is_ascii_lowercase)
        && !name.ends_with('-');
    if fine {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME_BYTES * 2).collect();
    Err(bad("bad-name", format!("{shown:?} is not a machine's name"))
        .detail("1 to 28 of a-z, 0-9 and -, beginning with a letter, not ending with -"))
}

/// # Errors
/// `bad-amount`.
fn check_cpu(milli: u64) -> Result<u64, Problem> {
    if milli < MIN_CPU_MILLI {
        let least = MilliCpu(MIN_CPU_MILLI);
        return Err(bad("bad-amount", format!("{} cpu is too little: at least {least}", MilliCpu(milli))));
    }
    Ok(milli)
}

fn check_memory(bytes: u64) -> Result<u64, Problem> {
    if bytes < MIN_MEMORY_BYTES {
        let message =
            format!("{} of memory is too little: at least {}", Bytes(bytes), Bytes(MIN_MEMORY_BYTES));
        return Err(bad("bad-amount", message));
    }
    if !bytes.is_multiple_of(MEMORY_SHARD.0) {
        let below = bytes - bytes % MEMORY_SHARD.0;
        let message = format!("{bytes} bytes of memory is not a multiple of {MEMORY_SHARD}");
        let nearest = format!("nearest: {}M or {}M", below >> 20, below.saturating_add(MEMORY_SHARD.0) >> 20);
        return Err(bad("bad-amount", message).detail(nearest));
    }
    Ok(bytes)
}

pub(super) fn check_net(bit_per_sec: u64) -> Result<u64, Problem> {
    let range = MIN_NET_BIT_PER_SEC..=MAX_NET_BIT_PER_SEC;
    if bit_per_sec != 0 && !range.contains(&bit_per_sec) {
        let message = format!("{bit_per_sec} bit/s is not between 1 kbit/s and 1000 Gbit/s (0: no limit)");
        return Err(bad("bad-amount", message));
    }
    Ok(bit_per_sec)
}

fn check_iops(iops: u64) -> Result<u64, Problem> {
    if iops > MAX_IOPS {
        let message = format!("{iops} iops is not between 1 and {MAX_IOPS} (0: no limit)");
        return Err(bad("bad-amount", message));
    }
    Ok(iops)
}

/// Nobody gets more than its bounds.
fn check_bounds(
    verb: &str,
    name: &str,
    shape: &Desired,
    cpu_max: Option<u64>,
    memory_max: Option<u64>,
) -> Result<(), Problem> {
    let over = |what: String, most: String, option: &str, amount: String| {
        Problem::new(Kind::Impossible, "over-bound", format!("{name} cannot have {what}: {most} at most"))
            .detail(format!("its bound is {option}-max, set when it is made"))
            .fix(format!("lathe {verb} {name} {option} {amount}"))
    };
    if let Some(most) = cpu_max.filter(|most| shape.cpu_milli > *most) {
        let what = format!("{} cpu", MilliCpu(shape.cpu_milli));
        return Err(over(what, MilliCpu(most).to_string(), "--cpu", format!("{most}m")));
    }
    if let Some(most) = memory_max.filter(|most| shape.memory_bytes > *most) {
        let what = format!("{} of memory", Bytes(shape.memory_bytes));
        return Err(over(what, Bytes(most).to_string(), "--memory", format!("{}M", most >> 20)));
    }
    Ok(())
}

/// Cores to itself are whole, and guaranteed.
fn check_cores(verb: &str, name: &str, shape: &Desired, cores: Cores) -> Result<(), Problem> {
    if cores == Cores::Shared {
        return Ok(());
    }
    if !shape.cpu_milli.is_multiple_of(1000) {
        let whole = (shape.cpu_milli / 1000).max(1);
        let asked = MilliCpu(shape.cpu_milli);
        let message = format!("{name} has cores to itself, and {asked} cpu is no whole number of them");
        return Err(bad("bad-amount", message).fix(format!("lathe {verb} {name} --cpu {whole}")));
    }
    if shape.tier != Tier::Guaranteed {
        let message =
            format!("{name} has cores to itself, which are guaranteed: it cannot be {}", shape.tier.word());
        let problem = bad("bad-amount", message);
        return Err(match verb {
            "run" => problem.fix("add: --tier guaranteed        or leave out: --cores dedicated"),
            _ => problem.detail("whether it has cores to itself is set when it is made"),
        });
    }
    Ok(())
}

/// What a resize asks for, on top of what is desired.
///
/// # Errors
/// `bad-amount`, `no-network`, `over-bound`.
pub fn resized(record: &Record, request: &ResizeRequest) -> Result<Desired, Problem> {
    let desired = record.desired;
    if request.net_bit_per_sec.is_some() && record.net.is_none() {
        let name = &record.name;
        let message = format!("{name} has no nic {FIRST_NIC}, whose rate could be changed");
        let problem = Problem::new(Kind::Impossible, "no-network", message);
        return Err(match record.nics.first() {
            Some(nic) => problem
                .detail("--net is for the nic that it was made with; others have rates of their own")
                .fix(format!("lathe nic limit {name} {} RATE", nic.name)),
            None => problem.fix(format!("lathe nic add {name} --net RATE")),
        });
    }
    let target = Desired {
        cpu_milli: request.cpu_milli.map_or(Ok(desired.cpu_milli), check_cpu)?,
        memory_bytes: request.memory_bytes.map_or(Ok(desired.memory_bytes), check_memory)?,
        net_bit_per_sec: request.net_bit_per_sec.map_or(Ok(desired.net_bit_per_sec), check_net)?,
        iops: request.iops.map_or(Ok(desired.iops), check_iops)?,
        tier: request.tier.unwrap_or(desired.tier),
    };
    check_bounds("resize", &record.name, &target, record.cpu_max_milli, record.memory_max_bytes)?;
    check_cores("resize", &record.name, &target, record.cores)?;
    Ok(target)
}

/// The record of a new machine, without network card and context id, which are allotted later.
///
/// # Errors
/// `bad-name`, `bad-amount`, `no-such-image`, `no-such-upload`, `disk-not-allowed`, `bad-request`.
pub fn record_of(request: &RunRequest, config: &CoreConfig) -> Result<Record, Problem> {
    check_name(&request.name)?;
    let net = request.net_bit_per_sec.unwrap_or(0);
    let desired = Desired {
        cpu_milli: check_cpu(request.cpu_milli)?,
        memory_bytes: check_memory(request.memory_bytes)?,
        net_bit_per_sec: check_net(net)?,
        iops: check_iops(request.iops.unwrap_or(0))?,
        tier: request.tier,
    };
    check_vcpus(request.vcpus, desired.cpu_milli)?;
    request.memory_max_bytes.map_or(Ok(0), check_memory)?;
    check_bounds("run", &request.name, &desired, request.cpu_max_milli, request.memory_max_bytes)?;
    check_least(request)?;
    let foresight = foresight_of(request)?;
    check_cores("run", &request.name, &desired, request.cores)?;
    if request.net && config.network.is_none() {
        return Err(no_host_network().fix("add: --net none"));
    }
    if !request.net && net != 0 {
        return Err(bad("bad-amount", "a machine without network cannot have a bandwidth"));
    }
    Ok(Record {
        name: request.name.clone(),
        revision: 1,
        life: Life::Creating,
        desired,
        resizing: None,
        operation: None,
        ended: Vec::new(),
        operations: 0,
        undo: None,
        back: None,
        holds: None,
        cpu_max_milli: request.cpu_max_milli,
        memory_max_bytes: request.memory_max_bytes,
        cpu_min_milli: request.cpu_min_milli,
        memory_min_bytes: request.memory_min_bytes,
        foresight,
        asked_unix_msec: 0,
        booted: None,
        source: source_of(request, config)?,
        net: None,
        nics: Vec::new(),
        cid: 0,
        restart: request.restart,
        on_panic: request.on_panic,
        watchdog: request.watchdog,
        autostart: request.autostart,
        vcpus_asked: request.vcpus,
        cores: request.cores,
        restarts: 0,
    })
}

/// What lathed leaves a machine at least is no more than it begins with.
fn check_least(request: &RunRequest) -> Result<(), Problem> {
    if let Some(least) = request.cpu_min_milli.map(check_cpu).transpose()?
        && least > request.cpu_milli
    {
        let (least, now) = (MilliCpu(least), MilliCpu(request.cpu_milli));
        return Err(bad(
            "bad-amount",
            format!("at least {least} cpu is more than the {now} that it begins with"),
        )
        .fix(format!("--cpu-min {now}        or: --cpu {least}")));
    }
    if let Some(least) = request.memory_min_bytes.map(check_memory).transpose()?
        && least > request.memory_bytes
    {
        let (least, now) = (Bytes(least), Bytes(request.memory_bytes));
        let message = format!("at least {least} of memory is more than the {now} that it begins with");
        let fix = format!("--memory-min {}M        or: --memory {}M", now.0 >> 20, least.0 >> 20);
        return Err(bad("bad-amount", message).fix(fix));
    }
    Ok(())
}

/// What a new machine has of its own about its future.
fn foresight_of(request: &RunRequest) -> Result<Foresight, Problem> {
    let aggressiveness_permille = request.aggressiveness_permille.map(check_aggressiveness).transpose()?;
    Ok(Foresight { mode: request.foresight, aggressiveness_permille })
}

/// # Errors
/// `bad-amount`.
pub(super) fn check_aggressiveness(permille: u64) -> Result<u16, Problem> {
    u16::try_from(permille).ok().filter(|permille| *permille <= MAX_AGGRESSIVENESS).ok_or_else(|| {
        bad("bad-amount", format!("an aggressiveness of {permille} thousandths: 0 (careful) to 1000"))
    })
}

/// This host has no network for machines.
pub(super) fn no_host_network() -> Problem {
    let message = "this host gives no network to machines: [network] is off in its configuration";
    Problem::new(Kind::Impossible, "no-network", message).fix(
        "set enabled = true under [network] in /etc/lathe/lathe.toml, then: sudo systemctl restart lathed",
    )
}

fn check_vcpus(asked: Option<u32>, cpu_milli: u64) -> Result<(), Problem> {
    let needed = vcpus_for(cpu_milli);
    let vcpus = asked.unwrap_or(needed);
    if vcpus == 0 || vcpus > MAX_VCPUS {
        // More CPU than any machine can have is almost always more than the host has, which the books say better.
        if asked.is_none() {
            return Ok(());
        }
        return Err(bad("bad-amount", format!("{vcpus} vCPUs: between 1 and {MAX_VCPUS}")));
    }
    if vcpus < needed {
        let message = format!("{vcpus} vCPUs cannot carry {} cpu", MilliCpu(cpu_milli));
        return Err(bad("bad-amount", message).fix(format!("--vcpus {needed}, or leave it out")));
    }
    Ok(())
}

fn source_of(request: &RunRequest, config: &CoreConfig) -> Result<Source, Problem> {
    if let Some(cmdline) = &request.cmdline
        && (cmdline.len() > MAX_CMDLINE_BYTES || cmdline.contains('\0'))
    {
        let length = cmdline.len();
        let message = format!("a kernel command line of {length} bytes: at most {MAX_CMDLINE_BYTES}, no NUL");
        return Err(bad("bad-request", message));
    }
    let disks = disks_of(request, config)?;
    let kernel = match &request.kernel {
        Some(id) => Kernel::Own { upload: upload(config, id).map(|_| id.clone())? },
        None => Kernel::Host,
    };
    let initrd = match (&request.initrd, &kernel, disks.is_empty()) {
        (Some(id), ..) => Initrd::Own { upload: upload(config, id).map(|_| id.clone())? },
        (None, Kernel::Host, true) => Initrd::BuiltIn,
        (None, Kernel::Host, false) => Initrd::Host,
        (None, Kernel::Own { .. }, _) => Initrd::None,
    };
    let text = describe(request, &initrd);
    let disks = disks.into_iter().enumerate().map(|(index, disk)| Drive::first(index, disk)).collect();
    Ok(Source { kernel, initrd, disks, cmdline: request.cmdline.clone(), text })
}

fn describe(request: &RunRequest, initrd: &Initrd) -> String {
    let kernel = if request.kernel.is_some() { "own kernel" } else { "the host's kernel" };
    match (&request.image, initrd) {
        (Some(image), _) => format!("image {image}, {kernel}"),
        (None, Initrd::BuiltIn) => format!("built-in guest, {kernel}"),
        (None, _) if request.disks.is_empty() => kernel.to_owned(),
        (None, _) => format!("{} disk(s), {kernel}", request.disks.len()),
    }
}

/// Path and size of an upload.
///
/// # Errors
/// `no-such-upload`.
pub fn upload(config: &CoreConfig, id: &str) -> Result<(PathBuf, u64), Problem> {
    let fine = (1..=MAX_UPLOAD_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric());
    let path = config.uploads_dir().join(if fine { id } else { "?" });
    match fs::symlink_metadata(&path) {
        Ok(metadata) if fine && metadata.is_file() => Ok((path, metadata.len())),
        _ => {
            let shown: String = id.chars().take(MAX_UPLOAD_ID_BYTES).collect();
            Err(Problem::new(Kind::NotFound, "no-such-upload", format!("there is no upload {shown:?}"))
                .detail("uploads are kept for an hour"))
        }
    }
}

fn disks_of(request: &RunRequest, config: &CoreConfig) -> Result<Vec<Disk>, Problem> {
    let mut disks = Vec::new();
    if let Some(image) = &request.image {
        disks.push(image_disk(config, image, request.disk_size_bytes)?);
    } else if request.disk_size_bytes.is_some() {
        return Err(bad("bad-request", "a disk size without an image has nothing to enlarge"));
    }
    for disk in &request.disks {
        disks.push(match disk {
            DiskSource::Upload { id } => {
                Disk::Upload { upload: id.clone(), size_bytes: whole_sectors(upload(config, id)?.1)? }
            }
            DiskSource::Path { path, read_only } => {
                let path = allowed_path(config, Path::new(path))?;
                Disk::Path { path: path.to_string_lossy().into_owned(), read_only: *read_only }
            }
        });
    }
    if disks.len() > MAX_DISKS {
        return Err(bad("bad-request", format!("{} disks: at most {MAX_DISKS}", disks.len())));
    }
    Ok(disks)
}

/// A disk that begins as a copy of an image, enlarged to `size_bytes`.
///
/// # Errors
/// `no-such-image`, `bad-amount`.
pub fn image_disk(config: &CoreConfig, image: &str, size_bytes: Option<u64>) -> Result<Disk, Problem> {
    let file = config.images.open(image)?;
    let wanted = size_bytes.unwrap_or(file.size_bytes);
    let size_bytes = whole_sectors(wanted)?;
    if size_bytes < file.size_bytes {
        let message =
            format!("image {image} has {}, a disk of {} is too small", Bytes(file.size_bytes), Bytes(wanted));
        return Err(bad("bad-amount", message));
    }
    Ok(Disk::Image { image: image.to_owned(), size_bytes })
}

/// A disk's size in whole sectors of 512 bytes.
///
/// # Errors
/// `bad-amount` beyond what a file can be.
pub fn whole_sectors(bytes: u64) -> Result<u64, Problem> {
    let rounded = bytes.checked_next_multiple_of(512).filter(|rounded| i64::try_from(*rounded).is_ok());
    rounded.ok_or_else(|| bad("bad-amount", format!("a disk of {bytes} bytes is larger than a file can be")))
}

/// The canonical path of a disk on the host, if the configuration allows it and it is one.
///
/// # Errors
/// `disk-not-allowed`.
pub fn allowed_path(config: &CoreConfig, path: &Path) -> Result<PathBuf, Problem> {
    let not_allowed = || {
        let message = format!("{} is not a disk that this host's configuration allows", path.display());
        Problem::new(Kind::NotPermitted, "disk-not-allowed", message)
            .fix("add it to [disks] allowed in /etc/lathe/lathe.toml, or upload it: lathe run --disk FILE")
    };
    if !path.is_absolute() {
        return Err(not_allowed());
    }
    let canonical = fs::canonicalize(path).map_err(|_| not_allowed())?;
    let allowed: Vec<PathBuf> =
        config.allowed_disks.iter().filter_map(|root| fs::canonicalize(root).ok()).collect();
    if !host::is_allowed(&canonical, &allowed) || canonical.to_str().is_none() {
        return Err(not_allowed());
    }
    let metadata = fs::symlink_metadata(&canonical).map_err(|_| not_allowed())?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(not_allowed());
    }
    Ok(canonical)
}

/// What tells one disk from another, whatever it is called: device number for block devices, else file system and inode.
pub fn disk_identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    if metadata.file_type().is_block_device() {
        Some((u64::MAX, metadata.rdev()))
    } else {
        Some((metadata.dev(), metadata.ino()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::config::tests::{config, run_request};

    fn code(request: &RunRequest, config: &CoreConfig) -> &'static str {
        record_of(request, config).map_or_else(|problem| problem.code, |_| "fine")
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "web-1", &"a".repeat(28)] {
            check_name(good).unwrap();
        }
        for bad in ["", "1a", "-a", "a-", "A", "a_b", "a/b", "..", "a\0", "ä", &"a".repeat(29)] {
            assert_eq!(check_name(bad).unwrap_err().code, "bad-name", "{bad}");
        }
    }

    #[test]
    fn absurd_amounts_are_refused_before_anything_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let with = |change: fn(&mut RunRequest)| {
            let mut request = run_request("demo");
            change(&mut request);
            code(&request, &config)
        };
        assert_eq!(with(|_| {}), "fine");
        assert_eq!(with(|r| r.cpu_milli = 0), "bad-amount");
        assert_eq!(with(|r| r.memory_bytes = 0), "bad-amount");
        assert_eq!(with(|r| r.memory_bytes = (64 << 20) + 1), "bad-amount");
        assert_eq!(with(|r| r.memory_bytes = u64::MAX), "bad-amount");
        assert_eq!(with(|r| r.vcpus = Some(0)), "bad-amount");
        assert_eq!(with(|r| r.vcpus = Some(65)), "bad-amount");
        assert_eq!(with(|r| r.iops = Some(MAX_IOPS + 1)), "bad-amount");
        assert_eq!(with(|r| r.net = true), "no-network");
        assert_eq!(with(|r| r.net_bit_per_sec = Some(1_000_000)), "bad-amount");
        assert_eq!(with(|r| r.kernel = Some("../../etc/shadow".to_owned())), "no-such-upload");
        assert_eq!(with(|r| r.image = Some("none".to_owned())), "no-such-image");
        assert_eq!(with(|r| r.cmdline = Some("x".repeat(3000))), "bad-request");
        assert_eq!(with(|r| r.disk_size_bytes = Some(1)), "bad-request");
    }

    #[test]
    fn two_cpus_need_two_vcpus() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let mut request = run_request("demo");
        request.cpu_milli = 1500;
        request.vcpus = Some(1);
        assert_eq!(code(&request, &config), "bad-amount");
        request.vcpus = None;
        assert_eq!(record_of(&request, &config).unwrap().vcpus(), 2);
    }

    #[test]
    fn only_disks_that_the_configuration_allows_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let allowed = folder.path().join("allowed");
        fs::create_dir(&allowed).unwrap();
        fs::write(allowed.join("disk"), "x").unwrap();
        fs::write(folder.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), allowed.join("link")).unwrap();
        let mut config = config(folder.path());
        config.allowed_disks = vec![allowed.clone()];
        let mut request = run_request("demo");
        let mut with = |path: &Path| {
            let path = path.to_string_lossy().into_owned();
            request.disks = vec![DiskSource::Path { path, read_only: false }];
            code(&request, &config)
        };
        assert_eq!(with(&allowed.join("disk")), "fine");
        assert_eq!(with(&allowed.join("link")), "disk-not-allowed", "a link leads out");
        assert_eq!(with(&allowed.join("../secret")), "disk-not-allowed");
        assert_eq!(with(&allowed), "disk-not-allowed", "a folder is no disk");
        assert_eq!(with(Path::new("disk")), "disk-not-allowed");
    }
}
