//! The real program in the real kernel (BPF_PROG_TEST_RUN) against the packet path on byte buffers:
//! equal verdict, equal bytes, equal counters, on every fixture and on random frames.
//!
//! Needs root and BPF; without them it fails, unless XLB_SKIP_ROOT is set.

use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::Ordering;

use lb_common::abi::{self, Features, PINS_PER_BUCKET, Pin, Traffic, constant, map};
use lb_common::decap::decap;
use lb_common::forward::forward;
use lb_common::outcome::{Action, DecapOutcome, Outcome};
use lb_common::packet::Buffer;
use lb_common::pins::PinEvent;
use lb_userspace::bpf::{BALANCER, DECAP, Datapath, DecapProgram, Maps, figures};
use lb_userspace::reconcile::desired::{LoadTime, desired};
use lb_userspace::reconcile::image::{Image, Traced, Trail};
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::pins::coarse_ns;
use lb_userspace::reconcile::plan::plan_at_once;
use tests::fixtures::{
    self, DecapSite, Dice, HEADROOM, Heard, INGRESS, MovingRow, PLACES, Place, Row, SEED, Setting, Staged,
    TranslatedRow, ages, check, check_decap, decap_rows, moving_rows, rows, translated_rows, xdp_verdict,
};
use tests::kernel::{RunDir, left_out};

/// Shortest frame that a program run takes.
const SHORTEST: usize = 14;
/// Longest frame in these tests, with room for a tunnel header.
const LONGEST: usize = 4096;

/// How far the coarse clock may be behind, nanoseconds.
const TICK: u64 = 20_000_000;

/// The loaded program, and what its counters should show.
struct Kernel {
    datapath: Datapath,
    image: Image,
    outcomes: Vec<u64>,
    vips: Vec<Traffic>,
    backends: Vec<Traffic>,
    frames: u64,
    // Last: the maps are closed before the directory goes.
    _dir: RunDir,
}

impl Kernel {
    fn load(setting: Setting, features: Features) -> Self {
        Self::load_with(setting, LoadTime { features, ..setting.load_time() })
    }

    fn load_with(setting: Setting, load_time: LoadTime) -> Self {
        let dir = RunDir::new().expect("a fresh run directory");
        let capacity = fixtures::capacity();
        let mut datapath = Datapath::open(dir.fs().unwrap_or_else(|e| panic!("{e:#}")), capacity, load_time)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        datapath.maps.set_interface(INGRESS, fixtures::interface()).expect("the interface's row");
        for op in fixtures::ways_back() {
            datapath.maps.apply(&op).unwrap_or_else(|error| panic!("{op:?}: {}", chain(&error)));
        }
        let before = datapath.maps.image().expect("a copy of fresh maps");
        let desired = desired(&setting.config(), &setting.world());
        for op in plan_at_once(&before, &desired, &capacity).expect("the fixtures are within their limits") {
            datapath.maps.apply(&op).unwrap_or_else(|error| panic!("{op:?}: {}", chain(&error)));
        }
        datapath.complete();
        let image = datapath.maps.image().expect("a copy of the filled maps");
        assert!(
            plan_at_once(&image, &desired, &capacity).expect("as before").is_empty(),
            "the maps are as desired"
        );
        Self {
            outcomes: vec![0; Outcome::ALL.len()],
            vips: vec![Traffic::default(); capacity.vips as usize],
            backends: vec![Traffic::default(); 128],
            frames: 0,
            datapath,
            image,
            _dir: dir,
        }
    }

    /// Runs a frame in the kernel and on the host, and compares. Returns the outcome and the output.
    fn compare(&mut self, name: &str, frame: &[u8]) -> (Outcome, Vec<u8>) {
        let (outcome, ifindex, expected, trail) = host(&self.image, frame);
        let mut out = vec![0; LONGEST];
        let (verdict, length) = self
            .datapath
            .test_run(frame, &mut out)
            .unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        out.truncate(length);
        self.frames += 1;
        assert_eq!(
            verdict,
            xdp_verdict(outcome.action()),
            "{name}: verdict; the host says {outcome:?}, {ifindex}"
        );
        assert_eq!(out, expected, "{name}: bytes; the host says {outcome:?}");
        self.outcomes[outcome as usize] += 1;
        self.assert_outcomes(name);
        self.assert_traffic(name, &trail);
        (outcome, out)
    }

    /// Runs the frame of a row among what the row needs; then everything is as it was. Returns outcome and output.
    fn compare_moving(&mut self, moving: &MovingRow) -> (Outcome, Vec<u8>) {
        let name = &moving.row.name;
        let at_rest = self.image.clone();
        let staged = moving.staged(&at_rest);
        self.carry_out(&staged.ops);
        self.image = self.datapath.maps.image().expect("a copy of the maps");
        for (way, bits) in staged.pins.iter().enumerate() {
            self.image.pins.words()[self.first_way(&staged) + way].store(*bits, Ordering::SeqCst);
        }
        let counted = |kernel: &Self| {
            PinEvent::ALL.map(|event| kernel.datapath.maps.counters().pin_event(event).expect("a counter"))
        };
        let (events, before) = (counted(self), *ages().start());
        let (.., trail) = host(&self.image, &moving.row.frame);
        let ran = self.compare(name, &moving.row.frame);
        let ages = before..=*ages().end();
        self.assert_pins(name, &staged, &trail, &ages);
        let mut expected = events;
        moving.events.iter().for_each(|event| expected[*event as usize] += 1);
        assert_eq!(counted(self), expected, "{name}: what is counted of pins");
        let failed =
            moving.events.iter().any(|event| matches!(event, PinEvent::FailedNew | PinEvent::FailedOld));
        let told = self.datapath.maps.failed_and_turn(staged.table).0;
        assert_eq!(told, u64::from(failed), "{name}: what the agent is told");
        self.image.pins.words().iter().for_each(|word| word.store(0, Ordering::SeqCst));
        self.carry_out(&staged.undo);
        self.image = at_rest;
        ran
    }

    /// As `compare_moving`, of a row of translated connections.
    fn compare_translated(&mut self, translated: &TranslatedRow) -> (Outcome, Vec<u8>) {
        let name = &translated.row.name;
        let at_rest = self.image.clone();
        self.carry_out(&translated.ops);
        self.image = self.datapath.maps.image().expect("a copy of the maps");
        let connections = self.image.connections.clone();
        let (age, from) = (*ages().start(), coarse_ns());
        let staged = translated.staged(age);
        staged.iter().for_each(|(position, place)| place.put(&connections, *position));
        let (.., trail) = host(&self.image, &translated.row.frame);
        let expected: Vec<Place> =
            (0..PLACES).map(|position| Place::left(&connections, &trail, position)).collect();
        let counted = |kernel: &Self| {
            let (id, _) = trail.reply?;
            kernel.datapath.maps.counters().replies(id).expect("a counter")
        };
        let before = counted(self);
        let (outcome, output) = self.compare(name, &translated.row.frame);
        let (ages, times) = (age..=*ages().end(), from..=coarse_ns() + TICK);
        let at = |position| Place::at(&connections, position);
        let checked = translated.check(&output, &staged, &at, &ages, &times);
        checked.unwrap_or_else(|error| panic!("{name}: {error}"));
        for (position, expected) in (0..PLACES).zip(expected) {
            let found = at(position);
            assert_eq!(found.timeless(), expected.timeless(), "{name}: place {position}");
        }
        if let Some((before, after)) = before.zip(counted(self)) {
            let heard = Heard::between(trail.reply.map_or(0, |(id, _)| id), before, after);
            assert_eq!(Some(heard), translated.heard, "{name}: what is counted of answers");
        }
        (0..PLACES).for_each(|position| Place::FREE.put(&connections, position));
        self.carry_out(&translated.undo);
        self.image = at_rest;
        (outcome, output)
    }

    fn carry_out(&mut self, ops: &[MapOp]) {
        for op in ops {
            self.datapath.maps.apply(op).unwrap_or_else(|error| panic!("{op:?}: {}", chain(&error)));
        }
    }

    /// The place of the bucket's first pin.
    fn first_way(&self, staged: &Staged) -> usize {
        let buckets = self.image.pins.words().len() / PINS_PER_BUCKET;
        (staged.spread as usize & (buckets - 1)) * PINS_PER_BUCKET
    }

    /// The bucket is as the row wants it and as on the host, but for the time; no other has a pin.
    fn assert_pins(&self, name: &str, staged: &Staged, trail: &Trail, ages: &RangeInclusive<u16>) {
        let first = self.first_way(staged);
        let words: Vec<u64> =
            self.image.pins.words().iter().map(|word| word.load(Ordering::SeqCst)).collect();
        let bucket = std::array::from_fn(|way| words[first + way]);
        staged.check(&bucket, ages).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ageless = |bits: u64| {
            let pin = Pin::from_bits(bits);
            (pin.tag(), pin.backend(), pin.state())
        };
        let (_, expected) = trail.bucket.unwrap_or_else(|| panic!("{name}: no pin was looked for"));
        assert_eq!(bucket.map(ageless), expected.map(ageless), "{name}: pins");
        let others = words[..first].iter().chain(&words[first + PINS_PER_BUCKET..]);
        assert!(others.copied().all(|bits| bits == 0), "{name}: a pin in another bucket");
    }

    fn assert_outcomes(&self, name: &str) {
        for (outcome, expected) in Outcome::ALL.iter().zip(&self.outcomes) {
            let counted = self.datapath.maps.counters().outcome(*outcome).expect("a counter");
            assert_eq!(counted, *expected, "{name}: {}", outcome.counter());
        }
    }

    fn assert_traffic(&mut self, name: &str, trail: &Trail) {
        if let Some((vip, traffic)) = trail.vip {
            add(&mut self.vips[vip as usize], traffic);
            let counted = self.datapath.maps.counters().vip(vip).expect("a counter");
            assert_eq!(counted, self.vips[vip as usize], "{name}: VIP {vip}");
        }
        if let Some((id, traffic)) = trail.backend {
            add(&mut self.backends[usize::from(id)], traffic);
            let counted = self.datapath.maps.counters().backend(id).expect("a counter");
            assert_eq!(counted, self.backends[usize::from(id)], "{name}: backend {id}");
        }
    }

    /// Nothing was counted anywhere but where it was expected. Returns the number of frames.
    fn finish(self) -> u64 {
        for (vip, expected) in self.vips.iter().enumerate() {
            assert_eq!(
                self.datapath.maps.counters().vip(vip as u32).expect("a counter"),
                *expected,
                "VIP {vip}"
            );
        }
        for (id, expected) in self.backends.iter().enumerate() {
            assert_eq!(
                self.datapath.maps.counters().backend(id as u16).expect("a counter"),
                *expected,
                "backend {id}"
            );
        }
        assert_eq!(self.outcomes.iter().sum::<u64>(), self.frames, "every frame has one outcome");
        assert_eq!(self.datapath.maps.image().expect("a copy"), self.image, "packets change no table");
        self.frames
    }
}

fn add(sum: &mut Traffic, traffic: Traffic) {
    sum.packets += traffic.packets;
    sum.bytes += traffic.bytes;
}

fn host(image: &Image, frame: &[u8]) -> (Outcome, u32, Vec<u8>, Trail) {
    let mut bytes = vec![0xa5; HEADROOM];
    bytes.extend_from_slice(frame);
    let mut packet = Buffer::new(&mut bytes, HEADROOM, INGRESS);
    let tables = Traced::new(image);
    let decision = forward(&mut packet, &tables);
    let output = packet.frame().to_vec();
    (decision.outcome, decision.ifindex, output, tables.into_trail())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[test]
fn every_fixture_ends_in_the_kernel_as_on_the_host_and_as_its_row_says() {
    if left_out("every_fixture_ends_in_the_kernel_as_on_the_host_and_as_its_row_says") {
        return;
    }
    let rows = rows();
    for setting in Setting::ALL {
        let mut kernel = Kernel::load(setting, setting.features());
        for row in rows.iter().filter(|row| row.setting == setting) {
            let (outcome, output) = kernel.compare(&row.name, &row.frame);
            check(row, outcome, &output).unwrap_or_else(|error| panic!("{}: {error}", row.name));
        }
        let frames = kernel.finish();
        let figures = figures(setting.features()).unwrap_or_else(|error| panic!("{error:#}"));
        eprintln!("{setting:?}: {frames} fixtures, {figures:?}");
    }
}

#[test]
fn every_fixture_of_flows_on_the_move_ends_in_the_kernel_as_on_the_host_and_leaves_the_same_pins() {
    if left_out(
        "every_fixture_of_flows_on_the_move_ends_in_the_kernel_as_on_the_host_and_leaves_the_same_pins",
    ) {
        return;
    }
    let rows = moving_rows();
    let mut frames = 0;
    for (setting, budget) in [
        (Setting::Everything, true),
        (Setting::Everything, false),
        (Setting::Kinds, true),
        (Setting::Quic, true),
    ] {
        let pin_rate = if budget { setting.load_time().pin_rate } else { 0 };
        let mut kernel = Kernel::load_with(setting, LoadTime { pin_rate, ..setting.load_time() });
        for moving in rows.iter().filter(|moving| moving.row.setting == setting && moving.budget == budget) {
            let (outcome, output) = kernel.compare_moving(moving);
            let row = &moving.row;
            check(row, outcome, &output).unwrap_or_else(|error| panic!("{}: {error}", row.name));
        }
        frames += kernel.finish();
    }
    assert_eq!(frames, rows.len() as u64, "every row has its turn");
    eprintln!("{frames} fixtures of flows on the move");
}

#[test]
fn every_fixture_of_translated_connections_ends_in_the_kernel_as_on_the_host_and_leaves_the_same_connections()
{
    if left_out(
        "every_fixture_of_translated_connections_ends_in_the_kernel_as_on_the_host_and_leaves_the_same_connections",
    ) {
        return;
    }
    let setting = Setting::Translated;
    let mut kernel = Kernel::load(setting, setting.features());
    let rows = translated_rows(&kernel.image);
    for translated in &rows {
        let (outcome, output) = kernel.compare_translated(translated);
        let row = &translated.row;
        check(row, outcome, &output).unwrap_or_else(|error| panic!("{}: {error}", row.name));
    }
    let frames = kernel.finish();
    eprintln!("{frames} fixtures of translated connections");
}

#[test]
fn every_fixture_ends_alike_under_settings_that_it_was_not_made_for() {
    if left_out("every_fixture_ends_alike_under_settings_that_it_was_not_made_for") {
        return;
    }
    let rows = rows();
    for setting in Setting::ALL {
        let mut kernel = Kernel::load(setting, setting.features());
        for Row { name, frame, .. } in rows.iter().filter(|row| row.setting != setting) {
            kernel.compare(&format!("{name}, under {setting:?}"), frame);
        }
        kernel.finish();
    }
}

#[test]
fn every_shorter_form_of_a_fixture_ends_in_the_kernel_as_on_the_host() {
    if left_out("every_shorter_form_of_a_fixture_ends_in_the_kernel_as_on_the_host") {
        return;
    }
    let rows = rows();
    let mut frames = 0;
    for setting in Setting::ALL {
        let mut kernel = Kernel::load(setting, setting.features());
        for Row { name, frame, .. } in rows.iter().filter(|row| row.setting == setting) {
            // Of long frames, the headers and the edges: nothing looks at the middle.
            let lengths = (SHORTEST..frame.len()).filter(|&length| length < 160 || length + 48 > frame.len());
            for length in lengths {
                kernel.compare(&format!("{name}, cut to {length}"), &frame[..length]);
            }
        }
        frames += kernel.finish();
    }
    eprintln!("{frames} cut frames");
}

#[test]
fn random_and_mutated_frames_end_in_the_kernel_as_on_the_host() {
    if left_out("random_and_mutated_frames_end_in_the_kernel_as_on_the_host") {
        return;
    }
    let rows = rows();
    let frames: Vec<&[u8]> = rows.iter().map(|row| row.frame.as_slice()).collect();
    let mut dice = Dice(0x0b5e_55ed);
    for (setting, count) in
        [(Setting::Everything, 14_000), (Setting::RouteSource, 3_000), (Setting::OnlyIpv6, 3_000)]
    {
        let mut kernel = Kernel::load(setting, setting.features());
        for number in 0..count {
            let frame = if number % 5 == 0 { dice.noise() } else { dice.mutated(&frames) };
            kernel.compare(&format!("random frame {number} under {setting:?}: {frame:02x?}"), &frame);
        }
        kernel.finish();
    }
}

/// A plain read of a load-time constant is folded to its placeholder by the compiler, and the agent's
/// value is ignored without a word: so every bit must be seen to make a difference in the kernel.
#[test]
fn every_feature_bit_and_every_hash_key_bites() {
    if left_out("every_feature_bit_and_every_hash_key_bites") {
        return;
    }
    let rows = rows();
    let everything = Features::ALL.iter().fold(Features::default(), |all, (feature, _)| all.with(*feature));
    let bites = [
        (Features::IPV4, "TCP over IPv4 goes to its backend in an IPv4 tunnel", Outcome::PassFamilyOff),
        (Features::IPV6, "TCP over IPv6 goes to its backend in an IPv4 tunnel", Outcome::PassFamilyOff),
        (Features::IPIP4, "UDP over IPv6 goes to its backend in an IPv4 tunnel", Outcome::DropInconsistent),
        (Features::IPIP6, "UDP over IPv4 goes to its backend in an IPv6 tunnel", Outcome::DropInconsistent),
        (
            Features::L2,
            "TCP over IPv4 goes to its on-link backend under another MAC",
            Outcome::DropInconsistent,
        ),
        (Features::GUE4, "TCP over IPv4 goes to its backend in GUE over IPv4", Outcome::DropInconsistent),
        (Features::GUE6, "TCP over IPv4 goes to its backend in GUE over IPv6", Outcome::DropInconsistent),
        (Features::PORT_RULES, "the lowest port of a range, TCP over IPv4", Outcome::AnswerUnreachable),
        (Features::PREFIXES, "the shorter prefix's port, UDP over IPv6", Outcome::PassNotVip),
        (
            Features::SOURCE_HASH,
            "the first IPv4 fragment goes by its source, through another interface",
            Outcome::DropVipFragment,
        ),
        (Features::ECHO, "an IPv4 echo request 1 to a VIP is answered", Outcome::DropIcmpType),
        (Features::ECHO, "an IPv6 echo request 1 to a VIP is answered", Outcome::DropIcmpType),
        (Features::VLAN, "IPv4 traffic in a VLAN", Outcome::PassVlan),
        (Features::VIP_ARP, "an ARP request for a VIP is answered", Outcome::PassNotIp),
        (Features::VIP_ARP, "a neighbour solicitation for a VIP is answered", Outcome::PassNotVip),
    ];
    let mut with_all = Kernel::load(Setting::Everything, everything);
    let whole = |row: &&Row| row.setting == Setting::Everything && !row.name.starts_with("without vlan");
    for row in rows.iter().filter(whole) {
        let (outcome, output) = with_all.compare(&row.name, &row.frame);
        check(row, outcome, &output).unwrap_or_else(|error| panic!("with tracing, {}: {error}", row.name));
    }
    for (feature, name, without) in bites {
        let row = rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no row `{name}`"));
        let rest = Features::from_bits(everything.bits() & !feature.bits() & !Features::TRACE.bits());
        let (outcome, _) = Kernel::load(row.setting, rest).compare(name, &row.frame);
        assert_eq!(outcome, without, "{name}, without {feature:?}");
        assert_ne!(outcome, row.expect.outcome(), "{name}");
    }
    for (feature, name, without) in [
        (Features::NAT, "nat from IPv4 to IPv4, TCP: an ACK", Outcome::DropInconsistent),
        (Features::NAT, "nat from IPv6 to IPv6, UDP: an answer, by a datagram", Outcome::PassNotVip),
        (Features::FULLNAT, "fullnat from IPv6 to IPv4, TCP: an answer", Outcome::PassNotVip),
    ] {
        let rest = Features::from_bits(everything.bits() & !feature.bits() & !Features::TRACE.bits());
        let mut kernel = Kernel::load(Setting::Translated, rest);
        let translated = translated_rows(&kernel.image);
        let row = translated.iter().find(|translated| translated.row.name == name);
        let row = row.unwrap_or_else(|| panic!("no row `{name}`"));
        let connections = &kernel.image.connections;
        row.staged(*ages().start()).iter().for_each(|(position, place)| place.put(connections, *position));
        let (outcome, _) = kernel.compare(name, &row.row.frame);
        assert_eq!(outcome, without, "{name}, without {feature:?}");
    }
    // Keys: `compare` sees another tunnel source or label as soon as one of them is not the host's.
    let mut reseeded = Kernel::load(Setting::Everything, Setting::Everything.features());
    let flow = rows.iter().find(|row| row.name.starts_with("flow 1 ")).expect("a flow");
    let (_, before) = reseeded.compare(&flow.name, &flow.frame);
    let other = LoadTime { seed: SEED ^ 1, ..Setting::Everything.load_time() };
    assert!(reseeded.datapath.refit(other).expect("loaded again"));
    reseeded.image.meta = *reseeded.datapath.meta();
    let (_, after) = reseeded.compare(&flow.name, &flow.frame);
    assert_ne!(before, after, "another seed, another tunnel source");
    assert!(!reseeded.datapath.refit(other).expect("nothing to do"));
}

/// What is not asked for is not in the program: the verifier takes it out.
#[test]
fn without_any_one_feature_the_program_is_shorter() {
    if left_out("without_any_one_feature_the_program_is_shorter") {
        return;
    }
    let everything = Features::ALL.iter().fold(Features::default(), |all, (feature, _)| all.with(*feature));
    let instructions = |features| figures(features).unwrap_or_else(|e| panic!("{e:#}")).instructions;
    let with = instructions(everything);
    for (feature, name) in Features::ALL {
        let without = instructions(Features::from_bits(everything.bits() & !feature.bits()));
        assert!(0 < without && without < with, "without {name}: {without} of {with} instructions");
    }
}

/// The clock is the kernel's, so the figures are bounds: what a second brings at once, on each CPU, and no more
/// than the rate from then on. The other kinds have allowances of their own.
#[test]
fn a_flood_of_echo_requests_is_answered_at_the_rate_and_takes_nothing_from_other_messages() {
    if left_out("a_flood_of_echo_requests_is_answered_at_the_rate_and_takes_nothing_from_other_messages") {
        return;
    }
    const RATE: u64 = 50;
    const FLOOD: u64 = 20_000;
    let rows = rows();
    let row =
        |name: &str| rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no row `{name}`"));
    let mut kernel = Kernel::load(Setting::Everything, Setting::Everything.features());
    let load_time = LoadTime { icmp_rate: RATE, ..Setting::Everything.load_time() };
    assert!(kernel.datapath.refit(load_time).expect("loaded again"));
    let mut send = |row: &Row, expected: &[Action]| {
        let mut out = vec![0; LONGEST];
        let (verdict, _) = kernel.datapath.test_run(&row.frame, &mut out).expect("a run");
        assert!(expected.iter().any(|action| verdict == xdp_verdict(*action)), "{}: {verdict}", row.name);
    };
    let begun = std::time::Instant::now();
    for _ in 0..FLOOD {
        send(row("an IPv4 echo request 1 to a VIP is answered"), &[Action::Transmit, Action::Drop]);
    }
    let seconds = begun.elapsed().as_secs() + 1;
    send(row("fragmentation needed about a TCP packet from four"), &[Action::Transmit]);
    send(row("IPv4 of the ingress MTU does not fit a tunnel of the same"), &[Action::Transmit]);
    let counters = kernel.datapath.maps.counters();
    let counted = |outcome| counters.outcome(outcome).expect("a counter");
    let (answered, limited) = (counted(Outcome::AnswerEcho), counted(Outcome::DropEchoLimit));
    assert_eq!(answered + limited, FLOOD);
    let cpus = lb_userspace::capacity::possible_cpus();
    assert!(
        (RATE..=RATE * (1 + seconds) * cpus).contains(&answered),
        "{answered} in {seconds} s on {cpus} CPUs"
    );
    assert_eq!(counted(Outcome::ForwardErrorTransmit) + counted(Outcome::AnswerTooBig), 2);
}

/// Loading over the same maps keeps tables and counters.
#[test]
fn a_program_that_is_loaded_again_adopts_tables_and_counters() {
    if left_out("a_program_that_is_loaded_again_adopts_tables_and_counters") {
        return;
    }
    let rows = rows();
    let row = rows.iter().find(|row| row.name.starts_with("flow 1 ")).expect("a flow");
    let mut kernel = Kernel::load(Setting::Everything, Setting::Everything.features());
    assert!(!kernel.datapath.adopted);
    kernel.compare(&row.name, &row.frame);
    let fs = kernel.datapath.fs().clone();
    let reopened = Datapath::open(fs, fixtures::capacity(), Setting::Everything.load_time());
    kernel.datapath = reopened.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert!(kernel.datapath.adopted);
    kernel.compare(&row.name, &row.frame);
    kernel.finish();
}

#[test]
fn every_decap_fixture_ends_in_the_kernel_as_on_the_host() {
    if left_out("every_decap_fixture_ends_in_the_kernel_as_on_the_host") {
        return;
    }
    let mut program = DecapProgram::load(&DecapSite::config()).unwrap_or_else(|e| panic!("{e:#}"));
    let mut counted = vec![0; DecapOutcome::ALL.len()];
    let mut compare = |name: &str, frame: &[u8]| {
        let site = DecapSite::default();
        let mut bytes = frame.to_vec();
        let mut packet = Buffer::new(&mut bytes, 0, INGRESS);
        let outcome = decap(&mut packet, &site);
        let mut out = vec![0; LONGEST];
        let (verdict, length) = program.test_run(frame, &mut out).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        out.truncate(length);
        assert_eq!(verdict, xdp_verdict(outcome.action()), "{name}: verdict; the host says {outcome:?}");
        assert_eq!(out, packet.frame(), "{name}: bytes; the host says {outcome:?}");
        counted[outcome as usize] += 1;
        for (outcome, expected) in DecapOutcome::ALL.iter().zip(&counted) {
            let found = program.outcome(*outcome).expect("a counter");
            assert_eq!(found, *expected, "{name}: {}", outcome.counter());
        }
        (outcome, out)
    };
    let rows = decap_rows();
    for row in &rows {
        let (outcome, output) = compare(&row.name, &row.frame);
        check_decap(row, outcome, &output).unwrap_or_else(|error| panic!("{}: {error}", row.name));
        for length in SHORTEST..row.frame.len() {
            compare(&format!("{}, cut to {length}", row.name), &row.frame[..length]);
        }
    }
    let frames: Vec<&[u8]> = rows.iter().map(|row| row.frame.as_slice()).collect();
    let mut dice = Dice(0xdeca);
    for number in 0..4_000 {
        let frame = if number % 5 == 0 { dice.noise() } else { dice.mutated(&frames) };
        compare(&format!("random frame {number}: {frame:02x?}"), &frame);
    }
    eprintln!("{} decap fixtures, {} frames", rows.len(), counted.iter().sum::<u64>());
}

#[test]
fn map_names_in_the_objects_are_those_of_the_abi() {
    // Symbols of the ELF object, which end in a zero byte; no kernel is asked.
    let has = |object: &[u8], name: &str| {
        let symbol = [b"\0", name.as_bytes(), b"\0"].concat();
        object.windows(symbol.len()).any(|window| window == symbol)
    };
    for name in Maps::PINNED {
        assert!(has(BALANCER, name), "the balancer has no map {name}");
    }
    assert!(has(BALANCER, constant::CONSTANTS));
    for name in [map::DECAP_VIPS, map::DECAP_FROM4, map::DECAP_FROM6, map::DECAP_OUTCOMES] {
        assert!(has(DECAP, name), "decap has no map {name}");
        assert!(name.len() <= 15, "the kernel cuts {name}");
    }
    assert_eq!(Maps::PINNED.len(), 22);
    assert!(Maps::PINNED.iter().all(|name| name.len() <= 15));
    assert!(abi::OUTCOME_ROWS as usize >= Outcome::ALL.len());
}

/// Maps of the loaded object, by the names under which they are pinned.
#[test]
fn all_maps_and_nothing_else_are_pinned_and_go_with_the_run_directory() {
    if left_out("all_maps_and_nothing_else_are_pinned_and_go_with_the_run_directory") {
        return;
    }
    let kernel = Kernel::load(Setting::OnlyIpv4, Setting::OnlyIpv4.features());
    let bpffs = kernel.datapath.fs().path().to_owned();
    let directory = bpffs.join("maps_1");
    let names = |directory: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(directory)
            .expect("the bpffs")
            .map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
        // The kernel's own.
        names.retain(|name| !name.ends_with(".debug"));
        names.sort();
        names
    };
    let mut expected = Maps::PINNED.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(names(&directory), expected);
    assert_eq!(names(&bpffs), ["maps_1"]);
    drop(kernel);
    assert!(!bpffs.exists(), "{} stays behind", bpffs.display());
}
