//! Differential fuzzing: frames made out of others, through the packet path on the host and through the program in the
//! kernel; verdict, bytes and counters must be equal. What the packet path ought to do is the fixtures' to say.
//!
//! `tests/tests/fuzz.rs` runs the corpus and a million frames; the `fuzz` binary (`cargo xtask fuzz`) looks for frames
//! that reach what no frame of the corpus does, as long as it is told to.

mod balancer;
pub mod corpus;
mod decap;
mod hunt;
mod layers;
mod moving;
mod mutate;
mod repair;
mod translated;

pub use balancer::{Balancer, Change, HostRun, HostWay, Variant, host};
pub use decap::{Decap, DecapWay, decap_host};
pub use hunt::{BATCH, Hunter, Mismatch, hunt, shrunk};
pub use layers::{dump, plain, shape};
pub use mutate::{LONGEST, Mutator, SHORTEST};

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use corpus::Case;

use crate::fixtures::{Setting, decap_rows, image, open_all, rows, talks, translated_rows};

/// A program that frames are run through, on the host and, where it was loaded, in the kernel.
pub trait Subject {
    /// For people, and for reproducing.
    fn name(&self) -> String;

    /// The number of the outcome, or how host and kernel differ.
    fn run(&mut self, frame: &[u8]) -> Result<usize, String>;

    /// Whether the kernel has counted what the host has since the last call. What it has counted is taken for right
    /// from then on.
    fn settle(&mut self) -> Result<(), String>;

    /// Names of counters with the frames that ended in them, by number.
    fn counted(&self) -> Vec<(&'static str, u64)>;

    /// Whether the frames so far left the kernel's tables as they were.
    fn tables_are_unchanged(&self) -> Result<bool> {
        Ok(true)
    }
}

/// The programs whose frames are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Balancer,
    Decap,
}

impl Program {
    pub const ALL: [Self; 2] = [Self::Balancer, Self::Decap];

    pub fn name(self) -> &'static str {
        match self {
            Self::Balancer => "balancer",
            Self::Decap => "decap",
        }
    }

    /// Its corpus in the source tree.
    pub fn corpus(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{}.hex", self.name()))
    }

    /// Frames of the fixtures, as cases.
    pub fn fixtures(self) -> Vec<Case> {
        let (plain, translated) = self.fixtures_apart();
        [plain, translated].concat()
    }

    /// Those of translated connections are the second.
    fn fixtures_apart(self) -> (Vec<Case>, Vec<Case>) {
        let case = |name: &str, frame| Case { name: corpus::kebab(name), frame };
        match self {
            Self::Balancer => {
                (rows().into_iter().map(|row| case(&row.name, row.frame)).collect(), translated_fixtures())
            }
            Self::Decap => {
                (decap_rows().into_iter().map(|row| case(&row.name, row.frame)).collect(), Vec::new())
            }
        }
    }

    /// What new frames are made of: the corpus and the fixtures, as far as they can be run. Of translated connections
    /// there are some only where the setting has such, or is none.
    pub fn seeds(self, setting: Option<Setting>) -> Result<Vec<Case>> {
        let (plain, translated) = self.fixtures_apart();
        let mut cases = corpus::read(&self.corpus())?;
        cases.extend(plain);
        if setting.is_none_or(|setting| setting == Setting::Translated) {
            cases.extend(translated);
        }
        cases.retain(|case| (SHORTEST..=LONGEST).contains(&case.frame.len()));
        Ok(cases)
    }
}

/// Frames of translated connections, each once.
fn translated_fixtures() -> Vec<Case> {
    let image = image(Setting::Translated);
    let rows = translated_rows(&image).into_iter().map(|translated| translated.row);
    let mut cases: Vec<Case> =
        rows.map(|row| Case { name: corpus::kebab(&row.name), frame: row.frame }).collect();
    open_all(&image);
    let talks = (1..).zip(talks(&image));
    cases.extend(talks.map(|(number, frame)| Case { name: format!("talk-{number}"), frame }));
    let mut frames = HashSet::new();
    cases.retain(|case| frames.insert(case.frame.clone()));
    cases
}
