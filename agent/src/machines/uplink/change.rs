//! Sharing of the uplink is asked for, or not wanted any more.

use lathe_netshape::RootQueue;
use lathe_shard::{BitRate, Shape};

use super::super::core::Core;
use super::super::{Machines, spec};
use super::{
    Phase, Sharing, Stored, booked, fill, note, plan, put_back, replaced, secure, settle, show, store,
};
use crate::api::wire::{PlanStep, PlanView, SCHEMA, UplinkRequest, UplinkView};
use crate::host::books::Books;
use crate::problem::{Kind, Problem};

/// What a request leads to.
struct Intent {
    device: String,
    capacity: u64,
    /// What is at the root now, or was before it was ours.
    before: RootQueue,
    /// What is stored already.
    earlier: Option<Stored>,
}

impl Intent {
    fn stored(&self, phase: Phase) -> Stored {
        Stored {
            device: self.device.clone(),
            capacity_bit_per_sec: self.capacity,
            before: self.before.clone(),
            phase,
        }
    }

    /// The capacity now; `None` where the uplink is not shared.
    fn capacity_now(&self) -> Option<u64> {
        let earlier = self.earlier.as_ref().filter(|earlier| earlier.phase == Phase::Enabled);
        earlier.map(|earlier| earlier.capacity_bit_per_sec)
    }
}

impl Machines {
    /// The uplink and what machines have of it.
    pub async fn uplink(&self) -> UplinkView {
        // Who looks keeps no machine waiting while the kernel tells what it has.
        let sharing = self.core.uplink.lock().await.clone();
        show::view(&self.core, &sharing).await
    }

    /// Shares the uplink, or gives it another capacity; twice is once. Answers when it is shared; what of single machines is not in
    /// force then is in the answer.
    ///
    /// # Errors
    /// `no-network`, `no-uplink`, `no-such-device`, `bad-name`, `bad-amount`, `uplink-capacity-unknown`, `uplink-queue`, `uplink-busy`,
    /// `uplink-replaced`, `net-over-capacity`, `store`, `internal`; then nothing changed.
    pub async fn enable_uplink(&self, request: &UplinkRequest) -> Result<UplinkView, Problem> {
        let core = &self.core;
        let mut sharing = core.uplink.lock().await;
        let intent = intent(core, &sharing, request).await?;
        match intent.capacity_now() {
            Some(now) if now == intent.capacity => settle(core, &mut sharing).await,
            Some(now) => change(core, &mut sharing, &intent, now).await?,
            None => share(core, &mut sharing, &intent).await?,
        }
        Ok(show::view(core, &sharing).await)
    }

    /// What [`Machines::enable_uplink`] would do.
    ///
    /// # Errors
    /// The same, as far as they can be known.
    pub async fn plan_uplink(&self, request: &UplinkRequest) -> Result<PlanView, Problem> {
        let core = &self.core;
        let sharing = core.uplink.lock().await;
        let intent = intent(core, &sharing, request).await?;
        let mut books: Books = core.with_books(|books| books.clone());
        reserve(&mut books, &intent.device, intent.capacity)?;
        let (device, before) = (&intent.device, &intent.before);
        let how = match intent.capacity_now() {
            Some(_) => format!("{device}, in place"),
            None => format!(
                "HTB at the root of {device}; what is there now ({before}) comes back with lathe host uplink disable"
            ),
        };
        let from = intent.capacity_now().unwrap_or(0);
        let step = PlanStep { resource: "net".to_owned(), from, to: intent.capacity, how };
        Ok(PlanView {
            schema: SCHEMA,
            name: device.clone(),
            revision: books.revision(),
            steps: (from != intent.capacity).then_some(step).into_iter().collect(),
            host_after: books.view(Shape::default()),
        })
    }

    /// Puts back what was at the uplink's root; where it is not shared there is nothing to do.
    ///
    /// # Errors
    /// `store`, `internal`: it is tried again until it is done.
    pub async fn disable_uplink(&self) -> Result<UplinkView, Problem> {
        let core = &self.core;
        let mut sharing = core.uplink.lock().await;
        let done = put_back(core, &mut sharing).await;
        note(core, &mut sharing, done.clone().err());
        done.map_err(|problem| match problem.detail.is_empty() {
            true => problem.detail("it is tried again until it is done"),
            false => problem,
        })?;
        Ok(show::view(core, &sharing).await)
    }
}

/// What is asked for, checked; nothing is changed.
async fn intent(core: &Core, sharing: &Sharing, request: &UplinkRequest) -> Result<Intent, Problem> {
    let Some(network) = core.config.network.as_ref().filter(|_| core.ports.is_some()) else {
        return Err(spec::no_host_network());
    };
    let earlier = sharing.stored.clone();
    if let (Some(earlier), Some(asked)) = (&earlier, &request.device)
        && earlier.device != *asked
    {
        let device = &earlier.device;
        let message = format!("{device} is the uplink that is shared, and there is one of it");
        return Err(Problem::new(Kind::Conflict, "uplink-busy", message).fix("lathe host uplink disable"));
    }
    let device = match earlier.as_ref().map(|earlier| earlier.device.clone()).or(request.device.clone()) {
        Some(device) => device,
        None => core.uplinks.default_device().await?.ok_or_else(no_uplink)?,
    };
    if device == network.bridge {
        let message =
            format!("{device} is the machines' bridge: what goes through it need not leave the host");
        return Err(Problem::new(Kind::BadRequest, "bad-name", message).fix("ip route show default"));
    }
    // Says as well whether there is such a device.
    let found = core.uplinks.found(&device).await;
    if let (Some(shared), Ok(Some(found))) = (sharing.shared(), &found)
        && !plan::may_replace(shared.phase, &shared.before, found)
    {
        return Err(replaced(&device, found));
    }
    let before = match (&earlier, found) {
        // What cannot be looked at now is dealt with by who looks again and again.
        (Some(earlier), found) if earlier.phase == Phase::Enabled || matches!(found, Ok(None)) => {
            earlier.before.clone()
        }
        (_, found) => found?.unwrap_or_else(|| {
            tracing::warn!(device, "sharing was enabled by a lathed whose store is lost");
            RootQueue::Default
        }),
    };
    let known = earlier.as_ref().map(|earlier| earlier.capacity_bit_per_sec);
    let speed = known.or_else(|| core.uplinks.speed(&device));
    let capacity = plan::capacity(&device, request.capacity_bit_per_sec, speed)?;
    Ok(Intent { device, capacity, before, earlier })
}

fn no_uplink() -> Problem {
    Problem::new(Kind::Impossible, "no-uplink", "this host has no IPv4 default route to find its uplink by")
        .fix("ip -br link        then: lathe host uplink enable --device DEVICE")
}

/// Enters a capacity in the books, if what is granted already fits.
fn reserve(books: &mut Books, device: &str, capacity: u64) -> Result<(), Problem> {
    let (granted, reserved) = (books.granted_net(), plan::reserved(capacity));
    if granted <= capacity.saturating_sub(reserved) {
        books.set_net(Some((capacity, reserved)));
        return Ok(());
    }
    let [capacity, granted, reserved] = [capacity, granted, reserved].map(BitRate);
    let message = format!(
        "{device} cannot carry what machines are granted: {granted} granted, {capacity} in all, {reserved} kept for the host"
    );
    Err(Problem::new(Kind::Impossible, "net-over-capacity", message)
        .detail("sharing promises each machine its rate, so the rates must fit")
        .fix("lathe resize NAME --net RATE        or, if the link carries more: lathe host uplink enable --capacity RATE"))
}

/// Begins to share.
async fn share(core: &Core, sharing: &mut Sharing, intent: &Intent) -> Result<(), Problem> {
    core.with_books(|books| reserve(books, &intent.device, intent.capacity))?;
    if let Err(problem) = store(core, sharing, intent.stored(Phase::Enabling)).await {
        core.with_books(|books| books.set_net(booked(sharing.stored.as_ref())));
        return Err(problem);
    }
    let enabled = match core.uplinks.enable(&intent.device, plan::spec(intent.capacity)).await {
        Ok(()) => store(core, sharing, intent.stored(Phase::Enabled)).await,
        Err(problem) => Err(problem),
    };
    if let Err(problem) = enabled {
        let back = put_back(core, sharing).await;
        note(core, sharing, back.err());
        return Err(problem);
    }
    sharing.classes.clear();
    let shown = BitRate(intent.capacity);
    core.tell("uplink-shared", &intent.device, format!("{} is shared: {shown}", intent.device));
    let filled = fill(core, sharing).await;
    note(core, sharing, filled.err());
    Ok(())
}

/// Gives a shared uplink another capacity, from `now`. When that fails it keeps the one it had.
async fn change(core: &Core, sharing: &mut Sharing, intent: &Intent, now: u64) -> Result<(), Problem> {
    let (device, capacity) = (&intent.device, intent.capacity);
    // A link that was made anew since has nothing of ours, and somebody else's queue is not to be replaced.
    if let Err(problem) = secure(core, sharing).await {
        note(core, sharing, Some(problem.clone()));
        return Err(problem);
    }
    core.with_books(|books| {
        reserve(books, device, capacity)?;
        if capacity > now {
            // Not before it is there.
            books.set_net(booked(sharing.stored.as_ref()));
        }
        Ok::<(), Problem>(())
    })?;
    let changed = async {
        if capacity < now {
            // First what gives back.
            let wanted = plan::classes(capacity, &super::members(core));
            core.uplinks.apply(device, &plan::changes(&sharing.classes, &wanted)).await?;
            sharing.classes = wanted;
        }
        core.uplinks.enable(device, plan::spec(capacity)).await?;
        let before = sharing.stored.as_ref().map_or(&intent.before, |stored| &stored.before).clone();
        store(core, sharing, Stored { before, ..intent.stored(Phase::Enabled) }).await
    };
    let changed = changed.await;
    core.with_books(|books| books.set_net(booked(sharing.stored.as_ref())));
    settle(core, sharing).await;
    changed
}
