use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::config;

fn parsed(pools: &str) -> Config {
    let text = format!("interfaces: [eth0]\nseed: 1\npools:\n{pools}services: []\n");
    config::parse("xlb.yaml", &text).map(|loaded| loaded.config).unwrap_or_else(|wrong| panic!("{wrong}"))
}

const ALL: &str = "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.1, name: web1}, {address: 10.0.0.2, name: web2, weight: 50}]}\n  api: {forward: gue, gue_port: 1234, health: {type: http, port: 80, path: /up}, backends: [10.0.1.1]}\n";

fn key(pool: &str, address: &str) -> BackendKey {
    BackendKey { pool: pool.to_owned(), address: address.parse().unwrap() }
}

fn web1() -> BackendKey {
    key("web", "10.0.0.1")
}

fn entry(config: &Config, key: &BackendKey) -> Entry {
    let (_, pool, backend) = keys(config).find(|(found, ..)| found == key).unwrap();
    Entry::of(&config.pools[pool].backends[backend])
}

const NOW: Uptime = Duration::from_secs(1000);
const MINUTE: Duration = Duration::from_secs(60);

fn names(config: &Config) -> Vec<String> {
    let name = |(key, pool, backend): (BackendKey, usize, usize)| {
        let backend = &config.pools[pool].backends[backend];
        let leaving = if backend.leaving { " leaving" } else { "" };
        format!("{}/{} {}{leaving}", key.pool, backend.name, backend.weight)
    };
    keys(config).map(name).collect()
}

#[test]
fn a_drain_has_a_deadline_or_none_and_ends_with_enable() {
    let file = parsed(ALL);
    let mut overrides = Overrides::default();
    overrides.drain(&web1(), entry(&file, &web1()), NOW, None);
    let exit = overrides.exit(&web1()).unwrap();
    assert_eq!((exit.cause, exit.since, exit.deadline), (Cause::Drain, NOW, None));
    assert!(!exit.has_passed(Duration::MAX) && overrides.due(Duration::MAX).is_empty() && !exit.is_over());

    // The same again, later: another deadline, and still the first beginning.
    overrides.drain(&web1(), entry(&file, &web1()), NOW + MINUTE, Some(MINUTE));
    let exit = overrides.exit(&web1()).unwrap();
    assert_eq!((exit.since, exit.deadline), (NOW, Some(NOW + 2 * MINUTE)));
    assert!(overrides.due(NOW + MINUTE).is_empty());
    assert_eq!(overrides.due(NOW + 2 * MINUTE), [web1()]);
    let left = Remaining { pins: 3, slots_new: 0, slots_old: 1, quic: false, uncounted: false };
    overrides.cut_off(&web1(), left);
    assert!(overrides.due(NOW + 3 * MINUTE).is_empty(), "told twice");
    let exit = overrides.exit(&web1()).unwrap();
    assert!(exit.cut == Some(left) && exit.is_over());

    assert!(overrides.enable(&web1()) && !overrides.enable(&web1()));
    assert_eq!(overrides, Overrides::default());
}

#[test]
fn disabling_is_an_exit_whose_deadline_has_come() {
    let file = parsed(ALL);
    let mut overrides = Overrides::default();
    overrides.drain(&web1(), entry(&file, &web1()), NOW, None);
    overrides.disable(&web1(), entry(&file, &web1()), NOW + MINUTE);
    let exit = overrides.exit(&web1()).unwrap();
    assert_eq!((exit.cause, exit.since), (Cause::Disable, NOW + MINUTE));
    assert!(exit.has_passed(NOW + MINUTE));
}

#[test]
fn a_weight_and_a_drain_hold_beside_each_other_and_the_files_weight_ends_the_first() {
    let file = parsed(ALL);
    let mut overrides = Overrides::default();
    overrides.set_weight(&web1(), entry(&file, &web1()), 7);
    assert_eq!(names(&overrides.effective(&file, &file))[0], "web/web1 7");
    overrides.drain(&web1(), entry(&file, &web1()), NOW, None);
    overrides.set_weight(&web1(), entry(&file, &web1()), 100);
    assert!(overrides.exit(&web1()).is_some());
    assert_eq!(overrides.effective(&file, &file), file);
    overrides.set_weight(&web1(), entry(&file, &web1()), 9);
    overrides.enable(&web1());
    overrides.set_weight(&web1(), entry(&file, &web1()), 100);
    assert_eq!(overrides, Overrides::default());
}

#[test]
fn an_override_lasts_until_its_own_entry_changes() {
    let file = parsed(ALL);
    let mut overrides = Overrides::default();
    overrides.drain(&web1(), entry(&file, &web1()), NOW, None);
    for (name, change, end) in [
        ("another backend's weight", ("weight: 50", "weight: 51"), None),
        ("another pool", ("/up", "/down"), None),
        ("its weight", ("name: web1", "name: web1, weight: 99"), Some(End::EntryChanged)),
        ("its name", ("web1", "web9"), Some(End::EntryChanged)),
        ("its address", ("10.0.0.1", "10.0.0.9"), Some(End::LeftTheFile)),
        ("its pool's name", ("web:", "www:"), Some(End::LeftTheFile)),
    ] {
        let changed = parsed(&ALL.replacen(change.0, change.1, 1));
        let (after, ended) = overrides.with_file(&file, &changed, NOW);
        assert_eq!(ended.first().map(|ended| ended.end), end, "{name}");
        assert_eq!(after.of(&web1()).is_some(), end.is_none(), "{name}");
    }
}

#[test]
fn who_leaves_the_file_stays_with_weight_0_until_nothing_is_left_of_it() {
    let file = parsed(ALL);
    let without = parsed(
        "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.2, name: web2, weight: 50}]}\n",
    );
    let (overrides, ended) = Overrides::default().with_file(&file, &without, NOW);
    assert!(ended.is_empty());
    let config = overrides.effective(&file, &without);
    assert_eq!(names(&config), ["web/web2 50", "web/web1 0 leaving", "api/10.0.1.1 0 leaving"]);
    assert_eq!(config.pools[1].forward, file.pools[1].forward);
    assert_eq!(config.pools[1].check, file.pools[1].check);
    let exit = overrides.exit(&web1()).unwrap();
    assert_eq!((exit.cause, exit.since, exit.deadline), (Cause::Removed, NOW, None));

    // Another reload changes nothing of it; neither does asking again for what is in effect.
    let (again, _) = overrides.with_file(&config, &without, NOW + MINUTE);
    assert_eq!(again, overrides);
    assert_eq!(again.effective(&config, &without), config);

    let mut rest = again.clone();
    rest.let_go(&HashSet::from([web1(), key("api", "10.0.1.1")]));
    assert_eq!(rest.effective(&config, &without), without);

    // Back in the file, it is as if it had never left.
    let (back, _) = overrides.with_file(&config, &file, NOW + MINUTE);
    assert_eq!((back.effective(&config, &file), back), (file, Overrides::default()));
}

#[test]
fn a_deadline_that_an_operator_gave_holds_for_a_backend_that_leaves_the_file() {
    let file = parsed(ALL);
    let without = parsed(
        "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.2, name: web2, weight: 50}]}\n",
    );
    let mut overrides = Overrides::default();
    overrides.drain(&web1(), entry(&file, &web1()), NOW, Some(MINUTE));
    let (overrides, ended) = overrides.with_file(&file, &without, NOW);
    assert_eq!(ended[0].end, End::LeftTheFile);
    assert_eq!(overrides.exit(&web1()).unwrap().deadline, Some(NOW + MINUTE));
}

#[test]
fn a_name_that_the_file_gives_again_is_no_longer_that_of_who_leaves() {
    let file = parsed(ALL);
    let renamed = parsed(&ALL.replace("10.0.0.1,", "10.0.0.9,"));
    let (overrides, _) = Overrides::default().with_file(&file, &renamed, NOW);
    let config = overrides.effective(&file, &renamed);
    assert_eq!(names(&config)[..3], ["web/web1 100", "web/web2 50", "web/10.0.0.1 0 leaving"]);
}

#[test]
fn an_operator_may_give_a_leaving_backend_another_deadline() {
    let file = parsed(ALL);
    let without = parsed(
        "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.2, name: web2, weight: 50}]}\n",
    );
    let (mut overrides, _) = Overrides::default().with_file(&file, &without, NOW);
    overrides.drain(&web1(), entry(&file, &web1()), NOW + MINUTE, Some(MINUTE));
    let exit = overrides.exit(&web1()).unwrap();
    assert_eq!((exit.cause, exit.since), (Cause::Removed, NOW));
    assert_eq!(exit.deadline, Some(NOW + 2 * MINUTE));
    assert!(overrides.is_leaving(&web1()) && overrides.of(&web1()).is_none());
}

/// A directory that goes with the test.
struct Directory(std::path::PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xlb-overrides-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn files(&self) -> Vec<String> {
        let files = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn what_is_kept_comes_back_as_it_was() {
    let directory = Directory::new("kept");
    let (file, without) = (
        parsed(ALL),
        parsed(
            "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.2, name: web2}]}\n",
        ),
    );
    let (mut overrides, _) = Overrides::default().with_file(&file, &without, NOW);
    let web2 = key("web", "10.0.0.2");
    overrides.set_weight(&web2, entry(&without, &web2), 3);
    overrides.drain(&web2, entry(&without, &web2), NOW, Some(MINUTE));
    overrides.cut_off(&web2, Remaining { pins: 1, slots_new: 2, slots_old: 3, quic: true, uncounted: false });
    let config = overrides.effective(&file, &without);
    let store = Store::new(&directory.0);
    assert!(store.recover().pools.is_empty(), "of nothing");
    store.save(&overrides, &config).unwrap();
    store.save(&overrides, &config).unwrap();
    let recovered = store.recover();
    assert_eq!(recovered.overrides, overrides);
    let previous = recovered.previous(&without);
    let (after, ended) = recovered.overrides.with_file(&previous, &without, NOW + MINUTE);
    assert!(ended.is_empty());
    assert_eq!((after.effective(&previous, &without), &after), (config, &overrides));
    assert_eq!(directory.files(), ["overrides.json"]);
    let mode = std::fs::metadata(directory.0.join("overrides.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn backends_that_left_the_file_while_no_agent_ran_are_found_by_those_that_were_configured() {
    let directory = Directory::new("absent");
    let file = parsed(ALL);
    let store = Store::new(&directory.0);
    store.save(&Overrides::default(), &file).unwrap();
    let without = parsed(
        "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.2, name: web2}]}\n",
    );
    let recovered = store.recover();
    let previous = recovered.previous(&without);
    let (overrides, _) = recovered.overrides.with_file(&previous, &without, NOW);
    let config = overrides.effective(&previous, &without);
    assert_eq!(names(&config), ["web/web2 100", "web/web1 0 leaving", "api/10.0.1.1 0 leaving"]);
    assert_eq!(config.pools[1].check, file.pools[1].check);
}

#[test]
fn in_another_life_of_the_host_a_drain_goes_on_and_nobody_is_leaving() {
    let directory = Directory::new("boot");
    let (file, without) = (
        parsed(ALL),
        parsed(
            "  web: {forward: ipip, health: {type: tcp, port: 80}, backends: [{address: 10.0.0.2, name: web2}]}\n",
        ),
    );
    let (mut overrides, _) = Overrides::default().with_file(&file, &without, NOW);
    let web2 = key("web", "10.0.0.2");
    overrides.drain(&web2, entry(&without, &web2), NOW, Some(MINUTE));
    let store = Store::new(&directory.0);
    store.save(&overrides, &overrides.effective(&file, &without)).unwrap();
    let path = directory.0.join("overrides.json");
    let mut text: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    text["boot"] = "another".into();
    std::fs::write(&path, text.to_string()).unwrap();
    let recovered = store.recover();
    assert!(recovered.pools.is_empty() && recovered.overrides.leaving().next().is_none());
    let exit = recovered.overrides.exit(&web2).unwrap();
    assert_eq!((exit.cause, exit.since, exit.deadline), (Cause::Drain, Duration::ZERO, Some(Duration::ZERO)));
}

#[test]
fn a_file_that_no_agent_wrote_is_put_aside() {
    let directory = Directory::new("foreign");
    let store = Store::new(&directory.0);
    let path = directory.0.join("overrides.json");
    let whole = {
        store.save(&Overrides::default(), &parsed(ALL)).unwrap();
        std::fs::read_to_string(&path).unwrap()
    };
    for (name, text) in [
        ("nothing", String::new()),
        ("half", whole[..whole.len() / 2].to_owned()),
        ("another version", whole.replace("\"version\":1", "\"version\":2")),
        ("another forward", whole.replace("gue\"", "mpls\"")),
        ("more than is known", whole.replacen('{', "{\"more\":1,", 1)),
        ("no object", "[]".to_owned()),
    ] {
        std::fs::write(&path, text).unwrap();
        let recovered = store.recover();
        assert!(recovered.overrides == Overrides::default() && recovered.pools.is_empty(), "{name}");
        assert_eq!(directory.files(), ["overrides.json.refused"], "{name}");
    }
    std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
    assert_eq!(store.recover().overrides, Overrides::default());
    assert!(!path.exists());
    store.save(&Overrides::default(), &parsed(ALL)).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
}
