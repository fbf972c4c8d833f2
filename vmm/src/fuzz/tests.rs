//! The bounded run: the committed corpus, then some mutations of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{TARGETS, Target};

/// Longest input made.
const MAX_BYTES: usize = 4096;

/// splitmix64: good enough to choose bytes, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start).min(64) + 1)
    }

    /// Changes an input in one way.
    fn change(&mut self, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let place = self.below(input.len() + 1);
        match self.below(8) {
            0 | 1 if place < input.len() => input[place] ^= 1 << self.below(8),
            2 if place < input.len() => input[place] = self.next() as u8,
            3 if place < input.len() => input[place] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
            4 => {
                let range = self.range(input.len());
                input.drain(range);
            }
            5 => {
                let count = self.below(32);
                let bytes = self.bytes(count);
                input.splice(place..place, bytes);
            }
            6 => {
                let other = &corpus[self.below(corpus.len())];
                let range = self.range(other.len());
                let part = other[range].to_vec();
                input.splice(place..place, part);
            }
            _ => {
                let count = self.below(200);
                let bytes = self.bytes(count);
                input.extend(bytes);
            }
        }
        input.truncate(MAX_BYTES);
    }
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

/// Inputs of a target in the order of their names.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let entries =
        std::fs::read_dir(folder(name)).unwrap_or_else(|error| panic!("{}: {error}", folder(name).display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<_> =
        text.chars().map(|digit| digit.to_digit(16).expect("a hexadecimal digit") as u8).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Runs one input; a panic goes on with the input named.
fn attempt(target: &Target, input: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
        let (name, hex) = (target.name, hex(input));
        panic!(
            "{what} is a finding. Alone: LATHE_FUZZ_INPUT={hex} cargo test -p lathe-vmm --lib fuzz::tests::{name}"
        );
    }
}

fn bounded(name: &str, rounds: u64) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    if let Ok(text) = std::env::var("LATHE_FUZZ_INPUT") {
        return attempt(target, &unhex(&text), "the input given");
    }
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    for (place, input) in corpus.iter().enumerate() {
        attempt(target, input, &format!("input {place} of the corpus"));
    }
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let seed = number("LATHE_FUZZ_SEED").unwrap_or_else(now);
    let rounds = number("LATHE_FUZZ_ROUNDS").unwrap_or(rounds);
    println!("{name}: {} inputs, then {rounds} mutations with LATHE_FUZZ_SEED={seed}", corpus.len());
    let mut dice = Dice(seed);
    for round in 0..rounds {
        let mut input = corpus[dice.below(corpus.len())].clone();
        for _ in 0..=dice.below(6) {
            dice.change(&mut input, &corpus);
        }
        attempt(target, &input, &format!("mutation {round} of LATHE_FUZZ_SEED={seed}"));
    }
}

/// One test per target, with as many mutations as take two seconds or so in a build without optimisation.
macro_rules! targets {
    ($($name:ident: $rounds:expr,)*) => {
        $(#[test] fn $name() { bounded(stringify!($name), $rounds); })*

        #[test]
        fn every_target_has_a_test_and_a_program_for_cargo_fuzz() {
            let tested = [$(stringify!($name)),*];
            let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz");
            let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
            for target in TARGETS {
                assert!(tested.contains(&target.name), "{}", target.name);
                assert!(manifest.contains(&format!("name = \"{}\"", target.name)), "{}", target.name);
                assert!(root.join(format!("fuzz_targets/{}.rs", target.name)).exists(), "{}", target.name);
            }
        }
    };
}

targets! {
    block: 300,
    net: 200,
    vsock: 300,
    rng: 300,
    balloon: 500,
    mem: 600,
    ports: 300,
    pci: 300,
    control: 100,
    image: 600,
    frames: 5000,
}

#[test]
fn the_corpus_is_small() {
    let mut total = 0;
    for target in TARGETS {
        let sizes: Vec<_> = corpus(target.name).iter().map(Vec::len).collect();
        assert!(sizes.len() <= 200 && sizes.iter().all(|size| *size <= MAX_BYTES), "{}", target.name);
        total += sizes.iter().sum::<usize>();
    }
    assert!(total <= 1_500_000, "{total} bytes");
}
