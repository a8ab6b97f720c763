//! Health: probes backends and turns what the probes say into up and down. Knows nothing of pools, tables or
//! maps; its users name targets by a key of their own and feed every [`Probe`] to the [`Fsm`] of that key.

pub mod checker;
pub mod fsm;
pub mod probe;

pub use checker::{Checker, Outcome, Target};
pub use fsm::{Fsm, Last, State, Transition};
pub use probe::{Failure, Phase, Probe, probe};
