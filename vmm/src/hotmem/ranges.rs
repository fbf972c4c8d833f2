//! A set of byte ranges, kept as the fewest that describe it. Its size follows its fragments, so a dormant region costs nothing.

use std::collections::BTreeMap;
use std::ops::Range;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// End by start; no two touch.
    runs: BTreeMap<u64, u64>,
    bytes: u64,
}

impl RangeSet {
    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The ranges in order; neither overlapping nor adjacent.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|(&start, &end)| start..end)
    }

    /// The last run that begins at or before `at`.
    fn before(&self, at: u64) -> Option<Range<u64>> {
        self.runs.range(..=at).next_back().map(|(&start, &end)| start..end)
    }

    /// Whether all of `range` is in the set; an empty one is.
    pub fn contains(&self, range: &Range<u64>) -> bool {
        range.is_empty() || self.before(range.start).is_some_and(|run| run.end >= range.end)
    }

    /// Whether any of `range` is in the set.
    pub fn intersects(&self, range: &Range<u64>) -> bool {
        !range.is_empty() && self.before(range.end - 1).is_some_and(|run| run.end > range.start)
    }

    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        // Everything that overlaps or touches becomes part of it.
        while let Some(run) = self.before(end).filter(|run| run.end >= start) {
            self.runs.remove(&run.start);
            self.bytes -= run.end - run.start;
            start = start.min(run.start);
            end = end.max(run.end);
        }
        self.runs.insert(start, end);
        self.bytes += end - start;
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: &Range<u64>) {
        while let Some(run) =
            self.before(range.end.saturating_sub(1)).filter(|run| !range.is_empty() && run.end > range.start)
        {
            self.runs.remove(&run.start);
            self.bytes -= run.end - run.start;
            for rest in [run.start..range.start, range.end..run.end] {
                if !rest.is_empty() {
                    self.bytes += rest.end - rest.start;
                    self.runs.insert(rest.start, rest.end);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BITS: u64 = 64;

    fn same(set: &RangeSet, bits: &[bool]) -> Result<(), TestCaseError> {
        let mut runs = Vec::new();
        for (at, &bit) in (0u64..).zip(bits) {
            match runs.last_mut() {
                Some(Range { end, .. }) if bit && *end == at => *end += 1,
                _ if bit => runs.push(at..at + 1),
                _ => {}
            }
        }
        prop_assert_eq!(set.runs().collect::<Vec<_>>(), runs);
        prop_assert_eq!(set.bytes(), bits.iter().filter(|b| **b).count() as u64);
        Ok(())
    }

    proptest! {
        #[test]
        fn it_is_what_a_bitmap_would_be(
            steps in prop::collection::vec((any::<bool>(), 0..BITS, 0..12u64), 1..80)
        ) {
            let (mut set, mut bits) = (RangeSet::default(), vec![false; BITS as usize]);
            for (add, start, length) in steps {
                let range = start..(start + length).min(BITS);
                let part = &bits[range.start as usize..range.end as usize];
                prop_assert_eq!(set.contains(&range), part.iter().all(|b| *b));
                prop_assert_eq!(set.intersects(&range), part.iter().any(|b| *b));
                bits[range.start as usize..range.end as usize].fill(add);
                if add { set.insert(range) } else { set.remove(&range) }
                same(&set, &bits)?;
            }
        }
    }
}
