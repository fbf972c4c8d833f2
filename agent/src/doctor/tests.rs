use std::net::Ipv4Addr;

use super::*;

fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

fn look(files: &[(&str, &str)], check: fn(Host<'_>) -> Check) -> Check {
    let root = root(files);
    let config = Config::default();
    check(Host { root: root.path(), config: &config, release: "6.1.0-37-amd64" })
}

#[test]
fn an_empty_host_lacks_everything_and_every_lack_has_a_remedy() {
    let root = root(&[]);
    let checks = HostDoctor::new(root.path(), &Config::default()).report("6.1.0");
    let mut codes: Vec<_> = checks.iter().map(|check| check.code.as_str()).collect();
    codes.sort_unstable();
    codes.dedup();
    assert_eq!(codes.len(), checks.len(), "codes are unique");
    for check in &checks {
        assert!(!check.message.is_empty() && !check.message.contains('\n'), "{check:?}");
        assert_eq!(check.verdict == Verdict::Ok, check.fix.is_empty(), "{check:?}");
    }
    let failed = checks.iter().filter(|check| check.verdict == Verdict::Fail).count();
    assert_eq!(failed, 13, "{checks:#?}");
}

#[test]
fn systemd_says_its_version() {
    assert_eq!(machine::version("systemd 252 (252.38-1~deb12u1)\n+PAM"), Some(252));
    assert_eq!(machine::version("systemd 257.5-2"), Some(257));
    assert_eq!(machine::version("bash: no"), None);
}

#[test]
fn a_missing_controller_is_named() {
    let all =
        look(&[("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids\n")], machine::cgroup);
    assert_eq!(all.verdict, Verdict::Ok);
    let some = look(&[("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n")], machine::cgroup);
    assert!(some.verdict == Verdict::Fail && some.message.contains("cpuset, io"), "{some:?}");
}

#[test]
fn modules_may_be_loaded_built_in_or_there() {
    assert!(lists_module("kernel/net/sched/sch_htb.ko.xz: a.ko\n", "sch_htb"));
    assert!(lists_module("kernel/drivers/virtio/virtio-pci.ko\n", "virtio_pci"));
    assert!(!lists_module("kernel/net/sched/sch_htb2.ko: kernel/sch_htb.ko\n", "sch_htb"));
    let dep = "lib/modules/6.1.0-37-amd64/modules.dep";
    let four = "a/virtio_pci.ko:\na/virtio_blk.ko.xz:\na/virtio_net.ko:\na/vmw_vsock_virtio_transport.ko:\n";
    assert_eq!(look(&[(dep, four)], machine::modules).verdict, Verdict::Ok);
    let three = look(&[(dep, &four.replace("virtio_blk", "x"))], machine::modules);
    assert!(three.message.contains("lacks virtio_blk"), "{three:?}");
    let ifb = [
        ("sys/module/ifb/x", ""),
        (dep, "n/sch_htb.ko:\nn/sch_fq_codel.ko:\nn/sch_ingress.ko:\nn/act_police.ko:\n"),
    ];
    assert_eq!(look(&ifb, net::shapers).verdict, Verdict::Ok);
    assert!(look(&ifb[1..], net::shapers).message.contains("ifb"));
    assert_eq!(look(&[(dep, "n/cls_bpf.ko.xz:\n")], net::sources).verdict, Verdict::Ok);
    assert!(look(&[], net::sources).message.contains("cls_bpf"));
}

#[test]
fn a_prefix_that_another_link_has_is_found() {
    let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
    let default = "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
    let own = "lathe0\t00007F0A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
    let clash = "eth1\t00057F0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
    let table =
        |lines: &[&str]| look(&[("proc/net/route", &(head.to_owned() + &lines.concat()))], net::prefix);
    assert_eq!(table(&[default, own]).verdict, Verdict::Ok);
    let found = table(&[default, own, clash]);
    assert!(found.verdict == Verdict::Fail && found.message.contains("10.127.5.0 on eth1"), "{found:?}");
}

#[test]
fn networks_overlap_when_one_holds_the_other() {
    let route =
        |network: [u8; 4], len| net::Route { link: "e", network: network.into(), mask: net::mask(len) };
    let own = Ipv4Addr::new(10, 127, 0, 1);
    assert!(route([10, 0, 0, 0], 8).overlaps(own, net::mask(16)));
    assert!(route([10, 127, 9, 0], 24).overlaps(own, net::mask(16)));
    assert!(!route([10, 126, 0, 0], 16).overlaps(own, net::mask(16)));
    assert!(!route([0, 0, 0, 0], 0).overlaps(own, net::mask(16)));
    assert_eq!((net::mask(0), net::mask(32)), (0, u32::MAX));
}

#[test]
fn a_bridge_of_that_name_is_fine_and_another_link_is_not() {
    assert_eq!(look(&[], net::bridge).verdict, Verdict::Ok);
    assert_eq!(look(&[("sys/class/net/lathe0/bridge/stp_state", "0")], net::bridge).verdict, Verdict::Ok);
    assert_eq!(look(&[("sys/class/net/lathe0/mtu", "1500")], net::bridge).verdict, Verdict::Fail);
}

#[test]
fn comforts() {
    assert_eq!(look(&[("proc/sys/net/ipv4/ip_forward", "1\n")], net::forwarding).verdict, Verdict::Ok);
    assert_eq!(look(&[("proc/sys/net/ipv4/ip_forward", "0\n")], net::forwarding).verdict, Verdict::Fail);
    assert_eq!(
        look(&[("proc/pressure/cpu", "some avg10=0.00 avg60=0")], comfort::pressure).verdict,
        Verdict::Ok
    );
    let swaps = "Filename Type Size Used Priority\n/dev/sda3 partition 8 0 -2\n";
    assert!(look(&[("proc/swaps", swaps)], comfort::swap).message.contains("/dev/sda3"));
    assert_eq!(look(&[("proc/swaps", &swaps.replace("sda3", "zram0"))], comfort::swap).verdict, Verdict::Ok);
    assert_eq!(look(&[("var/lib/lathe/x", "")], comfort::space).code, "space");
}
