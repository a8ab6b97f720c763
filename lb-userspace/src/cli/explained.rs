//! Explanations of frames for people: one in full, or many by the line. Asks nobody.

use std::collections::BTreeMap;

use super::output;
use crate::lookup::{Explanation, NamedServer, Picks};

/// Every step of one.
pub fn whole(told: &Explanation) -> String {
    let mut lines = vec![told.frame.to_string()];
    let mut say = |what: &str, words: String| lines.push(format!("  {what:<9} {words}"));
    say("frame", frame(told));
    if let Some(service) = &told.service {
        say("service", service.clone());
    }
    if let Some(NamedServer { config_id, server_id, state }) = &told.server {
        let state = match state.as_str() {
            "unknown" => ", which no backend has: balanced by addresses",
            "down" => ", whose backend is down: balanced by addresses",
            _ => "",
        };
        say("server", format!("ID {server_id} of configuration {config_id}{state}"));
    }
    if let (Some(slot), Some(length), Some(table)) = (told.slot, told.table_length, told.table) {
        let state = told.slot_state.as_deref().unwrap_or("");
        say("slot", format!("{slot} of {length} in table {table}, {state}"));
    }
    if let Some(id) = told.backend_id {
        let name = named(told).map_or_else(String::new, |name| format!("{name} "));
        let address = told.backend_address.map_or(String::new(), |address| format!("at {address} "));
        let by_pin = if told.chosen_by.as_deref() == Some("pin") { ", by the flow's pin" } else { "" };
        let this = format!("{name}{address}(id {id}){by_pin}");
        say(
            "backend",
            match &told.picks {
                Some(picks) => format!("{}; say {this}", any(picks)),
                None => this,
            },
        );
    }
    if let (Some(mtu), Some(client)) = (told.mtu, told.client_mtu) {
        say("way", format!("takes {mtu} bytes of IP, {client} of them the client's"));
    }
    if let Some(sent) = sent(told) {
        say("sent", sent);
    }
    say("outcome", format!("{}: {}", told.outcome, told.meaning));
    if !told.advice.is_empty() {
        say("advice", told.advice.clone());
    }
    lines.join("\n")
}

/// What the first line leaves out.
fn frame(told: &Explanation) -> String {
    let seen = &told.frame;
    let mut parts =
        vec![format!("{} bytes in by {}", seen.length, interface(&told.ingress, told.ingress_ifindex))];
    parts.extend(
        seen.hops.map(|hops| format!("{} {hops}", if seen.family == "ipv6" { "hop limit" } else { "TTL" })),
    );
    parts.extend(seen.headers.iter().cloned());
    parts.join(", ")
}

/// By name, else by index.
fn interface(name: &Option<String>, ifindex: u32) -> String {
    name.clone().unwrap_or_else(|| format!("interface {ifindex}"))
}

/// What is certain of the backend of a flow that begins.
fn any(picks: &Picks) -> String {
    format!("any of {}, {}", picks.backends, picks.how)
}

fn named(told: &Explanation) -> Option<String> {
    Some(format!("{}/{}", told.pool.as_ref()?, told.backend.as_ref()?))
}

fn sent(told: &Explanation) -> Option<String> {
    let sent = told.sent.as_ref()?;
    let mac = sent.destination_mac.as_deref().unwrap_or("?");
    let Some(forward) = told.forward.as_ref().filter(|_| told.outcome.starts_with("forward_")) else {
        let by = interface(&told.ingress, told.ingress_ifindex);
        return Some(format!("the answer {sent}; {} bytes to {mac} by {by}", sent.length));
    };
    let by = interface(&told.egress, told.egress_ifindex.unwrap_or(0));
    let outer = if forward == "l2" {
        String::new()
    } else {
        let [source, destination] = sent.ends();
        format!(", {source} -> {destination}")
    };
    Some(format!("{forward}{outer}, {} bytes to {mac} by {by}", sent.length))
}

/// A line for each, or every step; then how many ended how, and what to do about it.
pub fn list(told: &[Explanation], verbose: bool) -> String {
    let mut parts = Vec::new();
    if verbose {
        let numbered =
            told.iter().zip(1..).map(|(told, number): (_, usize)| format!("{number}  {}", whole(told)));
        parts.push(numbered.collect::<Vec<_>>().join("\n\n"));
    } else {
        parts.push(lines(told));
    }
    parts.push(summary(told));
    parts.join("\n\n")
}

fn lines(told: &[Explanation]) -> String {
    let row = |(told, number): (&Explanation, usize)| {
        let address = || told.backend_address.map(|address| address.to_string());
        let picks = told.picks.as_ref().map(any);
        let backend = picks.or_else(|| named(told)).or_else(address).unwrap_or_else(|| "-".to_owned());
        vec![number.to_string(), told.outcome.clone(), backend, told.frame.to_string()]
    };
    let mut rows: Vec<_> = told.iter().zip(1..).map(row).collect();
    let header = ["#", "OUTCOME", "BACKEND", "FRAME"];
    output::cut_last(&header, &mut rows);
    output::table(&header, &[0], rows)
}

fn summary(told: &[Explanation]) -> String {
    let mut outcomes: BTreeMap<&str, (usize, &Explanation)> = BTreeMap::new();
    for told in told {
        outcomes.entry(&told.outcome).or_insert((0, told)).0 += 1;
    }
    let row = |(outcome, (count, told)): (&&str, &(usize, &Explanation))| {
        vec![(*outcome).to_owned(), count.to_string(), told.meaning.clone()]
    };
    let mut rows: Vec<_> = outcomes.iter().map(row).collect();
    let header = ["OUTCOME", "PACKETS", "MEANING"];
    output::cut_last(&header, &mut rows);
    let mut text = output::table(&header, &[1], rows);
    for (outcome, (_, told)) in &outcomes {
        if !told.advice.is_empty() {
            text.push_str(&format!("\n{}", output::wrapped(&format!("{outcome}: {}", told.advice))));
        }
    }
    text
}
