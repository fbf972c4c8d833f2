//! What was typed, from the bytes that a terminal sends.
//!
//! Sequences: ECMA-48 cursor keys (`ESC [ A`), and what terminals send for them in application mode (`ESC O A`).

/// What is kept of a sequence, bytes; the rest is parameters that nobody asks for.
const MAX_SEQUENCE: usize = 8;

/// One key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A printable character, or a control character that has no name here.
    Character(char),
    /// Up.
    Up,
    /// Down.
    Down,
    /// To the first line.
    Home,
    /// To the last line.
    End,
    /// Enter.
    Enter,
    /// Escape.
    Escape,
    /// Ctrl-C: a terminal in raw mode sends no signal.
    Interrupt,
}

/// Bytes that may be the beginning of a sequence.
#[derive(Debug, Default)]
pub struct Keys {
    pending: Vec<u8>,
}

impl Keys {
    /// The keys of these bytes; what may go on is kept.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Key> {
        let mut keys = Vec::new();
        for byte in bytes {
            self.take(*byte, &mut keys);
        }
        keys
    }

    /// Whether more may follow; what follows an Escape follows at once.
    pub fn waits(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Nothing has followed: it was the key Escape.
    pub fn give_up(&mut self) -> Option<Key> {
        std::mem::take(&mut self.pending).first().map(|_| Key::Escape)
    }

    fn take(&mut self, byte: u8, keys: &mut Vec<Key>) {
        match (self.pending.as_slice(), byte) {
            ([], 0x1b) => self.pending.push(byte),
            ([], _) => keys.push(plain(byte)),
            ([0x1b], b'[' | b'O') => self.pending.push(byte),
            ([0x1b], _) => {
                keys.extend(self.give_up());
                self.take(byte, keys);
            }
            // Parameters and intermediates, then one final byte.
            (sequence, 0x20..=0x3f) => {
                if sequence.len() < MAX_SEQUENCE {
                    self.pending.push(byte);
                }
            }
            (sequence, _) => {
                keys.extend(named(sequence.get(2), byte));
                self.pending.clear();
            }
        }
    }
}

fn plain(byte: u8) -> Key {
    match byte {
        b'\r' | b'\n' => Key::Enter,
        0x03 => Key::Interrupt,
        byte => Key::Character(char::from(byte)),
    }
}

fn named(parameter: Option<&u8>, last: u8) -> Option<Key> {
    match (last, parameter) {
        (b'A', _) => Some(Key::Up),
        (b'B', _) => Some(Key::Down),
        (b'H', _) | (b'~', Some(b'1' | b'7')) => Some(Key::Home),
        (b'F', _) | (b'~', Some(b'4' | b'8')) => Some(Key::End),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrows_come_in_one_piece_or_in_several() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"j\x1b[A\x1bOB\r"), [Key::Character('j'), Key::Up, Key::Down, Key::Enter]);
        assert_eq!(keys.feed(b"\x1b"), []);
        assert!(keys.waits());
        assert_eq!(keys.feed(b"[1;5"), []);
        assert_eq!(keys.feed(b"A+"), [Key::Up, Key::Character('+')]);
        assert_eq!(keys.feed(b"\x1b[4~\x1b[1~"), [Key::End, Key::Home]);
        assert!(!keys.waits());
    }

    #[test]
    fn an_escape_that_nothing_follows_is_a_key() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"\x1b"), []);
        assert_eq!(keys.give_up(), Some(Key::Escape));
        assert_eq!(keys.give_up(), None);
        assert_eq!(keys.feed(b"\x1bq"), [Key::Escape, Key::Character('q')]);
        assert_eq!(keys.feed(b"\x03"), [Key::Interrupt]);
    }

    #[test]
    fn sequences_that_nobody_knows_are_no_keys_and_end() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"\x1b[99;99;99;99;99Zq"), [Key::Character('q')]);
        assert_eq!(keys.feed(b"\x1b[200~"), []);
        assert_eq!(keys.feed(b"q"), [Key::Character('q')]);
    }
}
