//! Pure builders of what lies in the kernel's tables. Nothing here knows ids, maps or health checks.

pub mod buckets;
pub mod maglev;
pub mod overlay;
pub mod sequence;
