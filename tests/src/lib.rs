//! Laboratories and fixtures for everything that needs a kernel.

pub mod balancer;
pub mod lab;
