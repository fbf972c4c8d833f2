//! Who is told by name: the most demanding. The others are told as one.

use lathe_guest::protocol::inside::{Application, MAX_APPLICATIONS, MAX_NAME_BYTES};

/// Who is told.
#[derive(Debug, Default)]
pub struct Choice {
    /// One by one, the most demanding first.
    pub named: Vec<Application>,
    /// The others as one.
    pub others: Option<Application>,
    /// How many these are.
    pub others_count: u32,
}

/// How demanding it is: the largest of its shares of CPU and memory and of its waiting for disks, parts per thousand.
pub fn demand(application: &Application, cpus: u64, memory_bytes: u64) -> u64 {
    let cpu = application.cpu_milli / cpus.max(1);
    let memory = u128::from(application.working_set_bytes) * 1000 / u128::from(memory_bytes.max(1));
    let io = application.io_some_permille.unwrap_or(0);
    cpu.max(u64::try_from(memory).unwrap_or(u64::MAX)).max(io.into())
}

/// Chooses among applications of a machine with so many CPUs and so much memory.
pub fn choose(mut found: Vec<Application>, cpus: u64, memory_bytes: u64) -> Choice {
    // By name among equals, so that what is idle does not change places each second.
    found.sort_by(|one, other| {
        let by = |of: &Application| demand(of, cpus, memory_bytes);
        by(other).cmp(&by(one)).then_with(|| one.name.cmp(&other.name))
    });
    let rest = found.split_off(found.len().min(MAX_APPLICATIONS));
    for application in &mut found {
        cut(&mut application.name, MAX_NAME_BYTES);
    }
    let others_count = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    let nameless = |application: Application| Application { name: String::new(), ..application };
    Choice { named: found, others: rest.into_iter().map(nameless).reduce(sum), others_count }
}

fn sum(mut sum: Application, other: Application) -> Application {
    let add = |one: &mut u64, other: u64| *one = one.saturating_add(other);
    add(&mut sum.cpu_milli, other.cpu_milli);
    add(&mut sum.memory_bytes, other.memory_bytes);
    add(&mut sum.anon_bytes, other.anon_bytes);
    add(&mut sum.file_bytes, other.file_bytes);
    add(&mut sum.working_set_bytes, other.working_set_bytes);
    add(&mut sum.read_bytes_per_sec, other.read_bytes_per_sec);
    add(&mut sum.written_bytes_per_sec, other.written_bytes_per_sec);
    sum.operations_per_sec = match (sum.operations_per_sec, other.operations_per_sec) {
        (Some(one), Some(other)) => Some(one.saturating_add(other)),
        (one, other) => one.or(other),
    };
    // Shares of time do not add up: of several the longest is at least true.
    sum.cpu_some_permille = sum.cpu_some_permille.max(other.cpu_some_permille);
    sum.memory_some_permille = sum.memory_some_permille.max(other.memory_some_permille);
    sum.io_some_permille = sum.io_some_permille.max(other.io_some_permille);
    sum
}

/// The longest beginning of at most so many bytes.
pub fn cut(name: &mut String, most: usize) {
    let end = (0..=most.min(name.len())).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    name.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn application(name: &str, cpu_milli: u64, working_set_bytes: u64) -> Application {
        Application { name: name.into(), cpu_milli, working_set_bytes, ..Application::default() }
    }

    #[test]
    fn the_most_demanding_are_named_and_the_others_are_one() {
        let mut found: Vec<_> = (0..40).map(|at| application(&format!("idle-{at:02}"), 1, 10)).collect();
        found.push(application("eats", 0, 900));
        found.push(application("spins", 2000, 0));
        let choice = choose(found, 2, 1000);
        let names: Vec<_> = choice.named.iter().map(|one| one.name.as_str()).take(3).collect();
        assert_eq!(names, ["spins", "eats", "idle-00"]);
        assert_eq!((choice.named.len(), choice.others_count), (32, 10));
        let others = choice.others.unwrap();
        assert_eq!((others.name.as_str(), others.cpu_milli, others.working_set_bytes), ("", 10, 100));
        let few = choose(vec![application(&"ä".repeat(100), 1, 1)], 0, 0);
        assert_eq!((few.named[0].name.len(), few.others), (MAX_NAME_BYTES, None));
    }
}
