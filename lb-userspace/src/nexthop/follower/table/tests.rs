//! What follows from what, without a kernel.

use super::super::hold::TIMES;
use super::*;

const GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
const KEY: NeighbourKey = (3, GATEWAY);

fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 9, 0, last])
}

fn link() -> Link {
    Link {
        ifindex: 3,
        name: "eth0".into(),
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: 1500,
        up: true,
        admin_up: true,
        kind: None,
        xdp_program: None,
        xdp_generic: false,
        lower: None,
        redirect_target: true,
    }
}

fn path() -> Path {
    Path { ifindex: 3, gateway: Some(GATEWAY), preferred_source: None, mtu: None, encapsulates: false }
}

fn neighbour(last: u8, state: NeighbourState) -> Neighbour {
    Neighbour {
        ifindex: KEY.0,
        address: KEY.1,
        mac: Some(vec![2, 0, 0, 0, 0, last]),
        state,
        managed: false,
        learnt: false,
        validated: false,
    }
}

/// Two addresses behind one gateway on one link, and all of it told.
fn table(now: Instant, entry: Neighbour) -> Table {
    let mut table = Table::new(TIMES);
    table.on_links(now, vec![link()], true);
    table.watch([(address(1), None), (address(2), None)].into());
    for last in [1, 2] {
        table.on_path(now, address(last), Ok(path()));
    }
    assert_eq!(table.unread(), [KEY]);
    table.on_reading(now, KEY, Ok(Some(entry)));
    assert_eq!(table.take_link_news(), [LinkEvent::Changed(link())]);
    assert_eq!(table.take_news().len(), 2);
    table
}

fn macs(table: &mut Table) -> Vec<[u8; 6]> {
    table.take_news().into_values().map(|answer| answer.hop.unwrap().mac).collect()
}

#[test]
fn a_message_that_comes_while_a_neighbour_is_read_is_newer() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    table.forget_readings();
    assert_eq!(table.unread(), [KEY]);
    table.on_neighbour(now, KEY, Some(neighbour(2, NeighbourState::Reachable)));
    table.on_reading(now, KEY, Ok(Some(neighbour(1, NeighbourState::Reachable))));
    assert_eq!(macs(&mut table), [[2, 0, 0, 0, 0, 2]; 2]);
    assert!(!table.has_news());
}

#[test]
fn a_message_that_comes_while_links_are_read_is_newer() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    table.begin_reading_links();
    let appeared = Link { ifindex: 4, name: "eth1".into(), ..link() };
    table.on_link(now, appeared.clone());
    table.on_link_gone(3);
    table.on_links(now, vec![link()], false);
    let mut news = table.take_link_news();
    news.sort_by_key(|event| matches!(event, LinkEvent::Gone { .. }));
    assert_eq!(news, [LinkEvent::Changed(appeared), LinkEvent::Gone { ifindex: 3, name: "eth0".into() }]);
}

#[test]
fn what_changes_and_changes_back_is_not_told() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    for last in [2, 1] {
        table.on_neighbour(now, KEY, Some(neighbour(last, NeighbourState::Reachable)));
    }
    table.on_link(now, Link { mtu: 9000, ..link() });
    table.on_link(now, link());
    assert!(table.take_link_news().is_empty() && table.take_news().is_empty());
}

#[test]
fn a_kernel_that_takes_no_neighbour_into_its_care_is_asked_to_confirm_stale_ones() {
    let mut now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    let asked = |table: &mut Table, now| table.requests(now).iter().map(|r| r.care).collect::<Vec<_>>();
    for _ in 0..=REFUSALS {
        assert_eq!(asked(&mut table, now), [Care::Set]);
        assert_eq!(asked(&mut table, now), []);
        now += Duration::from_secs(1);
    }
    assert_eq!(asked(&mut table, now), []);
    table.on_neighbour(now, KEY, Some(neighbour(1, NeighbourState::Stale)));
    assert_eq!(asked(&mut table, now), [Care::Keep]);
    assert_eq!(asked(&mut table, now), []);
    assert_eq!(asked(&mut table, now + Duration::from_secs(1)), [Care::Keep]);
}

#[test]
fn neighbours_that_others_answer_for_are_left_alone() {
    let now = Instant::now();
    let learnt = Neighbour { learnt: true, ..neighbour(1, NeighbourState::Stale) };
    let validated = Neighbour { validated: true, ..neighbour(1, NeighbourState::Stale) };
    let managed = Neighbour { managed: true, ..neighbour(1, NeighbourState::Stale) };
    let fixed = [NeighbourState::Permanent, NeighbourState::Noarp].map(|state| neighbour(1, state));
    for entry in [learnt, validated, managed].into_iter().chain(fixed) {
        let mut table = table(now, entry.clone());
        assert!(table.requests(now).is_empty(), "{entry:?}");
    }
}

#[test]
fn a_silent_neighbour_is_asked_about_every_second_and_not_through_a_link_that_is_down() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Permanent));
    table.on_neighbour(now, KEY, None);
    let second = Duration::from_secs(1);
    let asked = (0..5).map(|n| table.requests(now + n * second / 2).len());
    assert_eq!(asked.collect::<Vec<_>>(), [1, 0, 1, 0, 1]);
    table.on_link(now, Link { up: false, ..link() });
    assert!(table.requests(now + 9 * second).is_empty());
}

#[test]
fn a_neighbour_leaves_the_kernels_care_with_its_last_user() {
    let now = Instant::now();
    let entry = Neighbour { managed: true, ..neighbour(1, NeighbourState::Reachable) };
    let mut table = table(now, entry);
    let (new, released) = table.watch([(address(1), None)].into());
    assert!(new.is_empty() && released.is_empty());
    table.on_path(now, address(1), Ok(Path { gateway: None, ..path() }));
    let released = table.drop_unused();
    assert_eq!(released.iter().map(|r| (r.key, r.care)).collect::<Vec<_>>(), [(KEY, Care::TakeAway)]);
    assert_eq!(table.unread(), [(3, address(1))]);
}

#[test]
fn care_that_is_given_when_nobody_needs_it_any_more_is_undone() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    let request = table.requests(now).remove(0);
    let (_, released) = table.watch(Known::new());
    assert!(released.is_empty());
    let undo = table.on_request(now, request, None).unwrap();
    assert_eq!((undo.key, undo.care), (KEY, Care::TakeAway));
}

#[test]
fn a_neighbour_table_that_is_full_is_the_reason() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    table.on_neighbour(now, KEY, None);
    let full = Unresolved::NeighbourTableFull { neighbour: GATEWAY };
    let request = table.requests(now).remove(0);
    assert!(table.on_request(now, request, Some(full.clone())).is_none());
    assert!(table.take_news().values().all(|answer| answer.doubt == Some(full.clone())));
    table.on_time(now + TIMES.silent);
    assert!(table.take_news().values().all(|answer| answer.hop == Err(full.clone())));
}

#[test]
fn a_link_event_concerns_its_users_and_all_where_it_flips() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    let mut concerns = |link| {
        let mut concerns = table.on_link(now, link);
        concerns.users.sort();
        (concerns.users, concerns.all)
    };
    let users = vec![address(1), address(2)];
    assert_eq!(concerns(link()), (vec![], false));
    assert_eq!(concerns(Link { xdp_program: Some(7), ..link() }), (vec![], false));
    assert_eq!(concerns(Link { mtu: 1400, ..link() }), (users.clone(), false));
    assert_eq!(concerns(Link { up: false, ..link() }), (users, true));
    assert_eq!(concerns(Link { ifindex: 4, ..link() }), (vec![], true));
}

/// What was told may still be on its way when the watcher says what it knows.
#[test]
fn what_is_so_is_told_again_after_addresses_are_given_anew() {
    let now = Instant::now();
    let mut table = table(now, neighbour(1, NeighbourState::Reachable));
    table.on_path(now, address(1), Err(Unresolved::Blackhole));
    assert_eq!(table.take_news()[&address(1)].hop, Err(Unresolved::Blackhole));
    // The watcher has not taken this yet.
    table.on_path(now, address(1), Ok(path()));
    let good = table.watched[&address(1)].hold.answer().unwrap().hop;
    table.watch([(address(1), Some(good.clone()))].into());
    assert_eq!(table.take_news()[&address(1)].hop, good);
}
