//! `api` and `metrics`: who may ask a running agent, and where. Knows no other key.

use std::net::SocketAddr;

use super::leaf;
use super::model::{Api, Metrics};
use super::problem::{Report, Spot};
use super::read::{Fields, Wrong};
use super::services::ServiceDraft;
use super::vips;

pub(super) fn api(fields: &Fields<'_>, report: &mut Report) -> Api {
    let want = "a mapping such as {group: netops}";
    let group = fields.get("api").and_then(|at| at.fields(&["group"], want, report)).and_then(|fields| {
        let at = fields.get("group")?;
        let group = at.value("the name or the number of a group", leaf::group, report)?;
        Some(report.written(group, &at.spot()))
    });
    Api { group }
}

pub(super) fn metrics(fields: &Fields<'_>, report: &mut Report) -> Metrics {
    let mut listen: Vec<(SocketAddr, Spot)> = Vec::new();
    let want = "a mapping such as {listen: \"127.0.0.1:9465\"}";
    let list = fields.get("metrics").and_then(|at| at.fields(&["listen"], want, report));
    let Some(list) = list.and_then(|fields| fields.get("listen")) else {
        return Metrics::default();
    };
    let want = "an address with a port, such as 127.0.0.1:9465, or a list of them";
    for at in list.one_or_more(want, report) {
        let Some(address) = at.value(want, leaf::listen, report) else { continue };
        if let Some((_, first)) = listen.iter().find(|(known, _)| *known == address) {
            let message = format!("{address} is already listed at {first}");
            at.wrong(Wrong { message, hint: "remove one of the two".into() }, report);
        } else {
            listen.push((address, at.spot()));
        }
    }
    Metrics { listen: listen.iter().map(|(address, spot)| report.written(*address, spot)).collect() }
}

/// What is sent to a VIP goes to a backend and never to the host itself.
pub(super) fn refuse_vips(metrics: &Metrics, services: &[ServiceDraft], report: &mut Report) {
    let vips = || services.iter().flat_map(|service| &service.vips);
    for listen in &metrics.listen {
        let address = listen.value.ip();
        if let Some((vip, at)) = vips().find(|(vip, _)| vip.contains(address)) {
            let message = vips::taken(address, *vip, at);
            report.error_at(listen, message, "listen on an address of the host itself");
        }
    }
}
