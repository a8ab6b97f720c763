//! What packets meet between two states: what runs under way may still read, and where packets end after each operation.

use super::*;

/// Every service target that packets find.
pub fn service_targets(image: &Image) -> Vec<VipTarget> {
    let of_entry = |entry| match entry {
        VipEntry::Service(target) => vec![target],
        VipEntry::Address { rules, .. } => rules.iter().map(|rule| rule.target).collect(),
        VipEntry::Source(_) => Vec::new(),
    };
    present_vips(image).into_values().flat_map(of_entry).collect()
}

/// Rows of buckets that a word names.
pub fn bucket_rows(word: VipWord) -> std::ops::Range<u32> {
    word.first_row()..word.first_row() + (1 << word.log2_buckets())
}

/// Targets of the entries that mark addresses and prefixes of a family, as they lie in the buckets that a word names.
pub fn marks(image: &Image, ipv4: bool, word: VipWord) -> Vec<(PortKey, VipTarget)> {
    let rows = bucket_rows(word).map(|row| row as usize);
    let entries: Vec<_> = match ipv4 {
        true => rows.flat_map(|row| image.vips4[row].0).map(|vip| (vip.key, vip.target)).collect(),
        false => rows.flat_map(|row| image.vips6[row].0).map(|vip| (vip.key, vip.target)).collect(),
    };
    entries.into_iter().filter(|(key, _)| key.is_address()).collect()
}

pub fn lengths(word: PrefixLengths) -> BTreeSet<u32> {
    (0..PrefixLengths::ROOM).map(|index| word.get(index)).filter(|length| *length != 0).collect()
}

/// Slots that tables take, by table.
pub fn regions(image: &Image) -> Vec<std::ops::Range<u32>> {
    let words = image
        .tables
        .iter()
        .map(|&bits| TableWord::from_bits(bits))
        .filter(|word| *word != TableWord::default());
    words
        .map(|word| word.first_row() * SLOTS_PER_ROW..word.first_row() * SLOTS_PER_ROW + word.length())
        .collect()
}

pub fn ids_of(slot: Slot) -> [u16; 2] {
    [slot.cur(), slot.est()]
}

/// What program runs that began before the last grace may still read: rows that were reachable at
/// some moment since. Writing any of them but by a single store misleads such a run.
#[derive(Default)]
pub struct Readable {
    pub slots: Vec<std::ops::Range<u32>>,
    pub backends: HashSet<u16>,
    pub egress: HashSet<u16>,
    pub buckets4: HashSet<u32>,
    pub buckets6: HashSet<u32>,
    pub rules: HashSet<u32>,
    /// Lengths that every run has, whenever it read the word: IPv4's, IPv6's.
    pub lengths: Option<[BTreeSet<u32>; 2]>,
}

impl Readable {
    /// What a packet that comes in now can reach.
    pub fn of(image: &Image) -> Self {
        let mut readable = Self::default();
        readable.note(image);
        readable
    }

    pub fn note_slots(&mut self, words: &[u32], image: &Image) {
        self.backends.extend(words.iter().flat_map(|&word| ids_of(Slot::from_bits(word))));
        self.note_ways_out(image);
    }

    pub fn note_ways_out(&mut self, image: &Image) {
        for &id in &self.backends {
            let egress = Path::from_bits(image.backends[usize::from(id)].path).egress();
            if egress != 0 {
                self.egress.insert(egress);
            }
            // Packets ask for the MTU, and go on as if there were an interface.
            let way = &image.egress[usize::from(egress)];
            assert_eq!(way.ifindex == 0, way.mtu == 0, "way {egress} is half of one: {way:?}");
        }
    }

    /// Adds what a packet that comes in now can reach.
    pub fn note(&mut self, image: &Image) {
        let tables: BTreeSet<u16> = service_targets(image).into_iter().map(VipTarget::table).collect();
        for table in tables {
            let word = TableWord::from_bits(image.tables[usize::from(table)]);
            let first = word.first_row() * SLOTS_PER_ROW;
            let region = first..first + word.length();
            let mut last = [BACKEND_NOBODY; 2];
            for index in region.clone() {
                let ids = ids_of(image.slot(index));
                if ids != last {
                    last = ids;
                    self.backends.extend(ids);
                }
            }
            if !self.slots.contains(&region) {
                self.slots.push(region);
            }
        }
        self.note_ways_out(image);
        self.buckets4.extend(bucket_rows(image.vip_index.word4()));
        self.buckets6.extend(bucket_rows(image.vip_index.word6()));
        for (ipv4, word) in [(true, image.vip_index.word4()), (false, image.vip_index.word6())] {
            for (_, target) in marks(image, ipv4, word) {
                let rules = target.first_rule()..target.first_rule() + target.rules();
                self.rules.extend(rules.map(|rule| rule / RULES_PER_ROW));
            }
        }
        let now = [lengths(image.vip_index.prefix_lengths4()), lengths(image.vip_index.prefix_lengths6())];
        self.lengths = Some(match self.lengths.take() {
            None => now,
            Some([v4, v6]) => [&v4 & &now[0], &v6 & &now[1]],
        });
    }

    /// Prefixes that the word brings and that a run under way would not look for.
    pub fn unknown_length(&self, image: &Image, ipv4: bool, word: VipWord) -> Option<String> {
        let known = &self.lengths.as_ref()?[usize::from(!ipv4)];
        let mut brought = marks(image, ipv4, word).into_iter().filter_map(|(key, _)| key.prefix_length());
        brought.find(|length| !known.contains(length)).map(|length| format!("nobody looks for /{length}"))
    }

    /// Why a run that is under way would be misled by the operation.
    pub fn objection(&self, image: &Image, op: &MapOp) -> Option<String> {
        match op {
            MapOp::WriteEgress { row, .. } => {
                self.egress.contains(row).then(|| format!("egress row {row} is in use"))
            }
            MapOp::WriteBackend { id, .. } => {
                self.backends.contains(id).then(|| format!("backend row {id} is in use"))
            }
            MapOp::WriteSlots { first, words } => {
                let written = *first..*first + words.len() as u32;
                // In a live table each slot changes by one store; a place that was left may not change.
                let live = regions(image);
                let stale = self.slots.iter().filter(|region| !live.contains(region));
                let hit = stale
                    .into_iter()
                    .find(|region| region.start < written.end && written.start < region.end)?;
                Some(format!("slots {written:?} were those of a table ({hit:?}) a moment ago"))
            }
            MapOp::WriteVips4 { row, buckets } => {
                let hit = (*row..*row + buckets.len() as u32).find(|row| self.buckets4.contains(row));
                hit.map(|row| format!("IPv4 bucket {row} is in use"))
            }
            MapOp::WriteVips6 { row, buckets } => {
                let hit = (*row..*row + buckets.len() as u32).find(|row| self.buckets6.contains(row));
                hit.map(|row| format!("IPv6 bucket {row} is in use"))
            }
            MapOp::WriteRules { row, rules } => {
                let hit = (*row..*row + rules.len() as u32).find(|row| self.rules.contains(row));
                hit.map(|row| format!("rule row {row} is in use"))
            }
            MapOp::SetVipWord4 { word } => self.unknown_length(image, true, *word),
            MapOp::SetVipWord6 { word } => self.unknown_length(image, false, *word),
            MapOp::SetPrefixLengths4 { lengths: word } => {
                let live = marks(image, true, image.vip_index.word4());
                let gone = live.iter().filter_map(|(key, _)| key.prefix_length());
                gone.into_iter().find(|l| !lengths(*word).contains(l)).map(|l| format!("/{l} is live"))
            }
            MapOp::SetPrefixLengths6 { lengths: word } => {
                let live = marks(image, false, image.vip_index.word6());
                let gone = live.iter().filter_map(|(key, _)| key.prefix_length());
                gone.into_iter().find(|l| !lengths(*word).contains(l)).map(|l| format!("/{l} is live"))
            }
            MapOp::SetPath { .. }
            | MapOp::ResetBackendTraffic { .. }
            | MapOp::ResetVipTraffic { .. }
            | MapOp::WriteTableState { .. }
            | MapOp::SetTableWord { .. }
            | MapOp::SetFilterWord { .. }
            | MapOp::SetClosing { .. }
            | MapOp::SetPools { .. }
            | MapOp::ExpectFailed { .. }
            | MapOp::SetFlags { .. }
            | MapOp::DropPins { .. }
            | MapOp::DropConnections { .. }
            | MapOp::WriteSource { .. }
            | MapOp::SetLoadWeight { .. }
            | MapOp::SetServer { .. }
            | MapOp::RemoveServer { .. }
            | MapOp::Grace => None,
        }
    }
}

/// Packets on the way from one state to the next.
pub struct Probes<'d> {
    pub old: &'d Desired,
    pub next: &'d Desired,
    pub before: Ends<'d>,
    pub after: Ends<'d>,
    pub packets: Vec<Packet>,
}

pub struct Packet {
    pub probe: Probe,
    pub flow: u16,
    pub flags: u8,
    /// Whom it is led to in the old state and in the next; nobody where its VIP goes.
    pub before: Option<Lead>,
    pub after: Option<Lead>,
    /// The one slot that it meets, as long as nothing but slots changes.
    pub slot: Option<u32>,
}

impl<'d> Probes<'d> {
    pub fn of(old: &'d Desired, next: &'d Desired, flows: &[u16]) -> Self {
        let (before, after) = (Ends::of(old), Ends::of(next));
        let mut packets = Vec::new();
        for probe in &before.probes() | &after.probes() {
            let (before, after) = (before.lead(&probe), after.lead(&probe));
            if before.is_none() {
                continue;
            }
            let flows = if after.is_none() { &flows[..1] } else { flows };
            for (flow, flags) in flows.iter().flat_map(|&flow| SAYS.map(|flags| (flow, flags))) {
                packets.push(Packet { probe, flow, flags, before, after, slot: None });
            }
        }
        Self { old, next, before, after, packets }
    }

    /// What is wrong with where packets end. Those that meet another slot than the operation wrote end as before.
    pub fn look(&mut self, image: &Image, op: &MapOp) -> Result<(), String> {
        let mut packets = std::mem::take(&mut self.packets);
        for packet in &mut packets {
            if let (MapOp::WriteSlots { first, words }, Some(slot)) = (op, packet.slot)
                && !(*first..*first + words.len() as u32).contains(&slot)
            {
                continue;
            }
            let end = send(image, &packet.probe, packet.flow, packet.flags);
            packet.slot = end.slot;
            let judged = match packet.after {
                None => self.leaves(packet, &end),
                Some(_) => self.stays(packet, &end, image),
            };
            judged.map_err(|wrong| format!("{:?} {wrong}", packet.probe))?;
        }
        self.packets = packets;
        Ok(())
    }

    /// Of the old state or of the next one: a new flow's slot says where new ones go, an old one's where it was.
    pub fn stays(&self, packet: &Packet, end: &End, image: &Image) -> Result<(), String> {
        let Packet { before, after, .. } = *packet;
        let ends = |state, targets: Option<&BTreeSet<Target>>| {
            targets.is_some_and(|targets| is_right(state, targets, end.outcome, end.took))
        };
        // A VIP that changes its pool meets, for a moment, the new members of the old one; one that comes to a table
        // of another VIP, those that this is leaving, whatever it was called before.
        let moved = before != after;
        let (at_the_old_one, that_leave) = (self.after.targets(before), self.before.targets(after));
        let lost = end.outcome == Outcome::DropUnresolved && self.loses_its_way(packet);
        let right = ends(self.old, self.before.targets(before))
            || ends(self.next, self.after.targets(after))
            || moved && ends(self.next, at_the_old_one)
            || moved && ends(self.old, that_leave)
            || end.took.is_some_and(|row| {
                moved && [self.old, self.next].iter().any(|state| state.backends.contains_key(&row.identity))
            });
        if !right && !lost {
            return Err(format!("ends as {:?}", end.outcome));
        }
        let Some(row) = end.took else { return Ok(()) };
        let path = Path::from_bits(row.path);
        let egress = &image.egress[usize::from(path.egress())];
        let knows = |state| knows_next_hop(state, &row, path, egress);
        if lost || knows(self.old) || knows(self.next) {
            Ok(())
        } else {
            Err("goes a way that nobody told".into())
        }
    }

    /// Whether old flows may be where no way leads any more.
    pub fn loses_its_way(&self, packet: &Packet) -> bool {
        let lost = |target: &Target| match target {
            Target::Backend(identity) => {
                self.next.backends.get(identity).is_some_and(|backend| backend.next_hop.is_none())
            }
            Target::Nobody | Target::Pass => false,
        };
        self.before.targets(packet.before).is_some_and(|targets| targets.iter().any(lost))
    }

    pub fn leaves(&self, packet: &Packet, end: &End) -> Result<(), String> {
        let gone = matches!(
            end.outcome,
            Outcome::PassNotVip
                | Outcome::DropVipPort
                | Outcome::DropVipFragment
                | Outcome::PassVipUnmapped
                | Outcome::AnswerUnreachable
        );
        // Its table may have the new state's slots already, in which nobody is up, or no way leads to who takes all.
        let no_way = self.next.backends.values().any(|backend| backend.next_hop.is_none());
        let nobody = matches!(end.outcome, Outcome::DropNoBackend | Outcome::PassNoBackend)
            || end.outcome == Outcome::DropUnresolved && no_way;
        let targets = self.before.targets(packet.before);
        let as_before = targets.is_some_and(|targets| is_right(self.old, targets, end.outcome, end.took));
        let lost = end.outcome == Outcome::DropUnresolved && self.loses_its_way(packet);
        let fine = gone || nobody || as_before || lost || end.took.is_some();
        if fine { Ok(()) } else { Err(format!("ends as {:?}", end.outcome)) }
    }
}
