//! The system call filter: installed on all threads when the machine has been started and before guest code runs for the first
//! time, so a guest that takes the monitor over finds a process that can open, connect, execute and trace nothing.
//!
//! An allow-list; whatever is not on it fails with EPERM. Rings of io_uring and devices exist by then, so what makes them is not on
//! the list. Threads can be made, for vCPUs that are plugged in later, but no processes: `clone` has the flags of a thread, and
//! `clone3`, whose flags lie in memory where no filter sees them, is answered by a second filter as if the kernel did not know it
//! (ENOSYS), upon which the C library takes `clone`. `mmap` and `mprotect` give no executable memory, `tgkill` reaches this process only,
//! `socketpair` makes Unix sockets only, and `ioctl` has the types of KVM, tap and terminal, and block devices.
//!
//! io_uring could go around the filter; its rings are restricted to what disks need when they are made (`virtio::block`), and no
//! new one can be made. Of `io_uring_register` only the exchange of files is allowed, by which a ring made in advance gets a disk. seccomp(2), first in Linux 3.17; synchronising threads too.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::virtio::block::REGISTER_FILES_UPDATE;

/// System calls that any argument may be given to.
const ALLOWED: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    // See `unknown_clone3`, which comes before.
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What pthread_create(3) of glibc and musl gives to clone(2). musl's obsolete CLONE_DETACHED is ignored by the kernel.
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
const THREAD_FLAGS_MASK: u64 = !(libc::CLONE_DETACHED as u64);

/// Types of ioctl requests: KVM, terminals and tap, block devices.
const IOCTL_TYPES: [u64; 3] = [0xae00, 0x5400, 0x1200];
const IOCTL_TYPE_MASK: u64 = 0xff00;

/// The filter could not be built or installed.
#[derive(Debug, thiserror::Error)]
#[error("the system call filter cannot be installed: {0}")]
pub struct SandboxError(String);

/// What else the process needs besides serving its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// Nothing: descriptors were handed in and sockets belong to somebody else.
    None,
    /// It removes sockets that it has made itself.
    Unlink,
}

fn only_if(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
    condition.and_then(|c| SeccompRule::new(vec![c])).map_err(|e| SandboxError(e.to_string()))
}

/// A filter that answers `clone3` with ENOSYS, where EPERM would make the C library give up. The kernel asks all filters and takes the
/// strictest answer, of equal ones the last filter's: so the allow-list has to let the call pass.
fn unknown_clone3() -> Result<BpfProgram, SandboxError> {
    let failed = |e: seccompiler::BackendError| SandboxError(e.to_string());
    let rules = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, unknown, TargetArch::x86_64).map_err(failed)?;
    filter.try_into().map_err(failed)
}

fn program(extra: Extra) -> Result<BpfProgram, SandboxError> {
    let failed = |e: seccompiler::BackendError| SandboxError(e.to_string());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|&call| (call, vec![])).collect();
    let not_executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![only_if(2, not_executable.clone(), 0)?]);
    }
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![only_if(0, SeccompCmpOp::Eq, own)?]);
    let a_thread = SeccompCmpOp::MaskedEq(THREAD_FLAGS_MASK & u64::from(u32::MAX));
    rules.insert(libc::SYS_clone, vec![only_if(0, a_thread, THREAD_FLAGS)?]);
    rules.insert(libc::SYS_prctl, vec![only_if(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?]);
    rules.insert(libc::SYS_socketpair, vec![only_if(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?]);
    let exchange = u64::from(REGISTER_FILES_UPDATE);
    rules.insert(libc::SYS_io_uring_register, vec![only_if(1, SeccompCmpOp::Eq, exchange)?]);
    let types: Result<Vec<_>, _> =
        IOCTL_TYPES.iter().map(|&kind| only_if(1, SeccompCmpOp::MaskedEq(IOCTL_TYPE_MASK), kind)).collect();
    rules.insert(libc::SYS_ioctl, types?);
    if extra == Extra::Unlink {
        rules.insert(libc::SYS_unlink, vec![]);
    }
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    let filter =
        SeccompFilter::new(rules, denied, SeccompAction::Allow, TargetArch::x86_64).map_err(failed)?;
    filter.try_into().map_err(failed)
}

/// Filters all threads of the process from now on, for ever.
///
/// # Errors
/// When the kernel refuses; nothing but `clone3` is filtered then.
pub fn enter(extra: Extra) -> Result<(), SandboxError> {
    for program in [unknown_clone3()?, program(extra)?] {
        seccompiler::apply_filter_all_threads(&program).map_err(|e| SandboxError(e.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};
    use std::os::fd::AsRawFd;

    /// Whether the filter has refused the last call.
    fn denied() -> bool {
        std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
    }

    /// Each attempt, whether it worked, and whether it must still work.
    #[allow(clippy::multiple_unsafe_ops_per_block, reason = "one harmless system call per line")]
    fn attempts(tap: i32) -> Vec<(&'static str, bool, bool)> {
        // SAFETY: plain system calls with valid or harmless arguments; each result is only compared.
        unsafe {
            vec![
                ("open", libc::open(c"/etc/hostname".as_ptr(), libc::O_RDONLY) >= 0, false),
                ("socket", libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) >= 0, false),
                ("kill", libc::kill(libc::getppid(), 0) == 0, false),
                ("exec", libc::execv(c"/bin/true".as_ptr(), [std::ptr::null()].as_ptr()) == 0, false),
                ("fork", libc::syscall(libc::SYS_fork) >= 0, false),
                ("clone", libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) >= 0, false),
                (
                    "thread in a namespace of its own",
                    libc::syscall(libc::SYS_clone, THREAD_FLAGS | libc::CLONE_NEWUSER as u64, 0, 0, 0, 0)
                        >= 0,
                    false,
                ),
                ("clone3", libc::syscall(libc::SYS_clone3, [0u64; 8].as_ptr(), 64) >= 0, false),
                ("dumpable", libc::prctl(libc::PR_SET_DUMPABLE, 1) == 0, false),
                ("ring", libc::syscall(libc::SYS_io_uring_setup, 8, std::ptr::null::<u8>()) >= 0, false),
                (
                    "ring set-up",
                    libc::syscall(libc::SYS_io_uring_register, -1, 2, 0, 0) < 0 && denied(),
                    true,
                ),
                (
                    "ring's files",
                    libc::syscall(libc::SYS_io_uring_register, -1, 6, 0, 0) < 0 && denied(),
                    false,
                ),
                ("limits", libc::setpriority(libc::PRIO_PROCESS, 0, 0) == 0, false),
                ("unlink", libc::unlink(c"/nonexistent-lathe".as_ptr()) == 0, false),
                (
                    "executable memory",
                    libc::mmap(
                        std::ptr::null_mut(),
                        4096,
                        libc::PROT_EXEC,
                        libc::MAP_PRIVATE | libc::MAP_ANON,
                        -1,
                        0,
                    ) != libc::MAP_FAILED,
                    false,
                ),
                ("foreign ioctl", libc::ioctl(tap, 0x8901, 0) == 0, false),
                ("thread", named_thread().is_ok(), true),
                ("memory", !libc::malloc(1 << 20).is_null(), true),
                ("eventfd", libc::eventfd(0, 0) >= 0, true),
                ("own signal", libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0) == 0, true),
            ]
        }
    }

    /// As vCPU threads are made.
    fn named_thread() -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name("vcpu7".into()).stack_size(128 * 1024);
        thread
            .spawn(|| assert_eq!(std::thread::current().name(), Some("vcpu7")))?
            .join()
            .map_err(|_| std::io::Error::other("the thread panicked"))
    }

    #[test]
    fn a_filtered_process_can_open_connect_run_and_signal_nothing() {
        let null = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: the child makes system calls and leaves by _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let wrong = match enter(Extra::None) {
                    Ok(()) => {
                        attempts(null.as_raw_fd()).iter().position(|(_, works, should)| works != should)
                    }
                    Err(_) => Some(100),
                };
                // SAFETY: ends the child without unwinding into the test harness.
                unsafe { libc::_exit(wrong.map_or(0, |index| index as i32 + 1)) }
            }
            ForkResult::Parent { child } => {
                let status = waitpid(child, None).unwrap();
                assert_eq!(status, WaitStatus::Exited(child, 0), "attempt number (from 1) went wrong");
            }
        }
    }
}
