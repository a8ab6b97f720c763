//! How many file descriptors this process may have open. Knows nothing of what they are for.

use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::debug;

/// Takes as many as the system gives to who asks: the usual limit, 1024, is for programs that use select(2).
pub fn take_all() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        debug!(%error, "no more file descriptors");
    }
}

pub fn limit() -> usize {
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit.try_into().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_may_be_had_are_taken() {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum.map(|maximum| maximum - 1);
        setrlimit(Resource::Nofile, limit).unwrap();
        take_all();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
