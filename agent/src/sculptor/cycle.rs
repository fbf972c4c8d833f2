//! What comes back of a resource, as amounts: what each part of the next cycle asks for.

use super::outlook::MAX_AMOUNT;
use crate::foresight::Resource;
use crate::foresight::rhythm::Cycle as Seen;

/// Most steps of a cycle.
const MAX_STEPS: usize = 1024;

/// The next cycle, from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cycle {
    /// Length of a step, milliseconds; at least 1.
    pub step_msec: u64,
    /// How much of the first step is over, milliseconds.
    pub over_msec: u64,
    /// What each step asks for at most; the first is the one that goes on. As many as one cycle has, at least one.
    pub steps: Vec<u64>,
    /// Cycles in a row that were alike.
    pub cycles: u32,
}

impl Cycle {
    /// Takes one over as it stands at `now_sec` since the epoch, in the unit of the resource. `None` where it has no steps.
    pub fn of(seen: &Seen, resource: Resource, now_sec: u64) -> Option<Self> {
        let step_sec = seen.step_sec.max(1);
        let passed = now_sec.saturating_sub(seen.from_sec);
        let amount = |grains: &f32| (grains.ceil() as u64).saturating_mul(resource.grain()).min(MAX_AMOUNT);
        let mut steps: Vec<u64> = seen.rhythm.ahead.iter().take(MAX_STEPS).map(amount).collect();
        let length = steps.len();
        // The steps that are over come again at its end.
        steps.rotate_left(usize::try_from(passed / step_sec).unwrap_or(0).checked_rem(length)?);
        let (step_msec, over_msec) = (step_sec * 1000, passed % step_sec * 1000);
        Some(Self { step_msec, over_msec, steps, cycles: seen.rhythm.cycles })
    }

    /// Length of a cycle, milliseconds; at least 1.
    pub fn period_msec(&self) -> u64 {
        self.step_msec.saturating_mul(self.steps.len() as u64).max(1)
    }

    /// The most that is asked for in the steps that begin within so many milliseconds.
    pub fn top(&self, within_msec: u64) -> u64 {
        let steps = within_msec.saturating_add(self.over_msec) / self.step_msec.max(1);
        let steps = usize::try_from(steps).unwrap_or(usize::MAX).saturating_add(1);
        self.steps.iter().take(steps).copied().max().unwrap_or(0)
    }

    /// The most that is asked for from the first step above `amount` until it is below that again; 0 when there is none.
    pub fn burst(&self, amount: u64) -> u64 {
        let above = self.steps.iter().skip_while(|step| **step <= amount);
        above.take_while(|step| **step > amount).copied().max().unwrap_or(0)
    }

    /// How long no more than `amount` is asked for, milliseconds; `None`: in all of the cycle.
    pub fn quiet_msec(&self, amount: u64) -> Option<u64> {
        let steps = self.steps.iter().position(|step| *step > amount)?;
        Some((steps as u64).saturating_mul(self.step_msec).saturating_sub(self.over_msec))
    }

    /// Levels below `amount`: what is asked for at most until each of its rises.
    pub fn levels(&self, amount: u64) -> Vec<u64> {
        let mut levels = Vec::new();
        for step in self.steps.iter().take_while(|step| **step < amount) {
            if levels.last().is_none_or(|last| step > last) {
                levels.push(*step);
            }
        }
        levels
    }
}

#[cfg(test)]
mod tests {
    use lathe_forecast::Rhythm;

    use super::*;

    fn seen(ahead: Vec<f32>) -> Seen {
        Seen { from_sec: 100, step_sec: 10, rhythm: Rhythm { period: ahead.len() as f32, cycles: 3, ahead } }
    }

    #[test]
    fn what_is_over_of_a_cycle_comes_again_at_its_end() {
        let seen = seen(vec![100.0, 900.0, 900.0, 100.2, 50.0, 50.0]);
        let cycle = Cycle::of(&seen, Resource::Cpu, 134).unwrap();
        assert_eq!(cycle.steps, [101, 50, 50, 100, 900, 900]);
        assert_eq!((cycle.over_msec, cycle.period_msec()), (4000, 60_000));
        assert_eq!(
            cycle,
            Cycle { steps: cycle.steps.clone(), ..Cycle::of(&seen, Resource::Cpu, 134 + 60).unwrap() }
        );
        assert_eq!(Cycle::of(&seen, Resource::Memory, 100).unwrap().steps[1], 900 * 4096);
        assert_eq!(Cycle::of(&seen, Resource::Cpu, 0).unwrap().over_msec, 0, "a clock that was set back");
    }

    #[test]
    fn what_is_near_and_how_long_it_is_quiet() {
        let cycle = Cycle::of(&seen(vec![60.0, 50.0, 80.0, 900.0, 700.0, 50.0]), Resource::Cpu, 105).unwrap();
        assert_eq!([0, 4999, 15_000, 24_999, 25_000].map(|within| cycle.top(within)), [60, 60, 80, 80, 900]);
        assert_eq!([50, 80, 800, 900].map(|amount| cycle.burst(amount)), [60, 900, 900, 0]);
        assert_eq!(
            [50, 60, 80, 900].map(|amount| cycle.quiet_msec(amount)),
            [Some(0), Some(15_000), Some(25_000), None]
        );
        assert_eq!((cycle.levels(900), cycle.levels(70)), (vec![60, 80], vec![60]));
    }

    #[test]
    fn nonsense_becomes_something_bounded() {
        assert_eq!(Cycle::of(&seen(Vec::new()), Resource::Cpu, 100), None);
        let odd = vec![f32::NAN, f32::INFINITY, -3.0, f32::MAX];
        let cycle = Cycle::of(&seen(odd), Resource::Memory, u64::MAX).unwrap();
        assert!(cycle.steps.iter().all(|amount| *amount <= MAX_AMOUNT));
        assert!(cycle.over_msec < cycle.step_msec);
    }
}
