//! What was decided and accounted for, over the end of a lathed: with the profiles once a minute, decisions only when there are others.
//!
//! Decisions are kept as they are shown, for nobody decides by them: a later release may show more, and weighs as it likes.

use crate::api::wire::foresight::DecisionView;
use crate::foresight::kept::{restore_accounts, save_accounts};
use crate::machines::core::Entry;
use crate::store::Past;

use super::{Came, why};

/// Most bytes of decisions that are read back.
const MAX_BYTES: usize = 256 << 10;
/// What became of what was being carried out.
const UNKNOWN: &str = "lathed ended while it was carried out, and did not see how that ended";

/// What is to be stored of a machine, and the number of these decisions for [`stored`].
pub fn save(entry: &Entry, past: &mut Past) -> Option<u64> {
    let (accounts, decisions) = entry.sculpted(|sculpted| {
        let decisions = sculpted.to_store().map(|changes| (changes, why::decisions(sculpted)));
        (save_accounts(&sculpted.accounts), decisions)
    });
    past.accounts = Some(accounts);
    let (changes, decisions) = decisions?;
    // Of plain values: it cannot fail.
    past.decisions = serde_json::to_vec(&decisions).ok();
    Some(changes)
}

/// The store has these decisions.
pub fn stored(entry: &Entry, changes: u64) {
    entry.sculpted(|sculpted| sculpted.stored(changes));
}

/// Puts back what is known; what is not, is measured and decided again.
pub fn restore(entry: &Entry, accounts: Option<&[u8]>, decisions: Option<&[u8]>) {
    let lost = |what: &str, cause: &str| {
        tracing::warn!(machine = entry.name, "{what} before is not known any more: {cause}");
    };
    let accounts = accounts.and_then(|bytes| {
        restore_accounts(bytes).inspect_err(|cause| lost("how its grants met what it asked for", cause)).ok()
    });
    let read = |bytes| read(bytes).inspect_err(|cause| lost("what was decided about it", cause));
    let before = decisions.and_then(|bytes| read(bytes).ok()).unwrap_or_default();
    entry.sculpted(|sculpted| sculpted.recall(accounts, before));
}

fn read(bytes: &[u8]) -> Result<Vec<DecisionView>, String> {
    if bytes.len() > MAX_BYTES {
        return Err(format!("{} bytes, at most {MAX_BYTES} are expected", bytes.len()));
    }
    let mut before: Vec<DecisionView> = serde_json::from_slice(bytes).map_err(|cause| cause.to_string())?;
    for decision in before.iter_mut().filter(|decision| decision.outcome == Came::UnderWay.word()) {
        (decision.outcome, decision.reason) = ("unknown".to_owned(), UNKNOWN.to_owned());
    }
    Ok(before)
}
