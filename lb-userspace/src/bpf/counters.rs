//! Reads the kernel's counters, through descriptors of its own: any task may, beside the one that writes the maps.

use std::os::fd::AsFd;

use aya::maps::{Map, MapData, MapError, PerCpuArray};
use lb_common::abi::{Replies, Traffic, map};
use lb_common::outcome::Outcome;
use lb_common::pins::PinEvent;

use super::maps::MapsError;

/// What is counted: one row for each outcome, VIP and backend, with a value for each CPU.
pub struct Counters {
    outcomes: PerCpuArray<MapData, u64>,
    vips: PerCpuArray<MapData, Traffic>,
    backends: PerCpuArray<MapData, Traffic>,
    pin_events: PerCpuArray<MapData, u64>,
    replies: PerCpuArray<MapData, Replies>,
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counters").finish_non_exhaustive()
    }
}

impl Counters {
    /// The same maps as those, which go on to belong to the caller.
    pub(super) fn of(
        outcomes: &Map,
        vips: &Map,
        backends: &Map,
        pin_events: &Map,
        replies: &Map,
    ) -> Result<Self, MapsError> {
        Ok(Self {
            outcomes: again(outcomes, map::OUTCOMES)?,
            vips: again(vips, map::VIP_TRAFFIC)?,
            backends: again(backends, map::BACKEND_TRAFFIC)?,
            pin_events: again(pin_events, map::PIN_EVENTS)?,
            replies: again(replies, map::REPLIES)?,
        })
    }

    /// Packets of an outcome, over all CPUs.
    pub fn outcome(&self, outcome: Outcome) -> Result<u64, MapsError> {
        let values = self.outcomes.get(&(outcome as u32), 0);
        Ok(values.map_err(|error| MapsError::Map(map::OUTCOMES, error))?.iter().sum())
    }

    /// How often it happened, over all CPUs.
    pub fn pin_event(&self, event: PinEvent) -> Result<u64, MapsError> {
        let values = self.pin_events.get(&(event as u32), 0);
        Ok(values.map_err(|error| MapsError::Map(map::PIN_EVENTS, error))?.iter().sum())
    }

    pub fn vip(&self, row: u32) -> Result<Traffic, MapsError> {
        total(&self.vips, map::VIP_TRAFFIC, row)
    }

    /// What came back from a backend, over all CPUs; nothing where nothing is translated.
    pub fn replies(&self, id: u16) -> Result<Option<Replies>, MapsError> {
        let values = match self.replies.get(&u32::from(id), 0) {
            Ok(values) => values,
            Err(MapError::OutOfBounds { .. }) => return Ok(None),
            Err(error) => return Err(MapsError::Map(map::REPLIES, error)),
        };
        Ok(Some(values.iter().fold(Replies::default(), |sum, value| Replies {
            packets: sum.packets + value.packets,
            bytes: sum.bytes + value.bytes,
            resets: sum.resets + value.resets,
            answered: sum.answered + value.answered,
            waited: sum.waited + value.waited,
        })))
    }

    pub fn backend(&self, id: u16) -> Result<Traffic, MapsError> {
        total(&self.backends, map::BACKEND_TRAFFIC, u32::from(id))
    }
}

fn again<T: aya::Pod>(map: &Map, name: &'static str) -> Result<PerCpuArray<MapData, T>, MapsError> {
    let Map::PerCpuArray(data) = map else { return Err(MapsError::Missing(name)) };
    let open = || {
        let fd = data.fd().as_fd().try_clone_to_owned()?;
        PerCpuArray::try_from(Map::from_map_data(MapData::from_fd(fd)?)?)
    };
    open().map_err(|error: MapError| MapsError::Map(name, error))
}

fn total(map: &PerCpuArray<MapData, Traffic>, name: &'static str, row: u32) -> Result<Traffic, MapsError> {
    let values = map.get(&row, 0).map_err(|error| MapsError::Map(name, error))?;
    Ok(values.iter().fold(Traffic::default(), |sum, value| Traffic {
        packets: sum.packets + value.packets,
        bytes: sum.bytes + value.bytes,
    }))
}
