//! Which outcomes are worth handing on. It knows neither states nor what is made of them.

use crate::config::model::Check;
use crate::health::probe::Failure;

/// Holds back an outcome that is the same as so many before it as decide alone: whoever was told of those, and of every
/// outcome that was another, has come to a verdict, whatever it was before, and this one changes nothing.
#[derive(Debug)]
pub struct Filter {
    rise: u32,
    fall: u32,
    all: bool,
    last: Option<Result<(), Failure>>,
    /// Like the last, in a row and handed on.
    told: u32,
}

impl Filter {
    /// `all`: holds nothing back.
    pub fn new(check: &Check, all: bool) -> Self {
        Self { rise: check.rise, fall: check.fall, all, last: None, told: 0 }
    }

    /// Whether it is to be handed on, now that this is the next outcome.
    pub fn hands_on(&mut self, result: &Result<(), Failure>) -> bool {
        if self.last.as_ref() != Some(result) {
            self.last = Some(result.clone());
            self.told = 0;
        }
        let decides = match result {
            Ok(()) => self.rise,
            Err(failure) if failure.is_local() => 1,
            Err(_) => self.fall,
        };
        if self.told >= decides.max(1) {
            return self.all;
        }
        self.told += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;
    use crate::config::model::CheckKind;
    use crate::health::fsm::Fsm;
    use crate::health::probe::{Phase, Probe};

    fn check(rise: u32, fall: u32) -> Check {
        let time = Duration::from_secs(1);
        Check { kind: CheckKind::Tcp, port: 1, at_own_port: true, interval: time, timeout: time, rise, fall }
    }

    fn outcome() -> impl Strategy<Value = Result<(), Failure>> {
        prop_oneof![
            4 => Just(Ok(())),
            2 => Just(Err(Failure::Refused)),
            2 => Just(Err(Failure::TimedOut(Phase::Connect))),
            1 => Just(Err(Failure::ClosedEarly)),
            1 => Just(Err(Failure::FilteredHere)),
        ]
    }

    #[test]
    fn a_backend_that_stays_as_it_is_is_told_of_no_more() {
        let mut filter = Filter::new(&check(2, 3), false);
        let mut told = |result: Result<(), Failure>| (0..10).filter(|_| filter.hands_on(&result)).count();
        assert_eq!(told(Ok(())), 2);
        assert_eq!(told(Err(Failure::Refused)), 3);
        assert_eq!(told(Err(Failure::Reset)), 3);
        assert_eq!(told(Err(Failure::FilteredHere)), 1);
        assert_eq!(told(Ok(())), 2);
        let mut all = Filter::new(&check(1, 1), true);
        assert!((0..10).all(|_| all.hands_on(&Ok(()))));
    }

    proptest! {
        #[test]
        fn who_hears_what_is_handed_on_knows_what_one_knows_who_hears_all(
            rise in 1u32..4,
            fall in 1u32..4,
            adopted in any::<Option<bool>>(),
            runs in prop::collection::vec((outcome(), 1usize..7), 0..20),
        ) {
            let begin = Instant::now();
            let new = || match adopted {
                Some(up) => Fsm::adopted(up, begin, rise, fall),
                None => Fsm::new(rise, fall),
            };
            let (mut hears_all, mut hears, mut filter) = (new(), new(), Filter::new(&check(rise, fall), false));
            let outcomes = runs.into_iter().flat_map(|(outcome, count)| vec![outcome; count]);
            for (second, result) in (1..).zip(outcomes) {
                let now = begin + Duration::from_secs(second);
                let probe = Probe { took: Duration::ZERO, result };
                let all = hears_all.on_probe(now, &probe);
                let told = filter.hands_on(&probe.result).then(|| hears.on_probe(now, &probe)).flatten();
                prop_assert_eq!(all, told);
                prop_assert_eq!(hears_all.state(), hears.state());
                prop_assert_eq!(hears_all.is_hard(), hears.is_hard());
                prop_assert_eq!(hears_all.since(), hears.since());
                prop_assert_eq!(hears_all.describe(now, None), hears.describe(now, None));
            }
        }
    }
}
