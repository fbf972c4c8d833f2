//! Bytes as a sequence of decisions. What is left when they run out is zeroes, so every input means something.

/// Where decisions come from.
pub struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    /// From an input.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// There is nothing left to decide.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `N` bytes.
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let part = self.bytes(N);
        out[..part.len()].copy_from_slice(part);
        out
    }

    /// Up to `count` bytes; fewer at the end.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (part, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        part
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    pub fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn dword(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn qword(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Something below `bound`, at most 256.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound.max(1)
    }

    /// One time in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == times - 1
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A number that is often at an edge.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => u64::MAX - u64::from(self.byte()),
            4 => self.qword(),
            5 => u64::from(self.dword()),
            6 => u64::from(self.word()),
            _ => u64::from(self.byte()),
        }
    }
}
