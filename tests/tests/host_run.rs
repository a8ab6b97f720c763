//! The packet path on byte buffers: every fixture, every shorter form of it, random frames, and the
//! spread of flows. Needs neither root nor a kernel; `program_run` does the same in the kernel.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lb_common::abi::{BACKEND_NOBODY, Backend, Discipline, PINS_PER_BUCKET, Path, SLOTS_PER_ROW, TableWord};
use lb_common::decap::decap;
use lb_common::forward::forward;
use lb_common::outcome::{Action, DecapOutcome, Outcome};
use lb_common::packet::Buffer;
use lb_common::slots::Slot;
use lb_common::wire::Mac;
use lb_userspace::reconcile::connections::Connections;
use lb_userspace::reconcile::desired::desired;
use lb_userspace::reconcile::image::{Image, Traced, Trail};
use lb_userspace::reconcile::pins::{Pins, coarse_ns};
use lb_userspace::reconcile::plan::plan_at_once;
use proptest::prelude::*;
use tests::fixtures::{
    self, AWAY, DecapSite, Dice, HEADROOM, Heard, INGRESS, PLACES, Place, Row, Setting, Transport, VIP4,
    VIP6, ages, check, check_decap, decap_rows, moving_rows, packet, rows, translated_rows,
};

/// What became of a frame.
struct Run {
    outcome: Outcome,
    ifindex: u32,
    output: Vec<u8>,
    trail: Trail,
}

fn run_with_room(image: &Image, frame: &[u8], room: usize) -> Run {
    // Whatever lay in the headroom must not show up in the output.
    let mut bytes = vec![0xa5; room];
    bytes.extend_from_slice(frame);
    let mut packet = Buffer::new(&mut bytes, room, INGRESS);
    let tables = Traced::new(image);
    let decision = forward(&mut packet, &tables);
    let output = packet.frame().to_vec();
    Run { outcome: decision.outcome, ifindex: decision.ifindex, output, trail: tables.into_trail() }
}

fn run(image: &Image, frame: &[u8]) -> Run {
    run_with_room(image, frame, HEADROOM)
}

fn images() -> HashMap<Setting, Image> {
    Setting::ALL.into_iter().map(|setting| (setting, fixtures::image(setting))).collect()
}

/// What holds for every frame, whatever it is.
fn assert_sound(name: &str, frame: &[u8], run: &Run) {
    assert_eq!(run.trail.outcomes, [run.outcome], "{name}: the outcome is counted once");
    let counter = run.outcome.counter();
    let about_one = counter.starts_with("forward_reply_error_");
    let back = counter.starts_with("forward_reply_") && !about_one;
    let heard = back || run.trail.reply.is_some() && is_halfway(run.outcome);
    assert_eq!(run.trail.reply.is_some(), heard, "{name}: what comes back is counted");
    let forwarded = counter.starts_with("forward_") && !back && !about_one;
    assert_eq!(run.trail.vip.is_some(), forwarded, "{name}: the VIP's counter");
    assert_eq!(run.trail.backend.is_some(), forwarded, "{name}: the backend's counter");
    assert_eq!(run.ifindex != 0, run.outcome.action() == Action::Redirect, "{name}: the way out");
    match run.outcome.action() {
        Action::Drop if is_halfway(run.outcome) => {}
        Action::Pass | Action::Drop => assert_eq!(run.output, frame, "{name}: changed, but not sent"),
        Action::Transmit | Action::Redirect => {
            let length = ip_length(&run.output);
            assert!(
                length.is_none_or(|length| 14 + length <= run.output.len()),
                "{name}: {length:?} of IP in {run:?}"
            );
        }
    }
}

/// Dropped when its translation may have begun.
fn is_halfway(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::DropUntranslatable | Outcome::DropNoChecksum | Outcome::DropHeadroom)
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, {} bytes: {:02x?}", self.outcome, self.output.len(), self.output)
    }
}

/// The frame without its VLAN tags.
fn untagged(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    while matches!(frame.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8])) && frame.len() >= 16 {
        frame.drain(12..16);
    }
    frame
}

/// The length that the frame's first IP header promises.
fn ip_length(frame: &[u8]) -> Option<usize> {
    let field = |at: usize| frame.get(at..at + 2).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]])));
    match field(12) {
        Some(0x0800) => field(16),
        Some(0x86dd) => field(18).map(|payload| 40 + payload),
        _ => None,
    }
}

#[test]
fn every_fixture_ends_as_its_row_says() {
    let images = images();
    let mut failures = Vec::new();
    for row in &rows() {
        let run = run(&images[&row.setting], &row.frame);
        assert_sound(&row.name, &row.frame, &run);
        if let Err(error) = check(row, run.outcome, &run.output) {
            failures.push(format!("{}: {error}", row.name));
        }
        if run.outcome.action() == Action::Redirect {
            assert_eq!(run.ifindex, AWAY, "{}", row.name);
        }
        if let Some((_, traffic)) = run.trail.vip {
            let inner = ip_length(&untagged(&row.frame)).expect("IP is forwarded, nothing else");
            assert_eq!(traffic.bytes, inner as u64, "{}: bytes are those of IP, without padding", row.name);
            assert_eq!(run.trail.backend.map(|(_, traffic)| traffic), Some(traffic), "{}", row.name);
        }
    }
    assert!(failures.is_empty(), "{} rows:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_fixture_of_flows_on_the_move_ends_as_its_row_says_and_leaves_the_pin_that_it_should() {
    let images = images();
    let mut failures = Vec::new();
    for moving in &moving_rows() {
        let row = &moving.row;
        let staged = moving.staged(&images[&row.setting]);
        let mut image = images[&row.setting].clone();
        staged.ops.iter().for_each(|op| image.apply(op));
        // One bucket: it is that of every flow.
        let pins: Vec<AtomicU64> = staged.pins.map(AtomicU64::new).into();
        assert_eq!(pins.len(), PINS_PER_BUCKET);
        image.pins = Pins::of(Arc::new(pins));
        image.meta.pin_rate = u64::from(moving.budget);
        let before = *ages().start();
        let run = run(&image, &row.frame);
        assert_sound(&row.name, &row.frame, &run);
        let (spread, pins) =
            run.trail.bucket.unwrap_or_else(|| panic!("{}: no pin was looked for", row.name));
        assert_eq!(spread, staged.spread, "{}", row.name);
        let met = run.trail.backend.map(|(id, _)| id);
        let checks = [
            check(row, run.outcome, &run.output),
            staged.check(&pins, &(before..=*ages().end())),
            if met == staged.to { Ok(()) } else { Err(format!("at {met:?} instead of {:?}", staged.to)) },
            if run.trail.pins == moving.events {
                Ok(())
            } else {
                Err(format!("counts {:?}", run.trail.pins))
            },
        ];
        failures
            .extend(checks.into_iter().filter_map(Result::err).map(|error| format!("{}: {error}", row.name)));
    }
    assert!(failures.is_empty(), "{} faults:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_fixture_of_translated_connections_ends_as_its_row_says_and_leaves_the_connection_that_it_should() {
    let at_rest = fixtures::image(Setting::Translated);
    let rows = translated_rows(&at_rest);
    let mut failures = Vec::new();
    for translated in &rows {
        let row = &translated.row;
        let mut image = at_rest.clone();
        translated.ops.iter().for_each(|op| image.apply(op));
        image.connections = Connections::in_memory(PLACES as usize);
        let (age, from) = (*ages().start(), coarse_ns());
        let staged = translated.staged(age);
        staged.iter().for_each(|(position, place)| place.put(&image.connections, *position));
        let run = run(&image, &row.frame);
        let (ages, times) = (age..=*ages().end(), from..=coarse_ns());
        assert_sound(&row.name, &row.frame, &run);
        let at = |position| Place::left(&image.connections, &run.trail, position);
        let heard = run.trail.reply.map(|(backend, reply)| Heard::of(backend, reply));
        let checks = [
            check(row, run.outcome, &run.output),
            translated.check(&run.output, &staged, &at, &ages, &times),
            if heard == translated.heard { Ok(()) } else { Err(format!("counts {heard:?}")) },
        ];
        let wrong = checks.into_iter().filter_map(Result::err);
        failures.extend(wrong.map(|error| format!("{}: {error}", row.name)));
        if run.outcome.action() == Action::Redirect {
            assert_eq!(run.ifindex, AWAY, "{}", row.name);
        }
    }
    assert!(failures.is_empty(), "{} faults:\n{}", failures.len(), failures.join("\n"));
    eprintln!("{} fixtures of translated connections", rows.len());
}

#[test]
fn an_icmp_error_goes_to_the_backend_of_the_flow_that_it_is_about() {
    let images = images();
    let image = &images[&Setting::Everything];
    let mut tried = 0;
    for (flow, errors) in fixtures::errors_of_flows() {
        let met = run(image, &flow).trail;
        for error in errors {
            let about = run(image, &error);
            let outcomes = [Outcome::ForwardErrorTransmit, Outcome::ForwardErrorRedirect];
            assert!(outcomes.contains(&about.outcome), "{about:?}");
            assert_eq!((about.trail.met, about.trail.slot), (met.met, met.slot), "{error:02x?}");
            assert_eq!(about.trail.vip.map(|(vip, _)| vip), met.vip.map(|(vip, _)| vip));
            tried += 1;
        }
    }
    assert!(tried > 60, "{tried} errors");
}

#[test]
fn a_client_meets_one_backend_of_a_service_that_hashes_by_source_whatever_it_sends() {
    let image = fixtures::image(Setting::Kinds);
    for frames in fixtures::sticky_flows() {
        let met: Vec<_> =
            frames.iter().map(|frame| run(&image, frame).trail.backend.map(|(id, _)| id)).collect();
        assert!(met[0].is_some() && met.iter().all(|id| *id == met[0]), "{met:?}");
    }
    // Other clients meet others: nothing else of the frame is left to tell them apart.
    let frame = &fixtures::sticky_flows()[0][0];
    let clients = (0..64).map(|last| {
        let mut frame = frame.clone();
        frame[29] = last;
        run(&image, &frame).trail.met
    });
    assert!(clients.collect::<std::collections::HashSet<_>>().len() > 1);
}

#[test]
fn a_quic_connection_meets_its_server_wherever_its_packets_come_from() {
    let image = fixtures::image(Setting::Quic);
    let mut hashed = std::collections::HashSet::new();
    for (server, frames) in fixtures::quic_flows() {
        for frame in frames {
            let met = run(&image, &frame).trail;
            let row = met.backend.map(|(id, _)| image.backends[usize::from(id)]);
            assert_eq!(row.as_ref().and_then(lb_userspace::lookup::address), Some(server));
            assert!(met.slot.is_none(), "no slot is looked at");
            // With the bit of a long header set, the same packet goes by its addresses.
            let mut long = frame.clone();
            long[42] |= 0x80;
            hashed.insert((server, run(&image, &long).trail.met));
        }
    }
    assert!(hashed.len() > fixtures::quic_flows().len(), "the addresses would have led elsewhere");
}

#[test]
fn a_quic_connection_that_opens_goes_where_new_flows_go_and_others_stay() {
    let mut image = fixtures::image(Setting::Quic);
    let [old, new] = [1, 2];
    let moving = Slot::new(new, old, true, false).bits();
    image.slots.iter_mut().flat_map(|row| &mut row.0).for_each(|word| *word = moving);
    for (name, frame, opens) in fixtures::quic_openings() {
        let met = run(&image, &frame).trail.met;
        assert_eq!(met, Some(if opens { new } else { old }), "{name}");
    }
}

#[test]
fn who_is_down_or_gone_gets_no_packets_of_his_quic_connections() {
    let image = fixtures::image(Setting::Quic);
    let strays = [Outcome::ForwardQuicStrayTransmit, Outcome::ForwardQuicStrayRedirect];
    for (server, frames) in fixtures::quic_flows() {
        let is_it = |row: &Backend| lb_userspace::lookup::address(row) == Some(server);
        let mut down = image.clone();
        down.backends.iter_mut().filter(|row| is_it(row)).for_each(|row| row.flags = Backend::EMPTIED);
        let mut gone = image.clone();
        gone.servers.retain(|_, id| !is_it(&gone.backends[usize::from(*id)]));
        for image in [down, gone] {
            for frame in &frames {
                let run = run(&image, frame);
                assert!(strays.contains(&run.outcome), "{run:?}");
                assert!(run.trail.slot.is_some(), "its slot decides");
            }
        }
    }
}

/// All checksums that an echo request can have, its identifier being what it is for.
#[test]
fn an_echo_reply_has_the_right_checksum_in_all_65536_cases() {
    let images = images();
    let rows = rows();
    for family in ["IPv4", "IPv6"] {
        for kind in [
            "an {} echo request 0 to a VIP is answered",
            "an {} echo request of nothing but zeros is answered",
        ] {
            let name = kind.replace("{}", family);
            let row = rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no row `{name}`"));
            let message = if family == "IPv4" { 34 } else { 54 };
            for id in 0..=u16::MAX {
                let mut frame = row.frame.clone();
                let checksum = u16::from_be_bytes([frame[message + 2], frame[message + 3]]);
                frame[message + 4..message + 6].copy_from_slice(&id.to_be_bytes());
                // RFC 1071: the identifier was 0, so the sum grows by the new one.
                let sum = u32::from(!checksum) + u32::from(id);
                let sum = (sum & 0xffff) + (sum >> 16);
                frame[message + 2..message + 4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
                let run = run(&images[&Setting::Everything], &frame);
                let row = Row { name: format!("{name}, {id}"), frame, ..*row };
                check(&row, run.outcome, &run.output).unwrap_or_else(|error| panic!("{}: {error}", row.name));
            }
        }
    }
}

#[test]
fn no_shorter_form_of_a_fixture_panics_or_promises_more_than_it_has() {
    let images = images();
    for Row { name, setting, frame, .. } in &rows() {
        for length in 0..frame.len() {
            let short = &frame[..length];
            assert_sound(&format!("{name}, cut to {length}"), short, &run(&images[setting], short));
        }
    }
}

#[test]
fn without_room_for_a_tunnel_header_the_frame_is_dropped_and_counted() {
    let images = images();
    for Row { name, setting, frame, expect } in &rows() {
        let fixtures::Expect::Tunnel { .. } = expect else { continue };
        let whole = run(&images[setting], frame);
        let growth = whole.output.len() - frame.len();
        assert_eq!(run_with_room(&images[setting], frame, growth).outcome, whole.outcome, "{name}");
        let dropped = run_with_room(&images[setting], frame, growth - 1);
        assert_eq!(dropped.outcome, Outcome::DropHeadroom, "{name}");
        // Where tags were taken off there is room for the tunnel, and then none for them.
        if *setting != Setting::Tagged {
            assert_sound(name, frame, &dropped);
        }
    }
}

/// Each contradiction is one that only a fault of the agent could bring about.
#[test]
fn tables_that_contradict_each_other_drop_and_count() {
    let whole = fixtures::image(Setting::Everything);
    let frame = packet_to(80, 40_000);
    let id = run(&whole, &frame).trail.met.expect("a backend");
    let (table, _) = run(&whole, &frame).trail.table.expect("a table");
    type Spoil<'s> = &'s dyn Fn(&mut Image);
    let broken: [(&str, Spoil<'_>); 6] = [
        ("a backend of a kind that this version does not know", &|i| i.backends[usize::from(id)].kind = 200),
        ("a path to an egress row that does not exist", &|i| {
            i.backends[usize::from(id)].path = Path::new(Mac::BROADCAST, u16::MAX).bits();
        }),
        ("fewer tables than VIPs name", &|i| i.tables.truncate(usize::from(table))),
        ("fewer slots than a table names", &|i| i.slots.truncate(1)),
        ("fewer backends than slots name", &|i| i.backends.truncate(1)),
        ("a table that lies behind the slots", &|i| {
            i.tables[usize::from(table)] = TableWord::new(1 << 28, 20, Discipline::Hash).bits()
        }),
    ];
    for (name, spoil) in broken {
        let mut image = whole.clone();
        spoil(&mut image);
        let run = run(&image, &frame);
        assert_eq!(run.outcome, Outcome::DropInconsistent, "{name}");
        assert_sound(name, &frame, &run);
    }
    let mut nobody = whole.clone();
    nobody.backends[usize::from(id)] = Backend::default();
    assert_eq!(run(&nobody, &frame).outcome, Outcome::DropNoBackend, "a free row");
    let mut unattached = whole;
    unattached.interfaces.clear();
    let questions =
        |row: &&Row| row.setting == Setting::Everything && matches!(row.expect, fixtures::Expect::ArpReply);
    for row in rows().iter().filter(questions) {
        let outcome = run(&unattached, &row.frame).outcome;
        assert_eq!(outcome, Outcome::PassNotIp, "on an interface that nobody noted: {}", row.name);
    }
}

fn packet_to(port: u16, source_port: u16) -> Vec<u8> {
    let ip = etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber::TCP, [192, 0, 2, 77], VIP4.octets());
    let ip = etherparse::IpHeaders::Ipv4(ip.expect("no payload"), Default::default());
    packet(ip, Transport::Tcp, (source_port, port), 0)
}

/// Pools of many backends of both families, and of different weights, behind one VIP of each family.
fn spread_image(backends: usize, weights: &[u8]) -> Image {
    let mut config = Setting::Everything.config();
    let template = config.pools[0].clone();
    config.pools.truncate(1);
    config.services.truncate(1);
    config.pools[0].backends = (0..backends)
        .map(|i| {
            let address: IpAddr = std::net::Ipv4Addr::from(0x0a01_0000 + i as u32).into();
            let weight = weights[i % weights.len()];
            lb_userspace::config::model::Backend {
                name: address.to_string(),
                address,
                weight,
                port: None,
                server_id: None,
                leaving: false,
            }
        })
        .collect();
    let mut world = Setting::Everything.world();
    let hop = world.next_hops[&template.backends[0].address].clone();
    for (index, backend) in config.pools[0].backends.iter().enumerate() {
        world.up.insert((0, index), true);
        Arc::make_mut(&mut world.next_hops).insert(backend.address, hop.clone());
    }
    let mut image = Image::empty(&fixtures::capacity(), fixtures::meta(Setting::Everything.load_time()));
    let ops =
        plan_at_once(&image, &desired(&config, &world), &fixtures::capacity()).expect("within the limits");
    ops.iter().for_each(|op| image.apply(op));
    image
}

/// The backends' slots of a table.
fn shares(image: &Image, word: TableWord) -> HashMap<u16, u32> {
    let mut shares = HashMap::new();
    for index in 0..word.length() {
        *shares.entry(image.slot(word.first_row() * SLOTS_PER_ROW + index).cur()).or_insert(0) += 1;
    }
    shares
}

/// The value that a chi-square of `df` degrees of freedom exceeds with p = 0.001 (Wilson, Hilferty, 1931).
fn chi2_limit(df: usize) -> f64 {
    let df = df as f64;
    let step = 2.0 / (9.0 * df);
    df * (1.0 - step + 3.090 * step.sqrt()).powi(3)
}

fn chi2(cells: impl Iterator<Item = (f64, f64)>) -> f64 {
    cells.map(|(seen, expected)| (seen - expected).powi(2) / expected).sum()
}

/// 100,000 random flows through the whole path, parsing included.
#[test]
fn random_flows_spread_over_slots_and_backends_as_the_table_says() {
    const FLOWS: usize = 100_000;
    for (name, backends, weights) in [
        ("3 equal", 3, &[100][..]),
        ("40 equal", 40, &[100]),
        ("41 equal", 41, &[100]),
        ("30 weighted", 30, &[100, 50, 10]),
    ] {
        let image = spread_image(backends, weights);
        let mut dice = Dice(7);
        for family in ["IPv4", "IPv6"] {
            let mut by_backend: HashMap<u16, u32> = HashMap::new();
            let mut by_slot: HashMap<u32, u32> = HashMap::new();
            let mut word = TableWord::default();
            let template = if family == "IPv4" { packet_to(80, 1) } else { packet6_to(80, 1) };
            for _ in 0..FLOWS {
                let mut frame = template.clone();
                let (source, ports) = if family == "IPv4" { (26..30, 34) } else { (22..38, 54) };
                let first = source.start;
                frame[source].iter_mut().for_each(|byte| *byte = dice.roll() as u8);
                // No martian, of either family.
                frame[first] = 32 + frame[first] % 64;
                frame[ports..ports + 2].copy_from_slice(&(dice.roll() as u16).to_be_bytes());
                let run = run(&image, &frame);
                assert_eq!(run.outcome, Outcome::ForwardTransmit);
                let (slot, _) = run.trail.slot.expect("a slot");
                word = run.trail.table.expect("a table").1;
                *by_slot.entry(slot).or_insert(0) += 1;
                *by_backend.entry(run.trail.backend.expect("a backend").0).or_insert(0) += 1;
            }
            let length = f64::from(word.length());
            let even = FLOWS as f64 / length;
            let slots =
                (0..word.length()).map(|slot| (f64::from(by_slot.get(&slot).copied().unwrap_or(0)), even));
            let (seen, limit) = (chi2(slots), chi2_limit(word.length() as usize - 1));
            assert!(seen < limit, "{name}, {family}: chi-square over slots {seen:.1}, limit {limit:.1}");

            let shares = shares(&image, word);
            assert!(!shares.contains_key(&BACKEND_NOBODY), "{name}: slots without a backend");
            assert_eq!(shares.len(), backends, "{name}: backends with slots");
            let cells = shares.iter().map(|(id, &share)| {
                (
                    f64::from(by_backend.get(id).copied().unwrap_or(0)),
                    f64::from(share) / length * FLOWS as f64,
                )
            });
            let (seen, limit) = (chi2(cells), chi2_limit(backends - 1));
            assert!(seen < limit, "{name}, {family}: chi-square over backends {seen:.1}, limit {limit:.1}");
            if weights.len() == 1 {
                let most = f64::from(*shares.values().max().expect("a backend"));
                let mean = length / backends as f64;
                assert!(most / mean <= 1.02, "{name}: the largest share is {:.4} of the mean", most / mean);
            }
        }
    }
}

fn packet6_to(port: u16, source_port: u16) -> Vec<u8> {
    let header = etherparse::Ipv6Header { destination: VIP6.octets(), hop_limit: 64, ..Default::default() };
    packet(etherparse::IpHeaders::Ipv6(header, Default::default()), Transport::Tcp, (source_port, port), 0)
}

#[test]
fn packets_of_a_flow_stay_together_and_families_and_protocols_share_nothing_but_the_backends() {
    let image = fixtures::image(Setting::Everything);
    for source_port in [1, 40_000, 65_535] {
        let frame = packet_to(80, source_port);
        let first = run(&image, &frame).trail.met;
        let mut later = frame.clone();
        // Sequence number, flags, TOS and TTL differ from packet to packet.
        later[38] ^= 0xff;
        later[47] ^= 0x12;
        later[15] ^= 0xfc;
        later[22] = 3;
        assert_eq!(run(&image, &later).trail.met, first);
    }
}

fn decap_run(frame: &[u8]) -> (DecapOutcome, Vec<u8>) {
    let site = DecapSite::default();
    let mut bytes = frame.to_vec();
    let mut packet = Buffer::new(&mut bytes, 0, INGRESS);
    let outcome = decap(&mut packet, &site);
    assert_eq!(*site.counted.borrow(), [outcome], "counted once");
    (outcome, packet.frame().to_vec())
}

#[test]
fn every_decap_fixture_ends_as_its_row_says() {
    for row in &decap_rows() {
        let (outcome, output) = decap_run(&row.frame);
        if let Err(error) = check_decap(row, outcome, &output) {
            panic!("{}: {error}", row.name);
        }
    }
}

#[test]
fn no_shorter_form_of_a_decap_fixture_panics() {
    for row in &decap_rows() {
        for length in 0..row.frame.len() {
            let (outcome, output) = decap_run(&row.frame[..length]);
            if outcome != DecapOutcome::Decapsulated {
                assert_eq!(output, row.frame[..length], "{}, cut to {length}", row.name);
            }
        }
    }
}

/// Forwarding and decapsulating are inverse to each other.
#[test]
fn what_goes_into_a_tunnel_comes_out_of_it() {
    let images = images();
    let mut tried = 0;
    for row in &rows() {
        // Of GUE to another port, and of other VIPs, the backend knows nothing.
        let tunnelled = matches!(row.expect, fixtures::Expect::Tunnel { pool, .. } if pool != "gue-away")
            && !matches!(row.setting, Setting::RouteSource | Setting::Kinds);
        if !tunnelled {
            continue;
        }
        let (outcome, output) = decap_run(&untagged(&run(&images[&row.setting], &row.frame).output));
        assert_eq!(outcome, DecapOutcome::Decapsulated, "{}", row.name);
        assert_eq!(output[12..], untagged(&row.frame)[12..], "{}", row.name);
        tried += 1;
    }
    assert!(tried > 40, "{tried} tunnels");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), seed: u64) {
        static IMAGES: std::sync::LazyLock<Vec<Image>> =
            std::sync::LazyLock::new(|| Setting::ALL.into_iter().map(fixtures::image).collect());
        let noise = Dice(seed).noise();
        for image in IMAGES.iter() {
            assert_sound("random bytes", &bytes, &run(image, &bytes));
            assert_sound("noise", &noise, &run(image, &noise));
        }
        decap_run(&bytes);
        decap_run(&noise);
    }

    #[test]
    fn mutated_fixtures_never_panic(seed: u64) {
        static ROWS: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(|| {
            let decap = decap_rows().into_iter().map(|row| row.frame);
            rows().into_iter().map(|row| row.frame).chain(decap).collect()
        });
        static IMAGES: std::sync::LazyLock<Vec<Image>> =
            std::sync::LazyLock::new(|| Setting::ALL.into_iter().map(fixtures::image).collect());
        let frames: Vec<&[u8]> = ROWS.iter().map(Vec::as_slice).collect();
        let mut dice = Dice(seed);
        for image in IMAGES.iter() {
            let frame = dice.mutated(&frames);
            assert_sound("a mutated fixture", &frame, &run(image, &frame));
            decap_run(&frame);
        }
    }
}
