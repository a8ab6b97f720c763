//! What follows from health over time: which pool takes another's place, how fast a backend gets its share, how response
//! times become weights. Pure: time is an argument. Knows neither tables nor probes.

pub mod response;
pub mod slow_start;
pub mod tiers;
