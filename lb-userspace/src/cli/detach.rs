//! `xlb detach`: the only command that takes xlb out of the kernel.

use anyhow::Context;

use crate::agent::{own, run_dir};
use crate::bpf::{self, BpfFs, Maps};
use crate::capabilities;
use crate::nexthop::Resolver;

pub async fn run(run_dir: &std::path::Path) -> anyhow::Result<()> {
    let Some(fs) = BpfFs::existing(run_dir)? else {
        say!("nothing is pinned in {}", run_dir.display());
        return Ok(());
    };
    // Without them interfaces would not get back what was changed.
    capabilities::check()?;
    let _lock = run_dir::lock_existing(run_dir).context("an agent that runs would attach again")?;
    let resolver = Resolver::new().context("netlink is not to be had")?;
    let links = resolver.links().await?;
    // The kernel kept them confirmed for the agent. Maps that cannot be read name nobody; they are removed all the same.
    let image = Maps::from_pins(&fs).and_then(|maps| maps.image());
    let (neighbours, addresses) =
        image.map(|image| (image.neighbours(), image.addresses())).unwrap_or_default();
    let mount = fs.path().to_owned();
    let detached = bpf::detach(fs, &links).with_context(|| format!("{}", run_dir.display()))?;
    resolver.unmanage(&neighbours, &addresses).await;
    resolver.remove_link(own::HOST_END).await?;
    let interfaces = detached.interfaces.join(", ");
    let interfaces = if interfaces.is_empty() { "no interface" } else { &interfaces };
    say!("detached from {interfaces}; maps and pins are removed");
    if detached.mount_left {
        say!(
            "{} stays mounted, for the next agent; xlb did not mount it, or may not unmount it",
            mount.display()
        );
    }
    Ok(())
}
