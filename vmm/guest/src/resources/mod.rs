//! CPUs and memory of the guest, as the kernel shows and switches them through sysfs.
//!
//! - [`cpus`]: online, offline, those that have just been plugged in
//! - [`memory`]: blocks brought online
//! - [`features`]: what this guest can follow at all
//!
//! The guest only follows here: what the host has taken away it has taken away already.

pub mod cpus;
pub mod features;
pub mod memory;

/// Largest CPU number that is taken seriously (CONFIG_NR_CPUS of the largest kernels).
const MAX_CPU: u32 = 8192;

/// Numbers of a list as the kernel prints them: `0-3,5`.
pub fn parse_list(text: &str) -> Vec<u32> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            numbers.extend(first..=last.min(MAX_CPU));
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_prints_them() {
        assert_eq!(parse_list("0-3,5\n"), [0, 1, 2, 3, 5]);
        assert_eq!(parse_list("0\n"), [0]);
        assert_eq!(parse_list("\n"), [0; 0]);
        assert_eq!(parse_list("3-1,x,4-"), [0; 0]);
        assert!(parse_list("0-4294967295").len() <= MAX_CPU as usize + 1);
    }
}
