//! Standard input and output as a machine's console.
//!
//! Two threads copy between a socket pair, whose other end is the console's stream, and the terminal. In a terminal, input is raw:
//! every key goes to the guest, except Ctrl-A followed by x, which ends the machine (and Ctrl-A Ctrl-A, which sends one Ctrl-A).

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

const CTRL_A: u8 = 1;
const STACK_BYTES: usize = 64 * 1024;
const BUFFER_BYTES: usize = 1024;

/// The terminal while it serves as console; restored when dropped.
pub struct Terminal {
    saved: Option<Termios>,
    output: Option<JoinHandle<()>>,
}

/// What a key means after what came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Send(u8),
    Escape,
    Leave,
    Nothing,
}

fn key(escaped: bool, byte: u8) -> Key {
    match (escaped, byte) {
        (false, CTRL_A) => Key::Escape,
        (true, b'x' | b'X') => Key::Leave,
        (false, _) | (true, CTRL_A) => Key::Send(byte),
        (true, _) => Key::Nothing,
    }
}

fn copy_input(mut to: &UnixStream, escapes: bool) {
    let mut escaped = false;
    let mut buffer = [0; BUFFER_BYTES];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut buffer) {
        for &byte in &buffer[..count] {
            let meaning = if escapes { key(escaped, byte) } else { Key::Send(byte) };
            escaped = meaning == Key::Escape;
            match meaning {
                Key::Send(byte) if to.write_all(&[byte]).is_err() => return,
                Key::Leave => {
                    end_machine();
                    return;
                }
                _ => {}
            }
        }
    }
}

/// Sends SIGTERM to the main thread, which takes it for a wish to end.
fn end_machine() {
    // SAFETY: getpid has no preconditions; it is the main thread's id too.
    let pid = unsafe { libc::getpid() };
    // SAFETY: a signal to a thread of our own process, which reads it from its signalfd.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGTERM) };
}

fn copy_output(mut from: UnixStream) {
    let mut buffer = [0; BUFFER_BYTES];
    let mut stdout = io::stdout();
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if stdout.write_all(&buffer[..count]).and_then(|()| stdout.flush()).is_err() {
            return;
        }
    }
}

impl Terminal {
    /// Takes standard input and output over; returns the stream for the console.
    ///
    /// # Errors
    /// When the host gives no socket pair or thread.
    pub fn open() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        let writer = ours.try_clone()?;
        let stdin = io::stdin();
        let is_terminal = stdin.is_terminal();
        let builder = || std::thread::Builder::new().stack_size(STACK_BYTES);
        let output = builder().name("console-out".to_owned()).spawn(move || copy_output(ours))?;
        let mut terminal = Self { saved: None, output: Some(output) };
        if is_terminal && let Ok(saved) = tcgetattr(stdin.as_fd()) {
            let mut raw = saved.clone();
            cfmakeraw(&mut raw);
            tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
            terminal.saved = Some(saved);
            eprint!("Ctrl-A x ends the machine\r\n");
        }
        // Never joined: it may wait for a key until the process ends.
        drop(builder().name("console-in".to_owned()).spawn(move || copy_input(&writer, is_terminal))?);
        Ok((terminal, theirs.into()))
    }

    /// Waits until all output has been written. The console's end must be closed.
    pub fn finish(&mut self) {
        if let Some(output) = self.output.take() {
            let _ = output.join();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, saved);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_escape_key_is_special() {
        assert_eq!(key(false, b'x'), Key::Send(b'x'));
        assert_eq!(key(false, CTRL_A), Key::Escape);
        assert_eq!(key(true, b'x'), Key::Leave);
        assert_eq!(key(true, CTRL_A), Key::Send(CTRL_A));
        assert_eq!(key(true, b'c'), Key::Nothing);
    }
}
