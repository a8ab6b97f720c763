//! What the core makes of next hops: which are taken, and which can be used by which pool. How they are found is not its business.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use tracing::{debug, info, warn};

use super::changed::Changed;
use super::core::{Core, NextHops};
use super::own;
use crate::config::model::{Config, Forward};
use crate::nexthop::{Answer, Known, NextHop, Unresolved};
use crate::ways::Judge;

/// Next hops that are found at once and still logged each on a line.
const SAID_ONE_BY_ONE: usize = 64;

impl Core {
    /// Addresses of a configuration whose next hop is missing, or all.
    pub fn to_resolve(&self, config: &Config, all: bool) -> Vec<IpAddr> {
        let missing = |address: &IpAddr| self.next_hops.get(address).is_none_or(|answer| answer.hop.is_err());
        addresses(config).into_iter().filter(|address| all || missing(address)).collect()
    }

    /// What is known, for who follows it from here.
    pub fn known_next_hops(&self) -> Known {
        let known = |address| (address, self.next_hops.get(&address).map(|answer| answer.hop.clone()));
        addresses(&self.config).into_iter().map(known).collect()
    }

    /// Takes what a first look has found. What was good stays: a neighbour that is silent just now may still forward, and
    /// the follower gives it its time.
    pub fn on_first_look(&mut self, found: NextHops) {
        let news = found.into_iter().filter(|(address, hop)| {
            hop.is_ok() || self.next_hops.get(address).is_none_or(|known| known.hop.is_err())
        });
        let news = news.map(|(address, hop)| (address, Answer { hop, doubt: None })).collect();
        self.on_next_hops(news);
    }

    pub fn on_next_hops(&mut self, answers: HashMap<IpAddr, Answer>) {
        let configured = addresses(&self.config);
        self.next_hops.retain(|address, _| configured.contains(address));
        let (many, mut found) = (answers.len() > SAID_ONE_BY_ONE, 0);
        for (address, answer) in answers {
            let known = self.next_hops.get(&address);
            // An answer that comes after its backend has gone.
            if !configured.contains(&address) || known == Some(&answer) {
                continue;
            }
            let same_hop = known.is_some_and(|known| known.hop == answer.hop);
            match (&answer.hop, &answer.doubt) {
                (Ok(_), Some(reason)) => warn!(%address, %reason, "next hop in doubt; kept for now"),
                (Ok(_), None) if same_hop => info!(%address, "next hop confirmed"),
                (Ok(hop), None) if many => {
                    found += 1;
                    debug!(%address, interface = %hop.interface, mtu = hop.mtu, "next hop");
                }
                (Ok(hop), None) => info!(%address, interface = %hop.interface, mtu = hop.mtu, "next hop"),
                (Err(_), _) if same_hop => {}
                (Err(Unresolved::Local), _) if self.own.is_some() => {
                    info!(%address, interface = own::PROGRAM_END, "a backend on this host");
                }
                (Err(reason), _) => warn!(%address, %reason, "no next hop"),
            }
            self.next_hops.insert(address, answer);
            self.changed = Changed::All;
        }
        if found > 0 {
            info!(found, "next hops");
        }
    }

    /// Whether packets of a pool get to this host itself.
    fn is_by_pair(&self, pool: usize) -> bool {
        matches!(self.config.pools[pool].forward, Forward::Fullnat { .. }) && self.own.is_some()
    }

    /// What this configuration asks of ways, with the interfaces as they are attached.
    pub(super) fn judge(&self) -> Judge<'_> {
        let native = self.attached.iter().filter(|attached| !attached.generic);
        Judge::new(&self.config, native.map(|attached| (attached.ifindex, attached.interface.as_str())))
    }

    /// The next hop of a backend, if packets can be sent that way in its pool's mode.
    pub(super) fn usable_next_hop(
        &self,
        judge: &Judge<'_>,
        pool: usize,
        address: IpAddr,
    ) -> Result<&NextHop, String> {
        let hop = match self.next_hops.get(&address).map(|answer| &answer.hop) {
            None => return Err("its next hop is being looked up".into()),
            Some(Err(Unresolved::Local)) if self.is_by_pair(pool) => self.own.as_ref(),
            Some(Err(reason)) => return Err(reason.to_string()),
            Some(Ok(hop)) => Some(hop),
        };
        let hop = hop.ok_or_else(|| Unresolved::Local.to_string())?;
        judge.passes(pool, address, &hop.way()).map_err(|obstacle| obstacle.to_string())?;
        Ok(hop)
    }
}

fn addresses(config: &Config) -> HashSet<IpAddr> {
    config.pools.iter().flat_map(|pool| &pool.backends).map(|backend| backend.address).collect()
}
