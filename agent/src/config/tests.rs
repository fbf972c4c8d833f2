use super::*;

/// A host's root with the given files.
fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

fn error_of(text: &str) -> String {
    let root = root(&[("etc/lathe/lathe.toml", text)]);
    let error = Config::load(root.path()).unwrap_err().to_string();
    error.strip_prefix(root.path().to_str().unwrap()).unwrap().to_owned()
}

#[test]
fn without_files_the_defaults_count() {
    let config = Config::load(root(&[]).path()).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.reserve.memory, Bytes(512 << 20));
    assert_eq!(config.network.ipv4.to_string(), "10.127.0.1/16");
}

#[test]
fn the_shipped_example_repeats_the_defaults() {
    let example = include_str!("../../../systemd/lathe.toml");
    let every_value_set: String = example.lines().map(|line| uncommented(line) + "\n").collect();
    let root = root(&[("etc/lathe/lathe.toml", example), ("all.toml", &every_value_set)]);
    assert_eq!(Config::load(root.path()).unwrap(), Config::default());
    assert_eq!(Config::load_file(&root.path().join("all.toml")).unwrap(), Config::default());
    let keys = every_value_set.lines().filter(|line| line.contains(" = ") && !line.starts_with('#')).count();
    assert_eq!(keys, 35, "a new option belongs into systemd/lathe.toml, lathe.toml(5) and this number");
}

/// `#key = value` without its mark; prose stays a comment.
fn uncommented(line: &str) -> String {
    match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest.to_owned(),
        _ => line.to_owned(),
    }
}

#[test]
fn drop_ins_override_in_the_order_of_their_names() {
    let root = root(&[
        ("etc/lathe/lathe.toml", "[reserve]\ncpu = \"1\"\nmemory = \"1G\"\n[log]\nlevel = \"warn\""),
        ("etc/lathe/lathe.d/10-a.toml", "[reserve]\ncpu = \"2\""),
        ("usr/lib/lathe/lathe.d/20-b.toml", "[reserve]\ncpu = \"3\""),
        ("usr/lib/lathe/lathe.d/20-b.toml.bak", "nonsense"),
    ]);
    let config = Config::load(root.path()).unwrap();
    assert_eq!(config.reserve.cpu, MilliCpu(3000));
    assert_eq!(config.reserve.memory, Bytes(1 << 30));
    assert_eq!(config.log_level, "warn");
}

#[test]
fn overcommit_is_counted_in_thousandths() {
    let root = root(&[("etc/lathe/lathe.toml", "[overcommit]\ncpu = 1.25\nmemory = 2")]);
    let overcommit = Config::load(root.path()).unwrap().overcommit;
    assert_eq!((overcommit.cpu_permille, overcommit.memory_permille), (1250, 2000));
    assert_eq!(overcommit.disk_permille, 1000);
}

#[test]
fn foresight_is_turned_on_and_aggressiveness_counted_in_thousandths() {
    let root = root(&[("etc/lathe/lathe.toml", "[foresight]\nmode = \"on\"\naggressiveness = 0.125")]);
    let set = Config::load(root.path()).unwrap().foresight;
    assert_eq!((set.mode, set.aggressiveness_permille), (foresight::Mode::On, 125));
    assert_eq!(Config::default().foresight.mode, foresight::Mode::Observe);
}

#[test]
fn of_two_with_one_name_etc_beats_run_beats_usr() {
    let files = [
        ("usr/lib/lathe/lathe.d/10.toml", "[log]\nlevel = \"error\"\n[network]\nnat = false"),
        ("run/lathe/lathe.d/10.toml", "[log]\nlevel = \"debug\""),
        ("etc/lathe/lathe.d/10.toml", "[log]\nlevel = \"trace\""),
    ];
    let config = Config::load(root(&files).path()).unwrap();
    assert_eq!((config.log_level.as_str(), config.network.nat), ("trace", true));
    let config = Config::load(root(&files[..2]).path()).unwrap();
    assert_eq!(config.log_level, "debug");
}

#[test]
fn a_link_to_dev_null_masks() {
    let root = root(&[
        ("usr/lib/lathe/lathe.d/10.toml", "[log]\nlevel = \"error\""),
        ("etc/lathe/lathe.d/20.toml", ""),
    ]);
    std::os::unix::fs::symlink("/dev/null", root.path().join("etc/lathe/lathe.d/10.toml")).unwrap();
    assert_eq!(Config::load(root.path()).unwrap().log_level, "info");
}

#[test]
fn what_is_wrong_is_named_with_file_and_line() {
    let cases = [
        ("[reserve]\ncpu = \"1\"\nmemry = \"1G\"", "3: unknown key \"memry\" (did you mean \"memory\"?)"),
        ("\n[netwrok]\n", "2: unknown key \"netwrok\" (did you mean \"network\"?)"),
        ("[reserve]\nmemory = \"1Q\"", "2: \"1Q\": "),
        ("[reserve]\ncpu = \"-1\"", "2: \"-1\": "),
        ("[overcommit]\ncpu = 0.5", "2: 0.5: must be 1.0 (nothing twice) to 16.0"),
        ("[overcommit]\nmemory = 17", "2: 17: must be 1.0"),
        ("[overcommit]\ndisk = nan", "2: NaN: must be 1.0"),
        ("[host]\nstate_dir = \"var\"", "2: \"var\": must be an absolute path"),
        ("[host]\nstate_dir = \"/a/../b\"", "2: "),
        ("[host]\nname = \"-x\"", "2: \"-x\": must be at most 63"),
        ("[host]\nlauncher = \"docker\"", "2: \"docker\": must be auto, systemd or direct"),
        ("[network]\nbridge = \"a-name-that-is-too-long\"", "2: "),
        ("[network]\nipv4 = \"10.0.0.1/31\"", "2: a prefix of 31 bits has no room"),
        ("[network]\nipv4 = \"fd00::1/64\"", "2: fd00::1 is not IPv4"),
        ("[network]\nipv6 = \"10.0.0.1/16\"", "2: 10.0.0.1 is not IPv6"),
        ("[network]\nhost_services = [\"tcp/53\", \"53\"]", "2: \"53\" is no service: tcp/PORT or udp/PORT"),
        ("[machines]\nshutdown_timeout_sec = 0", "2: 0 seconds: must be 1 to 300"),
        ("[machines]\nshutdown_timeout_sec = 4000000000000", "2: 4000000000000 seconds"),
        ("[disks]\nallowed = [\"/a\", \"b\"]", "2: \"b\": must be an absolute path"),
        ("[foresight]\nmode = \"maybe\"", "2: \"maybe\": must be off, observe or on"),
        ("[foresight]\naggressiveness = 1.001", "2: 1.001: must be 0.0 (careful) to 1.0"),
        ("[foresight]\naggressiveness = nan", "2: NaN: must be 0.0"),
        ("[cluster]\nlisten = \"everywhere\"", "2: \"everywhere\": "),
        ("[log\nlevel = 1", "1: "),
        ("[log]\nlevel = 1", "2: "),
    ];
    for (text, expected) in cases {
        let error = error_of(text);
        assert!(error.starts_with(&format!("/etc/lathe/lathe.toml:{expected}")), "{text:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn a_huge_file_and_a_missing_one_are_refused() {
    let root = root(&[("big.toml", &"#".repeat(2 << 20))]);
    let error = Config::load_file(&root.path().join("big.toml")).unwrap_err().to_string();
    assert!(error.contains("2097152 bytes, more than 1048576"), "{error}");
    assert!(matches!(Config::load_file(&root.path().join("none.toml")), Err(ConfigError::Read { .. })));
}

#[test]
fn a_broken_link_is_an_error_and_not_an_absence() {
    let root = root(&[("etc/lathe/lathe.d/20.toml", "")]);
    std::os::unix::fs::symlink("/nowhere", root.path().join("etc/lathe/lathe.d/10.toml")).unwrap();
    assert!(matches!(Config::load(root.path()), Err(ConfigError::Read { .. })));
}
