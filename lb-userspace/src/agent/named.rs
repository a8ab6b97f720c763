//! Whether QUIC connections may live on a backend that connection IDs name: no pin tells, only what it gets. Knows what was
//! counted when, and no maps.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What each backend was seen to have got, and since when it has been that.
#[derive(Debug, Default)]
pub struct Named {
    seen: HashMap<u16, (u64, Instant)>,
}

impl Named {
    /// Notes how many packets the backends that are watched have got by now, by their ids; forgets all others.
    pub fn note(&mut self, now: Instant, packets: &HashMap<u16, u64>) {
        self.seen.retain(|id, _| packets.contains_key(id));
        for (&id, &packets) in packets {
            let seen = self.seen.entry(id).or_insert((packets, now));
            if seen.0 != packets {
                *seen = (packets, now);
            }
        }
    }

    /// Whether one that is watched has got something within so long, or has not been watched for so long.
    pub fn gets(&self, now: Instant, id: u16, idle: Duration) -> bool {
        self.seen.get(&id).is_some_and(|(_, since)| now.saturating_duration_since(*since) < idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_gets_nothing_any_more_once_its_count_stood_still_for_the_time_that_a_silent_flow_is_protected()
     {
        const IDLE: Duration = Duration::from_secs(60);
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut named = Named::default();
        assert!(!named.gets(at(0), 7, IDLE), "nobody watches it");
        named.note(at(0), &HashMap::from([(7, 100)]));
        assert!(named.gets(at(59), 7, IDLE));
        named.note(at(59), &HashMap::from([(7, 101), (8, 0)]));
        assert!(named.gets(at(118), 7, IDLE) && named.gets(at(118), 8, IDLE));
        named.note(at(118), &HashMap::from([(7, 101), (8, 0)]));
        assert!(!named.gets(at(119), 7, IDLE));
        named.note(at(120), &HashMap::from([(8, 0)]));
        named.note(at(121), &HashMap::from([(7, 101)]));
        assert!(named.gets(at(122), 7, IDLE), "its id was given away meanwhile");
    }
}
