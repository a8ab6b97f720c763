//! Where things stand in the file, for faults that only the host can find. Knows no rule, and nothing of the host.

use super::pools::PoolDraft;
use super::problem::{Problem, Spot};
use super::services::ServiceDraft;

/// A thing of the configuration, by its place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Interface(usize),
    /// Pool, and backend in it.
    Backend(usize, usize),
    /// Service, and VIP of it.
    Vip(usize, usize),
    /// `fullnat.sources`.
    Sources,
    /// `limits`.
    Limits,
}

/// Of a valid configuration; beside the model, so that two files that mean the same have equal models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    file: String,
    interfaces: Vec<Spot>,
    backends: Vec<Vec<Spot>>,
    vips: Vec<Vec<Spot>>,
    sources: Option<Spot>,
    limits: Option<Spot>,
}

impl Places {
    pub(super) fn new(
        file: &str,
        (interfaces, sources, limits): (Vec<Spot>, Option<Spot>, Option<Spot>),
        pools: &[PoolDraft],
        services: &[ServiceDraft],
    ) -> Self {
        let backends = |pool: &PoolDraft| pool.backends.iter().map(|(_, at)| at.clone()).collect();
        let vips = |service: &ServiceDraft| service.vips.iter().map(|(_, at)| at.clone()).collect();
        Self {
            file: file.to_owned(),
            interfaces,
            backends: pools.iter().map(backends).collect(),
            vips: services.iter().map(vips).collect(),
            sources,
            limits,
        }
    }

    /// What is wrong with it, and the way out.
    pub fn problem(&self, subject: Subject, message: impl Into<String>, hint: impl Into<String>) -> Problem {
        let spot = match subject {
            Subject::Interface(index) => self.interfaces.get(index),
            Subject::Backend(pool, index) => self.backends.get(pool).and_then(|spots| spots.get(index)),
            Subject::Sources => self.sources.as_ref(),
            Subject::Limits => self.limits.as_ref(),
            Subject::Vip(service, index) => self.vips.get(service).and_then(|spots| spots.get(index)),
        };
        Problem {
            file: self.file.clone(),
            line: spot.map(|spot| spot.place.line),
            column: spot.map(|spot| spot.place.column),
            path: spot.map_or_else(String::new, |spot| spot.path.clone()),
            message: message.into(),
            hint: Some(hint.into()),
        }
    }
}
