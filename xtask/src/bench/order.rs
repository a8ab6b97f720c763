//! Which flow's packet follows which. Pure, and the same in every run.

use std::collections::HashMap;
use std::rc::Rc;

use lb_common::abi::BENCH_PACKETS;
use lb_userspace::bpf::Flow;

/// How packets are spread over flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// Any flow may follow any other.
    Uniform(u32),
    /// The k-th flow has 1/k of the packets of the first (Zipf's law, s = 1).
    Zipf(u32),
    /// Every flow once, in an order that caches do not foresee.
    Once(u32),
}

impl Order {
    pub fn flows(self) -> u32 {
        match self {
            Self::Uniform(flows) | Self::Zipf(flows) | Self::Once(flows) => flows,
        }
    }

    /// The flows of packets, for as many as the driver sends before it begins again.
    fn numbers(self) -> Vec<u32> {
        let mut dice = fastrand::Rng::with_seed(0x786c_6221);
        let packets = BENCH_PACKETS as usize;
        match self {
            Self::Uniform(flows) => (0..packets).map(|_| dice.u32(0..flows)).collect(),
            Self::Zipf(flows) => {
                let shares = cumulated(flows);
                (0..packets).map(|_| drawn(&shares, dice.f64())).collect()
            }
            Self::Once(flows) => {
                let mut numbers: Vec<u32> = (0..flows).collect();
                dice.shuffle(&mut numbers);
                numbers
            }
        }
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if matches!(self, Self::Zipf(_)) { "Zipf " } else { "" };
        match self.flows() {
            flows if flows >= 1_000_000 => write!(f, "{name}{}M", flows / 1_000_000),
            flows if flows >= 1000 => write!(f, "{name}{}k", flows / 1000),
            flows => write!(f, "{name}{flows}"),
        }
    }
}

/// The share of packets that the first k flows have, for every k.
fn cumulated(flows: u32) -> Vec<f64> {
    let mut sum = 0.0;
    let mut shares: Vec<f64> = Vec::with_capacity(flows as usize);
    for rank in 1..=flows {
        sum += 1.0 / f64::from(rank);
        shares.push(sum);
    }
    shares.iter_mut().for_each(|share| *share /= sum);
    shares
}

fn drawn(shares: &[f64], dice: f64) -> u32 {
    shares.partition_point(|share| *share <= dice).min(shares.len() - 1) as u32
}

/// Orders that were drawn, with so many destinations: many lines have the same.
#[derive(Default)]
pub struct Orders {
    drawn: HashMap<(Order, u32), Rc<[Flow]>>,
}

impl Orders {
    /// Packets in this order; each flow keeps to one of the destinations.
    pub fn flows(&mut self, order: Order, destinations: u32) -> Rc<[Flow]> {
        let flow = |number| Flow { number, destination: destination(number, destinations) };
        let draw = || order.numbers().into_iter().map(flow).collect();
        Rc::clone(self.drawn.entry((order, destinations)).or_insert_with(draw))
    }
}

fn destination(flow: u32, destinations: u32) -> u32 {
    let hash = u64::from(flow.wrapping_mul(0x9e37_79b1));
    ((hash * u64::from(destinations)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(order: Order) -> Vec<u32> {
        let mut counts = vec![0; order.flows() as usize];
        order.numbers().into_iter().for_each(|flow| counts[flow as usize] += 1);
        counts
    }

    #[test]
    fn a_flow_of_zipf_has_its_share_of_the_packets() {
        let order = Order::Zipf(1_000_000);
        let counts = counted(order);
        let packets = f64::from(BENCH_PACKETS);
        // The harmonic number of a million.
        let sum = 14.392_726_7;
        for rank in [1u32, 2, 3, 10, 100] {
            let (share, expected) =
                (f64::from(counts[rank as usize - 1]) / packets, 1.0 / f64::from(rank) / sum);
            assert!((share / expected - 1.0).abs() < 0.15, "rank {rank}: {share}, not {expected}");
        }
        let upper: u32 = counts[..1000].iter().sum();
        assert!((f64::from(upper) / packets - 7.485_47 / sum).abs() < 0.005, "{upper}");
    }

    #[test]
    fn the_dice_of_zipf_reach_the_first_and_the_last_flow() {
        let shares = cumulated(3);
        assert_eq!(drawn(&shares, 0.0), 0);
        assert_eq!(drawn(&shares, 0.999_999), 2);
        assert_eq!(drawn(&shares, 1.0), 2);
    }

    #[test]
    fn every_flow_comes_once_before_any_comes_again() {
        assert!(counted(Order::Once(1000)).iter().all(|count| *count == 1));
        assert_ne!(Order::Once(1000).numbers(), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn uniform_flows_are_about_equal_and_every_run_has_the_same() {
        let counts = counted(Order::Uniform(16));
        let mean = f64::from(BENCH_PACKETS) / 16.0;
        assert!(counts.iter().all(|count| (f64::from(*count) / mean - 1.0).abs() < 0.05), "{counts:?}");
        assert_eq!(Order::Uniform(1000).numbers(), Order::Uniform(1000).numbers());
    }

    #[test]
    fn a_flow_keeps_its_destination_and_all_destinations_have_flows() {
        let mut orders = Orders::default();
        let flows = orders.flows(Order::Once(100_000), 1000);
        let mut seen = vec![0u32; 1000];
        flows.iter().for_each(|flow| seen[flow.destination as usize] += 1);
        assert!(seen.iter().all(|count| (50..200).contains(count)));
        assert!(orders.flows(Order::Uniform(1000), 1).iter().all(|flow| flow.destination == 0));
    }

    #[test]
    fn orders_have_short_names() {
        let names = [Order::Uniform(1), Order::Uniform(1000), Order::Once(100_000), Order::Zipf(1_000_000)];
        assert_eq!(names.map(|order| order.to_string()), ["1", "1k", "100k", "Zipf 1M"]);
    }
}
