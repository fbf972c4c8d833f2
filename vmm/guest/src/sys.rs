//! System calls that have no safe wrapper in the standard library or nix. All unsafe code of this crate is here.

use std::ffi::{CStr, c_int};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

/// Connections that wait to be accepted; as many as there may be sessions.
const BACKLOG: c_int = 64;

/// How a process ended, as wait(2) reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// exit(status).
    Exited(i32),
    /// Killed by this signal, real-time signals included (nix's enum has none).
    Signaled(i32),
}

/// One ended child of ours, if there is one; `None` while all run.
///
/// # Errors
/// `ECHILD` when there are no children.
pub fn wait_any() -> io::Result<Option<(i32, Ended)>> {
    let mut status: c_int = 0;
    // SAFETY: `status` is a valid place for an int during the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid if libc::WIFSIGNALED(status) => Ok(Some((pid, Ended::Signaled(libc::WTERMSIG(status))))),
        pid => Ok(Some((pid, Ended::Exited(libc::WEXITSTATUS(status))))),
    }
}

/// A descriptor that becomes readable when process `pid` ends (Linux 5.3).
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// Loads a kernel module that is not compressed.
///
/// # Errors
/// As finit_module(2); `EEXIST` when it is loaded already.
pub fn finit_module(file: &File, parameters: &CStr) -> io::Result<()> {
    // SAFETY: the descriptor is open and the string ends with a zero for the duration of the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Makes the child a session leader; with `terminal`, its standard input becomes the controlling terminal.
pub fn in_new_session(command: &mut Command, terminal: bool) {
    let prepare = move || {
        nix::unistd::setsid()?;
        // As PID 1 we block signals in order to wait for them; the command starts with none blocked.
        nix::sys::signal::SigSet::empty().thread_set_mask()?;
        if terminal {
            // SAFETY: TIOCSCTTY takes an integer; descriptor 0 is the child's terminal by now.
            let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
            nix::errno::Errno::result(result)?;
        }
        Ok(())
    };
    // SAFETY: after fork only setsid, pthread_sigmask and ioctl are called, all async-signal-safe; nothing is allocated.
    unsafe { command.pre_exec(prepare) };
}

/// Sets a terminal's size.
///
/// # Errors
/// As ioctl_tty(2).
pub fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
    let result = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends any signal, real-time ones included, to a process or (negative) a process group. 0 only tests.
///
/// # Errors
/// As kill(2).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers.
    let result = unsafe { libc::kill(pid, signal) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Listens on a vsock port on all addresses of this guest.
///
/// # Errors
/// `EAFNOSUPPORT` without the vsock module, `EADDRINUSE` when another listens.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let listener = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Accepts one connection.
///
/// # Errors
/// As accept(2).
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let fd = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Joins a multicast group of a netlink socket (netlink(7)).
///
/// # Errors
/// As setsockopt(2).
pub fn join_netlink_group(socket: &OwnedFd, group: u32) -> io::Result<()> {
    let size = size_of::<u32>() as libc::socklen_t;
    let value = (&raw const group).cast();
    // SAFETY: NETLINK_ADD_MEMBERSHIP reads `size` bytes, one number, which lives through the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, value, size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Size of a page of memory, bytes.
pub fn page_bytes() -> u64 {
    // SAFETY: sysconf takes an integer and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}

/// Keeps the allocator to one arena: every thread's own would cost memory that guests pay for.
pub fn small_heap() {
    // SAFETY: mallopt is called before any thread exists.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
