//! A profile as bytes, for the store.
//!
//! Two parts, because most of it changes slowly: the *whole*, some 200 KiB of rings and forecasters, is made anew once an hour; the *recent*
//! part, some KiB, once a minute, and holds all seconds and what has happened since. So a host with a hundred machines writes about a
//! megabyte a minute and a crash costs no more than a minute. Forecasters learn again what they learnt since the whole was made.
//!
//! ```text
//! "LTHF" part layout | first 8 bytes of the body's SHA-256 | body: postcard
//! ```
//! Whatever does not fit together is refused, and the machine begins anew.

use lathe_forecast::MAX_STATE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Resource;
use super::account::Account;
use super::forecaster::Forecaster;
use super::profile::{Profile, Reach, Track};
use super::ring::{HOUR, MINUTE, Rings};

/// Most bytes of a whole.
pub const MAX_WHOLE_BYTES: usize = 256 << 10;
/// Most bytes of a recent part.
pub const MAX_RECENT_BYTES: usize = 64 << 10;
/// Minutes after which the whole is made anew.
const WHOLE_EVERY: u64 = 60;
const MAGIC: [u8; 4] = *b"LTHF";
/// Of both parts.
const LAYOUT: u8 = 1;
const DIGEST_BYTES: usize = 8;
const HEAD_BYTES: usize = MAGIC.len() + 2 + DIGEST_BYTES;
const WHOLE: u8 = 0;
const RECENT: u8 = 1;
const ACCOUNTS: u8 = 2;
/// Most bytes of accounts.
const MAX_ACCOUNTS_BYTES: usize = 16 << 10;

/// One for each resource.
pub type Accounts = [Account; Resource::ALL.len()];

#[derive(Serialize, Deserialize)]
struct Whole {
    stamp: u64,
    tracks: Vec<WholeTrack>,
}

#[derive(Serialize, Deserialize)]
struct WholeTrack {
    resource: u8,
    rings: Rings,
    state: Vec<u8>,
    learnt: Option<u64>,
    judged: u32,
    held: u32,
}

#[derive(Serialize, Deserialize)]
struct Recent {
    stamp: u64,
    tracks: Vec<RecentTrack>,
}

#[derive(Serialize, Deserialize)]
struct RecentTrack {
    resource: u8,
    rings: Rings,
}

/// What is to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Where it is due.
    pub whole: Option<Vec<u8>>,
    /// Always.
    pub recent: Vec<u8>,
    /// What the store has afterwards, for [`Profile::stored`].
    pub reach: Reach,
}

/// What was read back.
#[derive(Debug, Default)]
pub struct Restored {
    /// What could be used.
    pub profile: Profile,
    /// What could not, and why.
    pub lost: Option<String>,
}

fn sealed(part: u8, content: &impl Serialize) -> Vec<u8> {
    // Writing to memory cannot fail.
    let body = postcard::to_stdvec(content).unwrap_or_default();
    let mut bytes = MAGIC.to_vec();
    bytes.extend([part, LAYOUT]);
    bytes.extend(&ring::digest::digest(&ring::digest::SHA256, &body).as_ref()[..DIGEST_BYTES]);
    bytes.extend(body);
    bytes
}

fn opened<T: DeserializeOwned>(part: u8, bytes: &[u8], most: usize) -> Result<T, String> {
    if bytes.len() > most {
        return Err(format!("{} bytes, at most {most} are expected", bytes.len()));
    }
    let (head, body) = bytes.split_at_checked(HEAD_BYTES).ok_or("it is cut short")?;
    if head[..4] != MAGIC || head[4] != part || head[5] != LAYOUT {
        return Err("it has another layout".to_owned());
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, body);
    if digest.as_ref()[..DIGEST_BYTES] != head[6..] {
        return Err("it is damaged".to_owned());
    }
    postcard::from_bytes(body).map_err(|cause| cause.to_string())
}

fn resource(number: u8) -> Result<Resource, String> {
    Resource::ALL.get(usize::from(number)).copied().ok_or_else(|| format!("there is no resource {number}"))
}

fn sound(rings: &Rings) -> Result<(), String> {
    if rings.sound() { Ok(()) } else { Err("its rings contradict themselves".to_owned()) }
}

/// Accounts as bytes.
pub fn save_accounts(accounts: &Accounts) -> Vec<u8> {
    sealed(ACCOUNTS, accounts)
}

/// Accounts from bytes.
///
/// # Errors
/// In words, what is wrong with them.
pub fn restore_accounts(bytes: &[u8]) -> Result<Accounts, String> {
    let accounts: Accounts = opened(ACCOUNTS, bytes, MAX_ACCOUNTS_BYTES)?;
    match accounts.iter().all(Account::sound) {
        true => Ok(accounts),
        false => Err("its accounts contradict themselves".to_owned()),
    }
}

impl Track {
    /// Newest minute and hour that are over.
    fn newest(&self) -> (u64, u64) {
        let of = |ring: &super::ring::Ring| ring.newest().unwrap_or(0);
        (of(&self.rings.minutes.mean), of(&self.rings.hours.mean))
    }
}

impl Profile {
    /// What the store has of it now.
    pub fn stored(&mut self, reach: Reach) {
        self.stored = Some(reach);
    }

    /// Bytes to store at the second `at_sec`; `None` while there is nothing.
    pub fn save(&self, at_sec: u64) -> Option<Parts> {
        let tracks = || Resource::ALL.into_iter().filter_map(|which| Some((which, self.track(which)?)));
        tracks().next()?;
        let due = self.stored.filter(|reach| !self.is_due(reach, at_sec));
        let (reach, whole) = match due {
            Some(reach) => (reach, None),
            None => {
                let newest = Resource::ALL.map(|which| self.track(which).map(Track::newest));
                let stamp = at_sec / MINUTE;
                let of = |(which, track): (Resource, &Track)| WholeTrack {
                    resource: which as u8,
                    rings: track.rings.clone(),
                    state: track.forecaster.save(),
                    learnt: track.forecaster.learnt,
                    judged: track.forecaster.judged,
                    held: track.forecaster.held,
                };
                let whole = Whole { stamp, tracks: tracks().map(of).collect() };
                (Reach { stamp, newest }, Some(sealed(WHOLE, &whole)))
            }
        };
        let of = |(which, track): (Resource, &Track)| {
            let rings = match reach.newest[which as usize] {
                Some((minute, hour)) => track.rings.after(minute, hour),
                None => track.rings.clone(),
            };
            RecentTrack { resource: which as u8, rings }
        };
        let recent = Recent { stamp: reach.stamp, tracks: tracks().map(of).collect() };
        Some(Parts { whole, recent: sealed(RECENT, &recent), reach })
    }

    /// Whether what is stored is old, or of a time that comes again.
    fn is_due(&self, reach: &Reach, at_sec: u64) -> bool {
        let again = |which: Resource| {
            let newest = self.track(which).map(Track::newest).unwrap_or_default();
            reach.newest[which as usize].is_some_and(|(minute, hour)| newest.0 < minute || newest.1 < hour)
        };
        let age = (at_sec / MINUTE).checked_sub(reach.stamp);
        age.is_none_or(|age| age >= WHOLE_EVERY) || Resource::ALL.into_iter().any(again)
    }

    /// Goes on with what was stored.
    pub fn restore(whole: Option<&[u8]>, recent: Option<&[u8]>) -> Restored {
        let Some(whole) = whole else {
            let lost = recent.map(|_| "its past is missing".to_owned());
            return Restored { lost, ..Restored::default() };
        };
        let mut profile = match Self::of_whole(whole) {
            Ok(profile) => profile,
            Err(cause) => return Restored { lost: Some(cause), ..Restored::default() },
        };
        let added = recent.ok_or_else(|| "its last hour is missing".to_owned());
        let lost = added.and_then(|recent| profile.add(recent)).err();
        Restored { profile, lost }
    }

    fn of_whole(bytes: &[u8]) -> Result<Self, String> {
        let whole: Whole = opened(WHOLE, bytes, MAX_WHOLE_BYTES)?;
        let mut profile = Self::default();
        for track in whole.tracks {
            let which = resource(track.resource)?;
            sound(&track.rings)?;
            let judged = (track.judged, track.held);
            let forecaster = Forecaster::restore(which, &track.state, track.learnt, judged)?;
            profile.tracks[which as usize] =
                Some(Box::new(Track { rings: track.rings, forecaster, ..Track::new(which) }));
        }
        let newest = Resource::ALL.map(|which| profile.track(which).map(Track::newest));
        profile.stored = Some(Reach { stamp: whole.stamp, newest });
        Ok(profile)
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), String> {
        let recent: Recent = opened(RECENT, bytes, MAX_RECENT_BYTES)?;
        if self.stored.is_none_or(|reach| reach.stamp != recent.stamp) {
            return Err("its last hour is of another time".to_owned());
        }
        for track in &recent.tracks {
            resource(track.resource)?;
            sound(&track.rings)?;
        }
        for later in recent.tracks {
            let which = resource(later.resource)?;
            let track = self.tracks[which as usize].get_or_insert_with(|| Box::new(Track::new(which)));
            track.rings.extend(&later.rings);
        }
        Ok(())
    }
}

const _: () = assert!(4 * MAX_STATE + 4 * 5 * 2 * (24 * 60 + 30 * 24 + 600) < MAX_WHOLE_BYTES);
const _: () = assert!(HOUR / MINUTE == WHOLE_EVERY);

#[cfg(test)]
mod tests {
    use super::super::demand::{Cpu, Memory, Reading};
    use super::*;

    const BEGIN: u64 = 1_790_000_000 / HOUR * HOUR;
    const SEC: u64 = 1_000_000;

    /// A machine that works for `from..to` seconds after [`BEGIN`].
    fn live(profile: &mut Profile, from: u64, to: u64) {
        for second in from..to {
            let cpu = Cpu { at_usec: second * SEC, used_usec: second * 400_000, vcpus: 1, ..Cpu::default() };
            let memory = Memory { charged_bytes: second << 16, ..Memory::default() };
            let reading = Reading { cpu: Some(cpu), memory: Some(memory), ..Reading::default() };
            profile.take(BEGIN + second, second * SEC, reading);
            if second % MINUTE == 0 {
                profile.catch_up(BEGIN + second);
            }
        }
    }

    fn same(one: &Profile, other: &Profile, at_sec: u64) {
        for which in Resource::ALL {
            let (one, other) = (one.track(which), other.track(which));
            assert_eq!(one.map(|track| &track.rings), other.map(|track| &track.rings));
            let outlook = |track: Option<&Track>| track.and_then(|track| track.forecaster.outlook(at_sec));
            assert_eq!(outlook(one), outlook(other));
        }
    }

    #[test]
    fn a_profile_comes_back_from_its_two_parts() {
        let mut profile = Profile::default();
        assert_eq!(profile.save(BEGIN), None, "there is nothing yet");
        live(&mut profile, 0, 1800);
        let first = profile.save(BEGIN + 1800).unwrap();
        let whole = first.whole.expect("it was never saved");
        profile.stored(first.reach);
        live(&mut profile, 1800, 4000);
        let second = profile.save(BEGIN + 4000).unwrap();
        assert!(second.whole.is_none(), "it is not an hour old");
        assert!(second.recent.len() < 8000, "{} bytes a minute", second.recent.len());
        let mut restored = Profile::restore(Some(&whole), Some(&second.recent));
        assert_eq!(restored.lost, None);
        restored.profile.catch_up(BEGIN + 4000);
        profile.catch_up(BEGIN + 4000);
        same(&restored.profile, &profile, BEGIN + 4000);
        let third = restored.profile.save(BEGIN + 5400).unwrap();
        assert!(third.whole.is_some(), "an hour is over");
    }

    #[test]
    fn a_clock_that_is_set_back_makes_the_whole_be_saved() {
        let mut profile = Profile::default();
        live(&mut profile, 0, 1800);
        let saved = profile.save(BEGIN + 1800).unwrap();
        profile.stored(saved.reach);
        assert!(profile.save(BEGIN + 1860).unwrap().whole.is_none());
        profile.catch_up(BEGIN + 1000);
        assert!(profile.save(BEGIN + 1000).unwrap().whole.is_some());
    }

    #[test]
    fn a_disk_that_was_added_since_is_in_the_recent_part() {
        let mut profile = Profile::default();
        live(&mut profile, 0, 300);
        let first = profile.save(BEGIN + 300).unwrap();
        profile.stored(first.reach);
        let track = profile.tracks[Resource::Iops as usize].insert(Box::new(Track::new(Resource::Iops)));
        (300..500).for_each(|second| track.rings.take(BEGIN + second, 9));
        let second = profile.save(BEGIN + 500).unwrap();
        let restored = Profile::restore(first.whole.as_deref(), Some(&second.recent));
        assert_eq!(restored.lost, None);
        assert_eq!(restored.profile.track(Resource::Iops).unwrap().rings.minutes.max.len(), 3);
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let mut profile = Profile::default();
        live(&mut profile, 0, 300);
        let parts = profile.save(BEGIN + 300).unwrap();
        let whole = parts.whole.unwrap();
        for place in (0..whole.len()).step_by(97).chain([0, 4, 5, 6, 13, whole.len() - 1]) {
            let mut damaged = whole.clone();
            damaged[place] ^= 4;
            let restored = Profile::restore(Some(&damaged), Some(&parts.recent));
            assert!(
                restored.lost.is_some() && restored.profile.track(Resource::Cpu).is_none(),
                "byte {place}"
            );
        }
        for place in 0..parts.recent.len() {
            let mut damaged = parts.recent.clone();
            damaged[place] ^= 1;
            let restored = Profile::restore(Some(&whole), Some(&damaged));
            assert!(restored.lost.is_some(), "byte {place}");
            assert!(restored.profile.track(Resource::Cpu).is_some(), "what is older is good");
        }
        for cut in [0, 3, 13, 14, 200, whole.len() - 1] {
            assert!(Profile::restore(Some(&whole[..cut]), None).lost.is_some());
        }
        assert!(Profile::restore(None, Some(&parts.recent)).lost.is_some());
        assert!(Profile::restore(None, None).lost.is_none(), "a machine that is new");
        assert!(Profile::restore(Some(&parts.recent), Some(&whole)).lost.is_some());
        let huge = vec![0; MAX_WHOLE_BYTES + 1];
        assert!(Profile::restore(Some(&huge), None).lost.unwrap().contains("at most 262144"));
    }

    #[test]
    fn parts_of_different_times_are_not_put_together() {
        let mut profile = Profile::default();
        live(&mut profile, 0, 300);
        let first = profile.save(BEGIN + 300).unwrap();
        live(&mut profile, 300, 600);
        let second = profile.save(BEGIN + 600).unwrap();
        let restored = Profile::restore(first.whole.as_deref(), Some(&second.recent));
        assert_eq!(restored.lost.as_deref(), Some("its last hour is of another time"));
    }
}
