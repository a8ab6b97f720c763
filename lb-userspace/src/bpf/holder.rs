//! Says who holds an interface: the XDP program that is attached, and the process behind it.

use super::links::fdinfo;
use crate::nexthop::Link;

/// The program that has the interface, in words; empty where the kernel does not tell.
pub(super) fn holder(link: &Link) -> String {
    let Some(id) = link.xdp_program else { return String::new() };
    let program = aya::programs::loaded_programs().filter_map(Result::ok).find(|program| program.id() == id);
    let mut words = format!("program id {id}");
    if let Some(name) = program.as_ref().and_then(|program| program.name_as_str()).filter(|n| !n.is_empty()) {
        words += &format!(" `{name}`");
    }
    if let Some(user) = program.as_ref().and_then(|program| program.created_by_uid()) {
        words += &format!(" of user {user}");
    }
    let by_link = aya::programs::loaded_links()
        .filter_map(Result::ok)
        .find(|info| info.program_id() == id && is_xdp(info));
    match by_link.map(|info| info.id()) {
        Some(link_id) => match process_with(link_id) {
            Some(process) => words += &format!(", attached by link {link_id} of {process}"),
            None => words += &format!(", attached by link {link_id}, which is pinned in a bpffs"),
        },
        None => {
            words +=
                &format!(", attached without a link: `ip link set dev {} xdp off` detaches it", link.name)
        }
    }
    format!(" ({words})")
}

fn is_xdp(info: &aya::programs::links::LinkInfo) -> bool {
    info.link_type().is_ok_and(|kind| kind == aya::programs::links::LinkType::Xdp)
}

/// A process that has the link open.
fn process_with(link_id: u32) -> Option<String> {
    let link_id = link_id.to_string();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let own = std::process::id();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(entries) = std::fs::read_dir(process.path().join("fdinfo")) else { continue };
        let holds = entries
            .flatten()
            .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
            .any(|text| fdinfo(&text, "link_id") == Some(&link_id));
        if holds && pid != own {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}
