//! Who may do what, decided for every request.
//!
//! The kernel says who is at the other end of the connection (`SO_PEERCRED`: user and group as they were when it connected, which no
//! client can forge). root and lathed's own user may do everything; members of `[api] group` may change things, members of
//! `view_group` may look. Looking is `GET` and `HEAD`, all else is changing. What is the host's own and not its machines' (how its uplink
//! queues, of which ssh and everything else on the host depends) only root changes.
//!
//! Supplementary groups are read from the accounts (getgrouplist(3)), not from the process: `SO_PEERGROUPS` has no safe wrapper. So a
//! new member needs no new login, a process that dropped its groups keeps what its user may, and a service that got a group from systemd
//! only (`SupplementaryGroups=`) must have it as its main group (`Group=`).

use std::ffi::CString;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};

use super::App;
use super::answer::ApiError;
use crate::problem::{Kind, Problem};

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Main group.
    pub gid: u32,
    /// Process, for the journal only: it may be gone.
    pub pid: Option<i32>,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// To look.
    View,
    /// To change something.
    Change,
    /// To change what is the host's own.
    ChangeHost,
}

/// What is the host's own.
const HOSTS_OWN: [&str; 1] = ["/v1/host/uplink"];

impl Want {
    /// What a method wants of a path.
    pub fn of(method: &Method, path: &str) -> Self {
        match method {
            &Method::GET | &Method::HEAD => Self::View,
            _ if HOSTS_OWN.contains(&path) => Self::ChangeHost,
            _ => Self::Change,
        }
    }
}

/// The host's accounts.
pub trait Accounts: Send + Sync {
    /// All groups of a user, supplementary ones included; empty for an unknown user.
    fn groups_of(&self, uid: u32, gid: u32) -> Vec<u32>;
    /// A group's number.
    fn group(&self, name: &str) -> Option<u32>;
    /// A user's name.
    fn user(&self, uid: u32) -> Option<String>;
}

/// The real ones, through the C library. May block for as long as the account services take.
#[derive(Debug)]
pub struct HostAccounts;

impl Accounts for HostAccounts {
    fn groups_of(&self, uid: u32, gid: u32) -> Vec<u32> {
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let Some(name) = user.and_then(|user| CString::new(user.name).ok()) else { return Vec::new() };
        let groups = getgrouplist(&name, Gid::from_raw(gid)).unwrap_or_default();
        groups.into_iter().map(Gid::as_raw).collect()
    }

    fn group(&self, name: &str) -> Option<u32> {
        Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
    }

    fn user(&self, uid: u32) -> Option<String> {
        User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name)
    }
}

/// The rules.
pub struct Access {
    /// Users that may do everything: root, and lathed's own.
    pub owners: Vec<u32>,
    /// Its members may change things.
    pub group: String,
    /// Its members may look.
    pub view_group: String,
    /// Where members are looked up.
    pub accounts: Box<dyn Accounts>,
}

impl Access {
    /// The rules of this host.
    pub fn of_host(group: &str, view_group: &str) -> Self {
        let accounts = Box::new(HostAccounts);
        let owners = vec![0, Uid::effective().as_raw()];
        Self { owners, group: group.to_owned(), view_group: view_group.to_owned(), accounts }
    }

    /// Whether root or lathed itself asks: allowed without asking the accounts.
    pub fn is_owner(&self, peer: Peer) -> bool {
        self.owners.contains(&peer.uid)
    }

    /// Decides.
    ///
    /// # Errors
    /// `not-permitted`, with the command that would help.
    pub fn decide(&self, peer: Peer, want: Want) -> Result<(), Problem> {
        if self.is_owner(peer) {
            return Ok(());
        }
        let mut groups = self.accounts.groups_of(peer.uid, peer.gid);
        groups.push(peer.gid);
        let member = |name: &str| self.accounts.group(name).is_some_and(|gid| groups.contains(&gid));
        if want != Want::ChangeHost
            && (member(&self.group) || (want == Want::View && member(&self.view_group)))
        {
            return Ok(());
        }
        let user = self.accounts.user(peer.uid).unwrap_or_else(|| format!("#{}", peer.uid));
        let (verb, detail) = match want {
            Want::View => ("look", format!("members of group {} or {} may", self.group, self.view_group)),
            Want::Change => ("change anything", format!("members of group {} may", self.group)),
            Want::ChangeHost => {
                let message = format!("user {user} may not change what is the host's own");
                return Err(Problem::new(Kind::NotPermitted, "not-permitted", message)
                    .detail(format!("only root may; members of group {} change machines", self.group))
                    .fix("the same command with sudo"));
            }
        };
        let needed = if want == Want::View { &self.view_group } else { &self.group };
        Err(Problem::new(Kind::NotPermitted, "not-permitted", format!("user {user} may not {verb} here"))
            .detail(detail)
            .fix(format!("sudo usermod -aG {needed} {user}")))
    }
}

/// Lets a request pass or answers it, before its body is read.
pub async fn authorise(State(app): State<App>, request: Request, next: Next) -> Response {
    let Some(peer) = request.extensions().get::<Peer>().copied() else {
        return ApiError(Problem::internal("a request without its sender", "the server is wired wrongly"))
            .into_response();
    };
    let want = Want::of(request.method(), request.uri().path());
    if !app.access.is_owner(peer) {
        let access = Arc::clone(&app.access);
        let decided = tokio::task::spawn_blocking(move || access.decide(peer, want)).await;
        let decided = decided.unwrap_or_else(|error| Err(Problem::internal("accounts", error)));
        if let Err(problem) = decided {
            tracing::warn!(uid = peer.uid, method = %request.method(), path = request.uri().path(), "refused: {problem}");
            return ApiError(problem).into_response();
        }
    }
    if want != Want::View {
        tracing::info!(uid = peer.uid, pid = peer.pid, "{} {}", request.method(), request.uri().path());
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// alice (1000) is in lathe (50), bob (1001) in lathe-view (51), carol (1002) in neither.
    struct Three;

    impl Accounts for Three {
        fn groups_of(&self, uid: u32, gid: u32) -> Vec<u32> {
            match uid {
                1000 => vec![gid, 50],
                1001 => vec![gid, 51],
                1002 => vec![gid],
                _ => Vec::new(),
            }
        }

        fn group(&self, name: &str) -> Option<u32> {
            [("lathe", 50), ("lathe-view", 51)].iter().find(|(known, _)| *known == name).map(|(_, gid)| *gid)
        }

        fn user(&self, uid: u32) -> Option<String> {
            ["alice", "bob", "carol"]
                .get(usize::try_from(uid).ok()?.checked_sub(1000)?)
                .map(|&name| name.to_owned())
        }
    }

    fn decide(uid: u32, gid: u32, want: Want) -> Result<(), Problem> {
        let access = Access {
            owners: vec![0, 900],
            group: "lathe".to_owned(),
            view_group: "lathe-view".to_owned(),
            accounts: Box::new(Three),
        };
        access.decide(Peer { uid, gid, pid: None }, want)
    }

    #[test]
    fn the_table_of_who_may_do_what() {
        let table = [
            ("root", 0, 0, true, true),
            ("lathed itself", 900, 900, true, true),
            ("a member of lathe", 1000, 1000, true, true),
            ("a member of lathe-view", 1001, 1001, true, false),
            ("a stranger", 1002, 1002, false, false),
            ("a service with Group=lathe and no account", 62000, 50, true, true),
            ("a service with Group=lathe-view", 62000, 51, true, false),
            ("nobody known", 62000, 62000, false, false),
            ("a user in group 0 but not root", 1002, 0, false, false),
        ];
        for (who, uid, gid, view, change) in table {
            assert_eq!(decide(uid, gid, Want::View).is_ok(), view, "{who} looking");
            assert_eq!(decide(uid, gid, Want::Change).is_ok(), change, "{who} changing");
            let own = decide(uid, gid, Want::ChangeHost).is_ok();
            assert_eq!(own, uid == 0 || uid == 900, "{who} changing the host");
        }
    }

    #[test]
    fn a_refusal_names_the_remedy() {
        let problem = decide(1001, 1001, Want::Change).unwrap_err();
        assert_eq!((problem.kind, problem.code), (Kind::NotPermitted, "not-permitted"));
        assert_eq!(problem.message, "user bob may not change anything here");
        assert_eq!(problem.fix, "sudo usermod -aG lathe bob");
        assert_eq!(decide(1002, 1002, Want::View).unwrap_err().fix, "sudo usermod -aG lathe-view carol");
    }

    #[test]
    fn without_the_groups_only_root_may() {
        let access = Access {
            owners: vec![0, 900],
            group: "none".into(),
            view_group: "neither".into(),
            accounts: Box::new(Three),
        };
        assert!(access.decide(Peer { uid: 1000, gid: 50, pid: None }, Want::View).is_err());
        assert!(access.decide(Peer { uid: 0, gid: 0, pid: None }, Want::Change).is_ok());
    }

    #[test]
    fn looking_is_get_and_head() {
        for method in
            [Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS, Method::CONNECT]
        {
            assert_eq!(Want::of(&method, "/v1/machines"), Want::Change);
            assert_eq!(Want::of(&method, "/v1/host/uplink"), Want::ChangeHost);
        }
        assert_eq!(Want::of(&Method::HEAD, "/v1/host/uplink"), Want::View);
    }

    #[test]
    fn the_hosts_own_accounts_know_root() {
        assert_eq!(HostAccounts.user(0).as_deref(), Some("root"));
        assert!(HostAccounts.groups_of(0, 0).contains(&0));
        assert_eq!(HostAccounts.group("no-such-group-here"), None);
    }
}
