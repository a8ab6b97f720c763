//! What holds for whole files. `mistakes` has one row for each kind of mistake.

mod hostile;
mod mistakes;
mod nat;
mod rules;
mod steering;

use super::*;

/// Uses every key there is.
const GOOD: &str = "\
# edge balancer
interfaces: [eth0, {name: eth1, mode: generic}]
mode: native
seed: 5e10000000000000
outer_source: [10.255.0.0/24, '2001:db8:ff::/64']
vip_arp: true
trace: false
limits: {vips: 100, backends: 200, slots: 65536, pins: 100000}
defaults:
  health: {type: tcp, interval: 2s, timeout: 1s, rise: 2, fall: 3}
  idle_timeout: {tcp: 20m}
pools:
  web:
    forward: ipip
    on_empty: pass
    health: {type: http, path: /healthz, host: www.example.org, expect: [200-299, 304]}
    backends:
      - 10.0.1.11
      - 10.0.1.12
      - {address: 10.0.1.13, weight: 50, name: web-13}
  dns:
    forward: l2
    health: {port: 8053, interval: 500ms, timeout: 200ms}
    idle_timeout: {tcp: 10s, udp: 12h}
    on_down: auto
    down_grace: 5s
    on_remove: move
    drain_timeout: 1h
    slow_start: {duration: 90s, curve: square}
    fallback: [web, far]
    min_healthy: 50%
    panic: 20%
    failback_hold: 2m
    backends: [10.0.2.1, '2001:db8:2::1']
  far:
    forward: ipip
    on_down: keep
    drain_timeout: never
    slow_start: 30s
    backends:
      - {address: 10.0.3.1, server_id: '0A01'}
      - {address: 10.0.3.2, server_id: '00ff'}
services:
  - name: www
    vip: [203.0.113.10, '2001:db8::10']
    ports: [80, 443]
    protocol: tcp
    pool: web
    scheduler: maglev
  - name: dns
    vip: 203.0.113.53
    ports: 53
    protocol: [udp, tcp]
    pool: dns
  - {name: media, vip: [198.51.100.0/24, '2001:db8:100::/64'], ports: [554, 8000-8100], protocol: tcp, pool: web, unmapped: reject}
  - {name: all, vip: 203.0.113.99, ports: any, protocol: udp, pool: web, scheduler: source-hash, fragments: balance, unmapped: pass, source_prefix: {v4: 24, v6: 56}}
  - {name: http3, vip: 203.0.113.98, ports: 443, protocol: udp, pool: far, quic: {config_id: 3}}
vlan: true
icmp: {echo: false, rate: 100}
api: {group: netops}
metrics: {listen: ['127.0.0.1:9465', '[::1]:9465']}
";

/// The lines printed for a file that must not load.
fn errors(text: &str) -> Vec<String> {
    match parse("xlb.yaml", text) {
        Ok(loaded) => panic!("this must not load:\n{text}\n{loaded:?}"),
        Err(problems) => problems.to_string().lines().map(str::to_owned).collect(),
    }
}

fn loaded(text: &str) -> Loaded {
    match parse("xlb.yaml", text) {
        Ok(loaded) => loaded,
        Err(problems) => panic!("this must load:\n{text}\n{problems}"),
    }
}

fn warnings(text: &str) -> Vec<String> {
    loaded(text).warnings.iter().map(ToString::to_string).collect()
}
