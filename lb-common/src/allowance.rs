//! How many ICMP messages are sent and how many pins are made: a token bucket for each kind and CPU, so that a
//! flood of one kind takes nothing from another, and the answer to a flood is a trickle.

use crate::abi::Allowance;

/// Kinds that are counted apart. The number is the row in `XLB_ALLOWANCES`.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limited {
    /// Replies to echo requests.
    Echo = 0,
    /// ICMP errors that are delivered to the backend of the flow they are about.
    Error = 1,
    /// "Fragmentation needed" and "packet too big".
    TooBig = 2,
    /// "Port unreachable".
    Unreachable = 3,
    /// Pins of new flows.
    NewPin = 4,
    /// Pins of flows that were there before.
    OldPin = 5,
}

impl Limited {
    pub const ALL: [Self; 6] =
        [Self::Echo, Self::Error, Self::TooBig, Self::Unreachable, Self::NewPin, Self::OldPin];

    pub const fn is_pin(self) -> bool {
        matches!(self, Self::NewPin | Self::OldPin)
    }
}

const SECOND: u64 = 1_000_000_000;

/// A second's worth that a rate may be at the most: products with a second stay below 2^64.
pub const MOST_RATE: u64 = 1_000_000;

impl Allowance {
    /// Takes one message out, if there is one. The bucket holds what a second brings.
    #[inline(always)]
    pub fn take(&mut self, now: u64, rate: u64) -> bool {
        let elapsed = now.wrapping_sub(self.filled);
        let elapsed = if elapsed > SECOND { SECOND } else { elapsed };
        let most = rate.wrapping_mul(SECOND);
        let tokens = self.tokens.wrapping_add(elapsed.wrapping_mul(rate));
        let tokens = if tokens > most { most } else { tokens };
        self.filled = now;
        let allowed = tokens >= SECOND;
        self.tokens = if allowed { tokens - SECOND } else { tokens };
        allowed
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    fn sent(allowance: &mut Allowance, rate: u64, from: u64, step: u64, asked: u64) -> u64 {
        (0..asked).filter(|i| allowance.take(from + i * step, rate)).count() as u64
    }

    #[test]
    fn a_flood_gets_one_second_at_once_and_the_rate_from_then_on() {
        let mut allowance = Allowance::default();
        // The clock of a host that has been up for a day; a million questions over ten seconds.
        let day = 86_400 * SECOND;
        let answered = sent(&mut allowance, 1000, day, 10_000, 1_000_000);
        assert!((10_990..=11_000).contains(&answered), "{answered}");
    }

    #[test]
    fn a_quiet_time_fills_no_more_than_a_second() {
        let mut allowance = Allowance::default();
        assert_eq!(sent(&mut allowance, 10, 100 * SECOND, 0, 100), 10);
        assert_eq!(sent(&mut allowance, 10, 5000 * SECOND, 0, 100), 10);
        assert_eq!(sent(&mut allowance, 10, 5000 * SECOND + SECOND / 2, 0, 100), 5);
    }

    #[test]
    fn a_rate_of_zero_sends_nothing_and_the_highest_does_not_overflow() {
        assert_eq!(sent(&mut Allowance::default(), 0, 0, SECOND, 100), 0);
        let mut allowance = Allowance::default();
        assert_eq!(sent(&mut allowance, MOST_RATE, u64::MAX - SECOND, 0, MOST_RATE + 10), MOST_RATE);
        assert_eq!(sent(&mut allowance, 1, 2 * SECOND, SECOND, 3), 3);
    }
}
