//! `xlb detach`: the only command that takes xlb out of the kernel.

use std::path::Path;

use anyhow::Context;

use crate::agent::lock;
use crate::bpf::{self, BpfFs};
use crate::nexthop::Resolver;

pub async fn run(run_dir: &Path) -> anyhow::Result<()> {
    let Some(fs) = BpfFs::existing(run_dir)? else {
        say!("nothing is pinned in {}", run_dir.display());
        return Ok(());
    };
    let _lock = lock(run_dir).context("an agent that runs would attach again")?;
    let resolver = Resolver::new().context("netlink is not to be had")?;
    let links = resolver.links().await?;
    let detached = bpf::detach(fs, &links).with_context(|| format!("{}", run_dir.display()))?;
    say!(
        "detached from {}; maps and pins are removed",
        if detached.is_empty() { "no interface".to_owned() } else { detached.join(", ") }
    );
    Ok(())
}
