//! What an image says, in the words of what is desired, and what leads from one to the other once flows are silent.

use super::*;

pub fn capacity() -> Capacity {
    Capacity::new(&LIMITS)
}

pub fn fresh() -> Image {
    let all = lb_common::abi::Features::ALL
        .iter()
        .fold(Default::default(), |all: lb_common::abi::Features, f| all.with(f.0));
    let meta = Meta {
        abi_version: ABI_VERSION,
        seed: 7,
        features: all.bits(),
        icmp_rate: 1000,
        pin_rate: 1000,
        source_ports: 1024 | 1024 << 16,
        ..Meta::default()
    };
    let connections = Connections::in_memory(capacity().connections() as usize);
    Image { connections, ..Image::empty(&capacity(), meta) }
}

/// What the image says, in the words of `Desired`: ids and places are left out. A table may be longer than its content,
/// which is as long as `desired` says.
pub fn read_back(image: &Image, desired: &Desired) -> Desired {
    let mut read = Desired::default();
    // Every address has its row.
    if sources::place(image, desired) == image.sources {
        read.sources = desired.sources.clone();
    }
    for (row, weight) in image.backends.iter().zip(&image.load_weights).filter(|(row, _)| row.identity != 0) {
        let path = Path::from_bits(row.path);
        let egress = image.egress[usize::from(path.egress())];
        let backend = DesiredBackend {
            row: BackendRow { path: 0, ..*row },
            next_hop: (path != Path::default()).then(|| (path.mac(), egress)),
            pool: [0; 3],
            old_flows: Default::default(),
            weight: *weight as u8,
        };
        assert!(read.backends.insert(row.identity, backend).is_none(), "two rows of one backend");
    }
    for (word, state) in image.tables.iter().zip(&image.table_states).filter(|(_, state)| state.identity != 0)
    {
        let wanted = desired.tables.get(&state.identity);
        let table = read_table(image, TableWord::from_bits(*word), wanted.map(|table| table.log2_length));
        // Pools that it had before may be among them still.
        let pool_set = wanted.map_or(state.pools, |table| table.pool_set);
        assert!(pool_set.iter().zip(state.pools).all(|(wanted, pools)| pools & wanted == *wanted), "pools");
        let table = DesiredTable { pool_set, ..table };
        assert!(read.tables.insert(state.identity, table.into()).is_none(), "two tables of one identity");
    }
    let present = present_vips(image);
    let counted: HashMap<u32, Counted> =
        counter_rows(&present).into_iter().map(|(counted, row)| (row, counted)).collect();
    // What led to translated connections looks for them as long as there are backends that may have some.
    let kinds = image.backends.iter().filter_map(|row| BackendKind::from_raw(row.kind));
    let lingers = kinds.into_iter().any(BackendKind::translates);
    let translated: HashSet<Counted> = desired
        .vips
        .values()
        .flat_map(DesiredVip::leads)
        .filter(|lead| lead.flags & VipTarget::TRANSLATED != 0)
        .map(|lead| lead.counted)
        .collect();
    let lead = |target: VipTarget| {
        let counted = counted[&target.vip()];
        let looks = if lingers && !translated.contains(&counted) { 0 } else { VipTarget::TRANSLATED };
        Lead {
            table: image.table_states[usize::from(target.table())].identity,
            flags: target.flags() & (VipTarget::SOURCE_HASH | looks),
            counted,
        }
    };
    let vips = present
        .iter()
        .map(|(key, entry)| {
            let entry = match entry {
                VipEntry::Service(target) => DesiredVip::Service(lead(*target)),
                VipEntry::Source(_) => DesiredVip::Source,
                VipEntry::Address { flags, rules } => {
                    let rule = |rule: &lb_common::abi::PortRule| DesiredRule {
                        ports: ports(rule),
                        protocol: rule.protocol as u8,
                        lead: lead(rule.target),
                    };
                    DesiredVip::Address { flags: *flags, rules: rules.iter().map(rule).collect() }
                }
            };
            (*key, entry)
        })
        .collect();
    read.vips = Arc::new(vips);
    read
}

/// A table at rest, of which `log2_length` says how long its content is.
pub fn read_table(image: &Image, word: TableWord, log2_length: Option<u32>) -> DesiredTable {
    let log2_length = log2_length.unwrap_or(word.log2_length()).min(word.log2_length());
    let copies = 1 << (word.log2_length() - log2_length);
    let first = word.first_row() * SLOTS_PER_ROW;
    let slots: Vec<Slot> = (first..first + word.length()).map(|index| image.slot(index)).collect();
    let pins_all = word.discipline().pins_all();
    let content: Vec<Slot> = slots
        .chunks(copies)
        .map(|slots| {
            assert!(slots.iter().all(|slot| *slot == slots[0]), "parts of one slot differ");
            assert!(if pins_all { slots[0].dirty() && slots[0].pins() } else { slots[0].is_clean() });
            slots[0]
        })
        .collect();
    let target = |id| match id {
        BACKEND_NOBODY => Target::Nobody,
        BACKEND_PASS => Target::Pass,
        id => Target::Backend(image.backends[usize::from(id)].identity),
    };
    DesiredTable {
        log2_length,
        cur: content.iter().map(|slot| target(slot.cur())).collect(),
        est: pins_all.then(|| content.iter().map(|slot| target(slot.est())).collect()),
        discipline: word.discipline(),
        pools: Vec::new(),
        pool_set: [0; 3],
        idle: Duration::ZERO,
        protocol: 0,
    }
}

pub fn planned(image: &Image, desired: &Desired) -> Result<Vec<MapOp>, TestCaseError> {
    plan_at_once(image, desired, &capacity())
        .map_err(|error| TestCaseError::fail(format!("refused: {error}")))
}

/// What the agent does next where flows of before have been silent for long and no pin is left: `est` follows, `P` goes,
/// then what rested is free. Nothing where all is as desired.
pub fn settling(image: &Image, desired: &Desired) -> Result<Vec<MapOp>, TestCaseError> {
    let mut ops = finishing(image, desired);
    if ops.is_empty() {
        ops = clearing(image);
    }
    if ops.is_empty() {
        ops = planned(image, desired)?;
    }
    Ok(ops)
}

/// Goes on until all is as desired.
pub fn settle(image: &mut Image, desired: &Desired) -> Result<(), TestCaseError> {
    for _ in 0..10 {
        let ops = settling(image, desired)?;
        if ops.is_empty() {
            return Ok(());
        }
        ops.iter().for_each(|op| image.apply(op));
    }
    Err(TestCaseError::fail("never at rest"))
}

/// Lets `est` follow in every table.
pub fn finishing(image: &Image, desired: &Desired) -> Vec<MapOp> {
    let begin = Instant::now();
    let mut moves = Moves::new(begin);
    moves.observe(image, begin);
    let due = moves.due(image, begin + SLACK * 2, |table| Course::of(desired, image, table));
    if due.is_empty() { Vec::new() } else { finish(due) }
}

/// Takes `P` off every slot that is not on the move.
pub fn clearing(image: &Image) -> Vec<MapOp> {
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits));
    let hash = words.filter(|word| *word != TableWord::default() && !word.discipline().pins_all());
    let places = hash.flat_map(|word| {
        let first = word.first_row() * SLOTS_PER_ROW;
        first..first + word.length()
    });
    let slots = places.map(|index| (index, image.slot(index)));
    let held = slots.filter(|(_, slot)| slot.pins() && !slot.dirty());
    runs(held.map(|(index, slot)| (index, Slot::clean(slot.cur()).bits())))
}

/// Where the tables are not as desired, in few words.
pub fn difference(image: &Image, desired: &Desired) -> String {
    let read = read_back(image, desired);
    let mut text = String::new();
    if read.backends != desired.backends {
        text += &format!("backends: {:?} instead of {:?}\n", read.backends, desired.backends);
    }
    if read.vips != desired.vips {
        text += &format!("vips: {:?} instead of {:?}\n", read.vips, desired.vips);
    }
    for identity in read.tables.keys().chain(desired.tables.keys()).collect::<BTreeSet<_>>() {
        let (read, wanted) = (read.tables.get(identity), desired.tables.get(identity));
        let cur =
            |table: Option<&Arc<DesiredTable>>| table.map(|table| table.cur.clone()).unwrap_or_default();
        let (read_cur, wanted_cur) = (cur(read), cur(wanted));
        let differ = read_cur.iter().zip(wanted_cur.iter()).filter(|(read, wanted)| read != wanted).count();
        if read != wanted {
            text += &format!(
                "table {identity:x}: {} slots instead of {}, {differ} differ\n",
                read_cur.len(),
                wanted_cur.len()
            );
        }
    }
    text
}
