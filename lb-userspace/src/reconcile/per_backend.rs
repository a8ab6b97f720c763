//! Something of each backend of a configuration, by its place there. For what most of them have.

use super::desired::BackendRef;

/// By pool, then backend.
#[derive(Debug, Clone)]
pub struct PerBackend<T>(Vec<Vec<Option<T>>>);

impl<T> PerBackend<T> {
    pub fn insert(&mut self, (pool, backend): BackendRef, value: T) {
        if self.0.len() <= pool {
            self.0.resize_with(pool + 1, Vec::new);
        }
        let of_pool = &mut self.0[pool];
        if of_pool.len() <= backend {
            of_pool.resize_with(backend + 1, || None);
        }
        of_pool[backend] = Some(value);
    }

    pub fn get(&self, (pool, backend): &BackendRef) -> Option<&T> {
        self.0.get(*pool)?.get(*backend)?.as_ref()
    }

    pub fn contains_key(&self, at: &BackendRef) -> bool {
        self.get(at).is_some()
    }

    pub fn iter(&self) -> impl Iterator<Item = (BackendRef, &T)> {
        let pools = self.0.iter().enumerate();
        let all = pools.flat_map(|(pool, of_pool)| {
            of_pool.iter().enumerate().map(move |(backend, value)| ((pool, backend), value))
        });
        all.filter_map(|(at, value)| Some((at, value.as_ref()?)))
    }
}

impl<T> Default for PerBackend<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: PartialEq> PartialEq for PerBackend<T> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<T> Extend<(BackendRef, T)> for PerBackend<T> {
    fn extend<I: IntoIterator<Item = (BackendRef, T)>>(&mut self, values: I) {
        values.into_iter().for_each(|(at, value)| self.insert(at, value));
    }
}

impl<T> FromIterator<(BackendRef, T)> for PerBackend<T> {
    fn from_iter<I: IntoIterator<Item = (BackendRef, T)>>(values: I) -> Self {
        let mut this = Self::default();
        this.extend(values);
        this
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_there_and_nothing_else() {
        let mut up = PerBackend::default();
        up.extend([((2, 1), true), ((0, 3), false)]);
        assert_eq!((up.get(&(2, 1)), up.get(&(0, 3))), (Some(&true), Some(&false)));
        assert!([(0, 0), (0, 4), (1, 0), (3, 0)].iter().all(|at| !up.contains_key(at)));
        assert!(up.iter().eq([((0, 3), &false), ((2, 1), &true)]));
        assert_eq!(up, PerBackend::from_iter([((0, 3), false), ((2, 1), true)]));
        up.insert((2, 1), false);
        assert_ne!(up, PerBackend::from_iter([((0, 3), false), ((2, 1), true)]));
    }
}
