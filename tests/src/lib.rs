//! Laboratories and fixtures for everything that needs a kernel.

pub mod balancer;
pub mod between;
pub mod crowd;
pub mod fixtures;
pub mod fuzz;
pub mod held;
pub mod kernel;
pub mod lab;
pub mod manager;
pub mod routed;
pub mod scene;
pub mod soak;
pub mod stage;
