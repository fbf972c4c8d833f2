//! pvpanic: the register by which a guest's kernel says that it has panicked.
//!
//! One byte of I/O ports at [`crate::arch::x86_64::layout::PANIC_PORT`] (QEMU's docs/specs/pvpanic.rst), an ACPI device `QEMU0001`, which
//! Linux serves by pvpanic-mmio since 5.16. Read: which events there are. Write: an event. Only [`PANICKED`] is offered: a guest with
//! a crash kernel loaded looks after itself.
//!
//! The guest is believed in nothing but that it wants to say so: what it wrote to its console is cut and cleaned before it is passed on.

use crate::power::PowerAction;

/// The guest's kernel has panicked and no crash kernel takes over.
pub const PANICKED: u8 = 1;
/// Longest message that is passed on, in characters.
const MAX_MESSAGE_CHARS: usize = 200;
/// What Linux begins the first line of a panic with.
const HEADLINE: &str = "Kernel panic - not syncing: ";

/// A read of the register.
pub fn read() -> u8 {
    PANICKED
}

/// A write of `value` to the register.
pub fn write(value: u8) -> PowerAction {
    if value & PANICKED != 0 { PowerAction::Panicked } else { PowerAction::None }
}

/// What the kernel said last, from the end of the console's output: the text of the last panic, or else the last line there is.
pub fn last_words(console: &str) -> String {
    let line = match console.rfind(HEADLINE) {
        Some(at) => console[at + HEADLINE.len()..].lines().next(),
        None => console.lines().rev().find(|line| !line.trim().is_empty()),
    };
    let line = line.unwrap_or_default().trim();
    line.chars().filter(|char| !char.is_control()).take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_panic_counts() {
        assert_eq!(write(read()), PowerAction::Panicked);
        for other in [0, 2, 4, 0xfe] {
            assert_eq!(write(other), PowerAction::None, "{other:#x}");
        }
    }

    #[test]
    fn the_last_panic_is_told_cut_and_clean() {
        let console = "[    1.0] Kernel panic - not syncing: first\r\n[    9.1] Kernel panic - not syncing: \x1b[31msysrq triggered crash\r\n[    9.2] CPU: 0 PID: 1\r\n";
        assert_eq!(last_words(console), "[31msysrq triggered crash");
        assert_eq!(last_words("login:\r\nsomething else\r\n\r\n"), "something else");
        assert_eq!(last_words(""), "");
        assert_eq!(last_words(HEADLINE), "");
        assert_eq!(last_words(&"é".repeat(5000)).chars().count(), MAX_MESSAGE_CHARS);
    }
}
