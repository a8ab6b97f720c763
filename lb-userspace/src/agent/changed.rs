//! What has changed since the tables were worked out last, as far as it decides what is looked at again.

use crate::reconcile::desired::BackendRef;

/// Health of more backends than this is all looked at again.
const MOST: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// Nothing that tables go by.
    Nothing,
    /// The health of these, or what policy makes of it.
    Health(Vec<BackendRef>),
    /// Who knows.
    All,
}

impl Changed {
    pub fn anything(&self) -> bool {
        *self != Self::Nothing
    }

    /// The health of a backend, by its place in the configuration in effect.
    pub fn health(&mut self, at: BackendRef) {
        self.policy();
        if let Self::Health(of) = self {
            of.push(at);
            if of.len() > MOST {
                *self = Self::All;
            }
        }
    }

    /// No more than what is made of what is known.
    pub fn policy(&mut self) {
        if *self == Self::Nothing {
            *self = Self::Health(Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_change_is_never_less_than_what_changed() {
        let mut changed = Changed::Nothing;
        assert!(!changed.anything());
        changed.policy();
        assert_eq!((changed.anything(), &changed), (true, &Changed::Health(Vec::new())));
        changed.health((3, 7));
        changed.policy();
        assert_eq!(changed, Changed::Health(vec![(3, 7)]));
        (0..MOST).for_each(|backend| changed.health((0, backend)));
        assert_eq!(changed, Changed::All);
        changed.health((3, 7));
        changed.policy();
        assert_eq!(changed, Changed::All);
    }
}
