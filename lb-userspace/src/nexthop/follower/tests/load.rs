//! More notifications than can be looked at one by one.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use rustix::time::{ClockId, clock_gettime};

use super::*;

/// `ip -batch` in the thread's own namespace, which reads these lines.
fn batch(lines: impl Iterator<Item = String>) -> Child {
    let mut child =
        Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("ip starts");
    let mut stdin = child.stdin.take().unwrap();
    let text: String = lines.map(|line| line + "\n").collect();
    std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    child
}

#[test]
fn messages_that_are_lost_have_everything_read_again() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start_with(Settings { times: TIMES, receive_buffer: 1 });
        told.watch(&["10.77.0.2", "10.88.1.1"]).await;
        let before = told.link_events.clone();
        // Nothing reads meanwhile: this thread is the runtime's only one.
        let routes = (0..2000).map(|n| format!("route add 11.0.{}.{}/32 dev lo", n / 250, n % 250));
        assert!(batch(routes).wait().unwrap().success());
        lab.near_ip("neigh replace 10.77.0.2 lladdr 02:00:00:00:00:77 dev near0 nud permanent");
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        lab.near_ip("link set near0 mtu 1444");
        let mac = [2, 0, 0, 0, 0, 0x77];
        for address in ["10.77.0.2", "10.88.1.1"] {
            told.until("what is now", |told| {
                told.hop(address).is_some_and(|hop| (hop.mac, hop.mtu) == (mac, 1444))
            })
            .await;
        }
        // Also those that are as they were.
        told.until("all links", |told| told.links.keys().all(|i| told.link_events[i] > before[i])).await;
        lab.near_ip("link add br0 type bridge");
        told.until("the news after that", |told| told.link("br0").is_some()).await;
    });
}

#[test]
fn a_full_table_is_loaded_without_a_storm_of_questions() {
    const WATCHED: usize = 1000;
    in_lab(async |lab: &Lab| {
        lab.far_ip("address add 10.77.0.3/24 dev far0");
        lab.near_ip("route add 10.0.0.0/8 via 10.77.0.2");
        let addresses: Vec<IpAddr> =
            (0..WATCHED).map(|n| IpAddr::from([10, 200, (n / 250) as u8, (n % 250) as u8])).collect();
        let mut told = Told::start(TIMES);
        told.follower.watch(addresses.iter().map(|address| (*address, None)).collect());
        told.until("first answers", |told| told.hops.len() == WATCHED).await;
        let (questions, cpu) = (told.route_questions(), cpu_time());
        let start = Instant::now();
        // Most of a table is elsewhere, some of it flaps where the addresses are, and at its end they have another way.
        let elsewhere = (0..100_000_u32)
            .map(|n| format!("route add {}/24 via 10.77.0.2", Ipv4Addr::from((11 << 24) + (n << 8))));
        let flaps = |n: u32| match n % 2 {
            0 => "route add 10.200.0.0/16 via 10.77.0.3".to_owned(),
            _ => "route del 10.200.0.0/16".to_owned(),
        };
        let lines = elsewhere.enumerate().flat_map(move |(n, line)| {
            let n = n as u32;
            [Some(line), n.is_multiple_of(50).then(|| flaps(n / 50))].into_iter().flatten()
        });
        let last = (0..WATCHED as u32 / 250).map(|n| format!("route add 10.200.{n}.0/24 via 10.77.0.3"));
        let mut loading = batch(lines.chain(last));
        while loading.try_wait().unwrap().is_none() {
            if let Ok(Some(event)) = timeout(Duration::from_millis(20), told.events.recv()).await {
                told.take(event);
            }
        }
        let loaded = start.elapsed();
        let via = Some(ip("10.77.0.3"));
        let answers = |told: &Told| {
            let right = |answer: &Answer| {
                answer.doubt.is_none() && answer.hop.as_ref().is_ok_and(|hop| hop.gateway == via)
            };
            addresses.iter().all(|address| told.hops.get(address).is_some_and(right))
        };
        let late = told.until("the last way", answers).await;
        let (questions, cpu) = (told.route_questions() - questions, cpu_time() - cpu);
        println!("loaded in {loaded:?}, right {late:?} later; {questions} route questions, {cpu:?} CPU time");
        // At most one pass in 50 ms.
        let passes = (loaded + late).as_millis() as usize / 50 + 1;
        assert!(questions <= passes * WATCHED, "{questions}");
        assert!(cpu < Duration::from_secs(15), "{cpu:?}");
        assert!(late < Duration::from_secs(10), "{late:?}");
    });
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}
