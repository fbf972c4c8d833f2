//! Filters and their actions. A filter's protocol is sent by netlink-packet-route 0.34 unconverted, so it is converted
//! here; options of classic `bpf` and of actions that it does not know come and go as bytes.

use std::io;

use netlink_packet_core::{DefaultNla, Emitable, NLM_F_DUMP};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::Netlink;
use super::tc::{At, Existing, TCA_OPTIONS, tc_message, tc_with};
use crate::codec::SkbEdit;

/// `ETH_P_ALL`, every protocol.
const EVERY_PROTOCOL: u16 = 3;

/// Of a u32 handle: the filter in its hash table.
const U32_NODE: u32 = 0xfff;

/// Where a filter sits; handle 0 lets the kernel choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FilterAt {
    pub(crate) parent: TcHandle,
    pub(crate) priority: u16,
    pub(crate) handle: u32,
}

/// A filter as the kernel shows it.
#[derive(Clone, Debug)]
pub(crate) struct FoundFilter {
    pub(crate) kind: String,
    pub(crate) priority: u16,
    pub(crate) handle: u32,
    pub(crate) every_protocol: bool,
    /// The nested attributes.
    pub(crate) options: Vec<u8>,
    /// Links to which its actions send.
    pub(crate) redirects: Vec<u32>,
    /// What its actions write into packets.
    pub(crate) edits: Vec<SkbEdit>,
}

impl Netlink {
    /// Filters of a parent, which exists.
    pub(crate) async fn filters(&self, index: u32, parent: TcHandle) -> io::Result<Vec<FoundFilter>> {
        let mut message = tc_message(index)?;
        message.header.parent = parent;
        let answers = self.request(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_DUMP).await?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewTrafficFilter(message) => Some(FoundFilter::from(message)),
                _ => None,
            })
            // Each priority is listed once more, without a handle, and u32's hash tables as filters of node 0.
            .filter(|filter| filter.handle != 0 && (filter.kind != "u32" || filter.handle & U32_NODE != 0))
            .collect())
    }

    /// Makes a filter for every protocol; one of the same place and kind is replaced in one step.
    pub(crate) async fn set_filter(
        &self,
        index: u32,
        at: FilterAt,
        kind: &str,
        options: Vec<u8>,
        existing: Existing,
    ) -> io::Result<()> {
        let options = TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options));
        let message = filter_message(index, at, kind, Some(options))?;
        self.ack(RouteNetlinkMessage::NewTrafficFilter(message), existing.flags()).await
    }

    /// Sends everything to the link `to`.
    pub(crate) async fn set_redirect(
        &self,
        index: u32,
        at: FilterAt,
        to: u32,
        existing: Existing,
    ) -> io::Result<()> {
        let mut generic = TcActionGeneric::default();
        generic.action = TcActionType::Stolen;
        let mut mirror = TcMirror::default();
        mirror.generic = generic;
        mirror.eaction = TcMirrorActionType::EgressRedir;
        mirror.ifindex = to;
        let options = vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))];
        self.set_for_all(index, at, "mirred", options, existing).await
    }

    /// Writes into every packet, and goes on to the next filter.
    pub(crate) async fn set_edit(
        &self,
        index: u32,
        at: FilterAt,
        edit: SkbEdit,
        existing: Existing,
    ) -> io::Result<()> {
        let options = edit
            .attributes()
            .into_iter()
            .map(|(kind, value)| TcActionOption::Other(DefaultNla::new(kind, value)))
            .collect();
        self.set_for_all(index, at, SkbEdit::KIND, options, existing).await
    }

    /// Removes all filters of a priority.
    pub(crate) async fn remove_filters(&self, index: u32, parent: TcHandle, priority: u16) -> io::Result<()> {
        let mut message = tc_message(index)?;
        message.header.parent = parent;
        message.header.info = info(priority);
        self.ack(RouteNetlinkMessage::DelTrafficFilter(message), 0).await
    }

    /// One action for every packet: u32 with a key that all match, which every kernel with tc has.
    async fn set_for_all(
        &self,
        index: u32,
        at: FilterAt,
        action_kind: &str,
        action_options: Vec<TcActionOption>,
        existing: Existing,
    ) -> io::Result<()> {
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = 1;
        selector.keys = vec![TcU32Key::default()];
        let mut action = TcAction::default();
        action.tab = 1;
        action.attributes =
            vec![TcActionAttribute::Kind(action_kind.into()), TcActionAttribute::Options(action_options)];
        let options = TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]);
        let message = filter_message(index, at, "u32", Some(options))?;
        self.ack(RouteNetlinkMessage::NewTrafficFilter(message), existing.flags()).await
    }
}

fn info(priority: u16) -> u32 {
    TcHandle { major: priority, minor: EVERY_PROTOCOL.to_be() }.into()
}

fn filter_message(
    index: u32,
    at: FilterAt,
    kind: &str,
    options: Option<TcAttribute>,
) -> io::Result<TcMessage> {
    let mut message = tc_with(index, At { handle: at.handle.into(), parent: at.parent }, kind, options)?;
    message.header.info = info(at.priority);
    Ok(message)
}

impl From<TcMessage> for FoundFilter {
    fn from(message: TcMessage) -> FoundFilter {
        let place = TcHandle::from(message.header.info);
        let mut filter = FoundFilter {
            kind: String::new(),
            priority: place.major,
            handle: message.header.handle.into(),
            every_protocol: place.minor == EVERY_PROTOCOL.to_be(),
            options: Vec::new(),
            redirects: Vec::new(),
            edits: Vec::new(),
        };
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => filter.kind = kind,
                TcAttribute::Options(options) => filter.take_options(&options),
                _ => {}
            }
        }
        filter
    }
}

impl FoundFilter {
    fn take_options(&mut self, options: &[TcOption]) {
        if options.iter().all(|option| matches!(option, TcOption::Bpf(_))) {
            self.options = vec![0; options.buffer_len()];
            options.emit(&mut self.options);
        }
        for option in options {
            let TcOption::U32(TcFilterU32Option::Action(actions)) = option else { continue };
            for action in actions {
                self.take_action(action);
            }
        }
    }

    fn take_action(&mut self, action: &TcAction) {
        let mut kind = "";
        for attribute in &action.attributes {
            match attribute {
                TcActionAttribute::Kind(name) => kind = name,
                TcActionAttribute::Options(options) if kind == SkbEdit::KIND => {
                    let mut bytes = vec![0; options.as_slice().buffer_len()];
                    options.as_slice().emit(&mut bytes);
                    self.edits.extend(SkbEdit::parse(&bytes).ok());
                }
                TcActionAttribute::Options(options) => {
                    self.redirects.extend(options.iter().filter_map(|option| match option {
                        TcActionOption::Mirror(TcActionMirrorOption::Parms(parms)) => Some(parms.ifindex),
                        _ => None,
                    }));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tc::{CLSACT, CLSACT_INGRESS};
    use super::super::testing::{an_ifb, in_namespace, tc, tc_json};
    use super::*;
    use crate::codec::BpfFilter;

    const AT: FilterAt = FilterAt { parent: CLSACT_INGRESS, priority: 3, handle: 0 };

    async fn with_clsact(nl: &Netlink) -> u32 {
        let index = an_ifb(nl, "li-t").await;
        let at = At { handle: CLSACT, parent: TcHandle::CLSACT };
        nl.set_qdisc(index, at, "clsact", None, Existing::Fail).await.expect("accepted");
        assert!(nl.filters(index, CLSACT_INGRESS).await.expect("a dump").is_empty());
        index
    }

    #[test]
    fn a_redirect_is_found_again() {
        in_namespace(async |nl| {
            let index = with_clsact(&nl).await;
            let to = an_ifb(&nl, "li-u").await;
            nl.set_redirect(index, AT, to, Existing::Fail).await.expect("accepted");
            let found = nl.filters(index, CLSACT_INGRESS).await.expect("a dump");
            assert!(matches!(found.as_slice(), [one] if one.redirects == [to]), "{found:?}");
            // Replaced in place.
            let (at, other) = (FilterAt { handle: found[0].handle, ..AT }, an_ifb(&nl, "li-v").await);
            nl.set_redirect(index, at, other, Existing::Replace).await.expect("accepted");
            let found = nl.filters(index, CLSACT_INGRESS).await.expect("a dump");
            assert!(matches!(found.as_slice(), [one] if one.redirects == [other]), "{found:?}");
            nl.set_redirect(index, at, to, Existing::Replace).await.expect("accepted");
            let found = nl.filters(index, CLSACT_INGRESS).await.expect("a dump");
            assert!(
                matches!(found.as_slice(), [one] if one.redirects == [to])
                    && found.iter().all(|f| f.priority == 3 && f.every_protocol)
            );
            if let Some(shown) = tc_json(&["filter", "show", "dev", "li-t", "ingress"]) {
                let text = shown.to_string();
                assert!(text.contains("\"protocol\":\"all\"") && text.contains("li-u"), "{text}");
            } else {
                println!("skipped: no tc");
            }
            nl.remove_filters(index, CLSACT_INGRESS, 3).await.expect("removed");
            assert!(nl.filters(index, CLSACT_INGRESS).await.expect("a dump").is_empty());
        });
    }

    /// A program that lets all through: `ret #0`, and one that refuses: `ret #2`.
    fn gives(verdict: u8) -> BpfFilter {
        BpfFilter { program: vec![6, 0, 0, 0, verdict, 0, 0, 0], direct: true }
    }

    #[test]
    fn a_classic_program_is_what_tc_says_in_both_directions() {
        in_namespace(async |nl| {
            let index = with_clsact(&nl).await;
            let at = FilterAt { handle: 1, ..AT };
            for filter in [gives(0), gives(2)] {
                nl.set_filter(index, at, BpfFilter::KIND, filter.to_bytes(), Existing::Replace)
                    .await
                    .expect("accepted");
                let found = nl.filters(index, CLSACT_INGRESS).await.expect("a dump");
                assert!(
                    matches!(found.as_slice(), [one] if one.handle == 1 && one.kind == "bpf"),
                    "{found:?}"
                );
                assert_eq!(BpfFilter::parse(&found[0].options), Ok(filter.clone()));
                let Some(shown) = tc(&["filter", "show", "dev", "li-t", "ingress"]) else {
                    return println!("skipped: no tc");
                };
                let code = format!("bytecode '1,6 0 0 {}'", filter.program[4]);
                assert!(shown.contains(&code) && shown.contains("direct-action"), "{shown}");
            }
            tc(&[
                "filter",
                "replace",
                "dev",
                "li-t",
                "ingress",
                "prio",
                "9",
                "protocol",
                "all",
                "bpf",
                "bytecode",
                "1,6 0 0 2,",
                "direct-action",
            ]);
            let found = nl.filters(index, CLSACT_INGRESS).await.expect("a dump");
            let theirs = found.iter().find(|f| f.priority == 9).expect("tc's");
            assert_eq!(BpfFilter::parse(&theirs.options), Ok(gives(2)));
        });
    }

    #[test]
    fn a_mark_is_what_tc_says_in_both_directions() {
        in_namespace(async |nl| {
            let index = with_clsact(&nl).await;
            let edit = SkbEdit { mark: 0x1a7e_0010 };
            match nl.set_edit(index, AT, edit, Existing::Fail).await {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    return println!("skipped: this kernel has no act_skbedit");
                }
                result => result.expect("accepted"),
            }
            let edits = async |priority| {
                let found = nl.filters(index, CLSACT_INGRESS).await.expect("a dump");
                found.into_iter().filter(|f| f.priority == priority).flat_map(|f| f.edits).collect::<Vec<_>>()
            };
            assert_eq!(edits(3).await, [edit]);
            let Some(shown) = tc(&["filter", "show", "dev", "li-t", "ingress"]) else {
                return println!("skipped: no tc");
            };
            assert!(shown.contains("mark 444465168") && shown.contains("continue"), "{shown}");
            tc(&[
                "filter",
                "add",
                "dev",
                "li-t",
                "ingress",
                "prio",
                "9",
                "protocol",
                "all",
                "u32",
                "match",
                "u32",
                "0",
                "0",
                "action",
                "skbedit",
                "mark",
                "0x1a7e0011",
                "continue",
            ]);
            assert_eq!(edits(9).await, [SkbEdit { mark: 0x1a7e_0011 }]);
        });
    }
}
