//! Sets of pinned maps. Maps cannot change their size: other limits, or another layout, take a set of their own beside
//! the one in use, which goes when the last interface has been turned over. It must not know what lies in a map.

use std::io;
use std::path::{Path, PathBuf};

use super::bpffs::BpfFs;

const PREFIX: &str = "maps_";

/// One set of maps: the directory `maps_N` below the bpffs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    number: u32,
    dir: PathBuf,
}

impl Generation {
    fn at(fs: &BpfFs, number: u32) -> Self {
        Self { number, dir: fs.path().join(format!("{PREFIX}{number}")) }
    }

    /// All sets, the oldest first. More than one is there only while an agent turns over, or after it was
    /// killed then.
    pub fn all(fs: &BpfFs) -> io::Result<Vec<Self>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(fs.path())? {
            let name = entry?.file_name();
            numbers.extend(
                name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|n| n.parse::<u32>().ok()),
            );
        }
        numbers.sort_unstable();
        Ok(numbers.into_iter().map(|number| Self::at(fs, number)).collect())
    }

    /// A new, empty set, the newest.
    pub fn create(fs: &BpfFs) -> io::Result<Self> {
        let newest = Self::all(fs)?.last().map_or(0, |generation| generation.number);
        let this = Self::at(fs, newest + 1);
        std::fs::create_dir(&this.dir)?;
        Ok(this)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Removes the pins. The kernel keeps the maps while a program has them.
    pub fn remove(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            std::fs::remove_file(entry?.path())?;
        }
        std::fs::remove_dir(&self.dir)
    }
}
