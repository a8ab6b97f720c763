//! The agent dies at every single write of a start and of a reload; what it leaves behind is looked at each time.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use lb_userspace::agent::status::BackendStatus;
use lb_userspace::config::model::Protocol;
use lb_userspace::lookup::Query;
use tests::balancer::{Balancer, failing_build, place};
use tests::lab::{self, Signal, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, VIP4, VIP6};

/// So many of the first and of the last times that a place is passed are all tried.
const EACH: usize = 6;

/// More writes than any of these files leads to: beyond it something is wrong.
const MOST: usize = 10_000;

/// Where flows go, each by its client and its VIP; nothing where no backend takes it.
type Places = BTreeMap<(SocketAddr, SocketAddr), Option<IpAddr>>;

/// Two files, and where they lead 300 flows.
struct Crash {
    balancer: Balancer,
    before: Config,
    after: Config,
    places: [Places; 2],
    pins: Vec<String>,
    stage: Stage,
}

/// How the agent is brought to carry out the second file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum By {
    Start,
    Reload,
}

impl Crash {
    fn set(name: &str, change: impl FnOnce(&mut Config)) -> Result<Option<Self>> {
        let Some(stage) = Stage::set(name, 4)? else { return Ok(None) };
        let mut before =
            Config { services: vec![stage::service("www", &[VIP4], "80", "tcp")], ..stage.config() };
        before.backends.pop();
        let mut after = before.clone();
        change(&mut after);
        let mut balancer = stage.start(&before)?;
        balancer.process.signal(Signal::TERM)?;
        balancer.process.wait_exit(PATIENCE)?;
        balancer.binary = failing_build()?;
        balancer.restart()?;
        let mut this = Self { balancer, before, after, places: Default::default(), pins: Vec::new(), stage };
        // There and back without a fault: what both files mean, and what is pinned.
        this.settle(&this.before.clone())?;
        this.places[0] = this.places()?;
        this.settle(&this.after.clone())?;
        this.places[1] = this.places()?;
        this.settle(&this.before.clone())?;
        ensure!(this.places()? == this.places[0], "there and back is not the same");
        ensure!(this.places[0] != this.places[1], "nothing to see");
        this.pins = this.pins()?;
        Ok(Some(this))
    }

    /// Has the running agent take a file, and waits until all of its backends serve.
    fn settle(&self, config: &Config) -> Result<()> {
        self.balancer.reload(&config.to_string())?;
        self.balancer.wait_for_backends(config.backends.len(), PATIENCE)?;
        self.is_written()
    }

    fn has_written(&self, config: &Config) -> bool {
        let up = |backends: Vec<BackendStatus>| backends.iter().filter(|b| b.state == "up").count();
        self.balancer.backends().is_ok_and(|backends| up(backends) == config.backends.len())
            && self.balancer.xlb(&["verify"]).is_ok()
    }

    /// Waits until the slots that may take their time are written, too.
    fn is_written(&self) -> Result<()> {
        let mut told = Ok(String::new());
        let agrees = || {
            told = self.balancer.xlb(&["verify"]);
            told.is_ok()
        };
        let waited = wait_for("the kernel has what the agent wants", PATIENCE, agrees);
        waited.or_else(|late| told.map(drop).context(late))
    }

    fn places(&self) -> Result<Places> {
        let tables = self.balancer.tables()?;
        let flow = |vip: SocketAddr, number: u16| {
            let source = if vip.is_ipv4() { "10.111.0.2".parse() } else { "fd00:111::2".parse() };
            let source = SocketAddr::new(source?, 2000 + number);
            let query = Query { source, vip, protocol: Protocol::Tcp };
            Ok(((source, vip), place(&tables, &query)?))
        };
        let vips = [format!("{VIP4}:80"), format!("{VIP4}:81"), format!("[{VIP6}]:80")];
        let flows = vips.iter().flat_map(|vip| (0..100).map(move |number| (vip, number)));
        flows.map(|(vip, number)| flow(vip.parse()?, number)).collect()
    }

    /// Names of pins, with whatever counts up in them left out.
    fn pins(&self) -> Result<Vec<String>> {
        fn walk(dir: &Path, names: &mut Vec<String>) -> Result<()> {
            for entry in fs::read_dir(dir)? {
                let path = entry?.path();
                names.push(path.display().to_string());
                if path.is_dir() {
                    walk(&path, names)?;
                }
            }
            Ok(())
        }
        let dir = self.balancer.run_dir.join("bpf");
        let mut names = Vec::new();
        walk(&dir, &mut names)?;
        let prefix = dir.display().to_string();
        let strip = |name: &String| {
            let below = name.trim_start_matches(&prefix);
            let counted = below.strip_prefix("/maps_").map(|rest| rest.trim_start_matches(char::is_numeric));
            counted.map_or_else(|| below.to_owned(), |rest| format!("/maps_N{rest}"))
        };
        let mut names: Vec<String> =
            names.iter().map(strip).filter(|name| !name.ends_with(".debug")).collect();
        names.sort();
        Ok(names)
    }

    /// Brings the agent to carry out the second file, and to die at a place after it was passed so many times. False
    /// if it lived: it did not come there that often.
    fn dies(&mut self, by: By, point: &str, passes: usize) -> Result<bool> {
        let fail = if passes == 0 { "return".to_owned() } else { format!("{passes}*off->return") };
        self.balancer.process.kill();
        if by == By::Start {
            fs::write(&self.balancer.config, self.after.to_string())?;
        }
        self.balancer.restart_with("FAILPOINTS", &format!("{point}={fail}"))?;
        let process = self.balancer.process.clone();
        let ends_or = |what: &str, condition: &dyn Fn() -> bool| -> Result<bool> {
            wait_for(what, PATIENCE, || process.exit().is_some() || condition())?;
            Ok(process.exit().is_some())
        };
        let runs = || process.log().contains("running") && self.balancer.status().is_ok();
        let mut ended = ends_or("the agent runs", &runs)?;
        if by == By::Reload && !ended {
            fs::write(&self.balancer.config, self.after.to_string())?;
            process.signal(Signal::HUP)?;
            ended = ends_or("the reload ends", &|| process.log().contains("reload"))?;
        }
        // Slots that may take their time are written after that.
        if !ended {
            ended = ends_or("all is written", &|| self.has_written(&self.after))?;
        }
        if let Some(status) = process.exit() {
            let aborted = status.signal() == Some(Signal::ABORT.as_raw());
            ensure!(aborted, "{point} after {passes}: {status}:\n{}", process.log());
        }
        Ok(ended)
    }

    /// Every flow must be where one of the files leads it, and clients are served.
    fn sound(&self) -> Result<()> {
        for (flow, place) in self.places()? {
            let [before, after] = [0, 1].map(|index| self.places[index][&flow]);
            ensure!(
                place == before || place == after,
                "{flow:?} goes to {place:?}, not {before:?} or {after:?}"
            );
        }
        stage::none_failed(&lab::http_load(&self.stage.client, URL4, 40, 4)?)
    }

    /// A start without a fault must end where the second file leads, with nothing left over.
    fn completes(&mut self) -> Result<()> {
        fs::write(&self.balancer.config, self.after.to_string())?;
        self.balancer.restart()?;
        wait_for("the agent runs", PATIENCE, || self.balancer.process.log().contains("running"))?;
        self.balancer.wait_for_backends(self.after.backends.len(), PATIENCE)?;
        self.is_complete()
    }

    fn is_complete(&self) -> Result<()> {
        self.is_written()?;
        self.is_as_after()
    }

    /// Looks at what is pinned, with an agent or without.
    fn is_as_after(&self) -> Result<()> {
        let places = self.places()?;
        ensure!(places == self.places[1], "flows are not where the file leads them");
        let pins = self.pins()?;
        ensure!(pins == self.pins, "pinned are {pins:?}, not {:?}", self.pins);
        Ok(())
    }

    /// Lets the agent die once, and looks at what is left; then everything is as it was. False if it lived.
    fn once(&mut self, by: By, point: &str, passes: usize) -> Result<bool> {
        let dead = self.dies(by, point, passes)?;
        if dead {
            self.sound()?;
        } else {
            // What it has not died of yet it would die of later: sweeps pass the place, too.
            self.balancer.process.kill();
            self.is_as_after()?;
        }
        self.completes()?;
        self.settle(&self.before.clone())?;
        Ok(dead)
    }

    /// All places. Those that are passed a few times are tried each time. Slots of a table are written one by one, in
    /// hundreds of writes that are alike: of many writes it is the first and the last ones, and some in between.
    fn everywhere(mut self, by: By, points: &[&str]) -> Result<()> {
        for point in points {
            let mut tried = BTreeMap::new();
            let mut dies = |passes: usize| -> Result<bool> {
                if let Some(dead) = tried.get(&passes) {
                    return Ok(*dead);
                }
                let at = || format!("{by:?}, `{point}` passed {passes} times");
                let dead = self.once(by, point, passes).with_context(at)?;
                tried.insert(passes, dead);
                Ok(dead)
            };
            let mut next = 0;
            while dies(next)? {
                ensure!(next < MOST, "{point}: no end");
                next = if next < EACH { next + 1 } else { next * 2 };
            }
            // The last write is somewhere between the last death and the first life.
            let (mut dead, mut alive) = (next / 2, next);
            while next > EACH && dead + 1 < alive {
                let middle = dead.midpoint(alive);
                *(if dies(middle)? { &mut dead } else { &mut alive }) = middle;
            }
            for passes in alive.saturating_sub(EACH)..alive {
                dies(passes)?;
            }
            let deaths: Vec<usize> =
                tried.iter().filter(|(_, dead)| **dead).map(|(passes, _)| *passes).collect();
            println!("{by:?}, `{point}`: {} deaths, after it was passed {deaths:?} times", deaths.len());
            ensure!(!deaths.is_empty(), "{by:?} does not come to `{point}`");
        }
        Ok(())
    }
}

/// Another backend, another weight, another port, another family: the tables and the program change.
fn tables_and_program(config: &mut Config) {
    config.backends.remove(0);
    config.backends[0] = stage::weighted(1, false, 40);
    config.backends.push(stage::backend(3, false));
    config.services.push(stage::service("more", &[VIP4], "81", "tcp"));
    config.services.push(stage::service("six", &[VIP6], "80", "tcp"));
}

/// What lies in the old maps is carried over to new ones; new flows of a backend that leaves move as well.
fn limits(config: &mut Config) {
    config.top.push_str("limits: {slots: 65536, vips: 64}\n");
    config.backends.remove(0);
}

/// What is passed on the way to other tables and another program.
const OVER_THE_SAME_MAPS: [&str; 2] = ["apply", "swap"];

/// What is passed on the way to other maps.
const OVER_NEW_MAPS: [&str; 5] = ["generation", "apply", "meta", "swap", "retire"];

#[test]
fn fault_05_an_agent_that_dies_at_any_write_of_its_start_leaves_sound_tables() -> Result<()> {
    let Some(crash) = Crash::set("crashstart", tables_and_program)? else { return Ok(()) };
    crash.everywhere(By::Start, &OVER_THE_SAME_MAPS)
}

#[test]
fn fault_05_an_agent_that_dies_at_any_write_of_a_reload_leaves_sound_tables() -> Result<()> {
    let Some(crash) = Crash::set("crashreload", tables_and_program)? else { return Ok(()) };
    crash.everywhere(By::Reload, &OVER_THE_SAME_MAPS)
}

#[test]
fn fault_05_an_agent_that_dies_while_it_starts_over_new_maps_leaves_sound_ones() -> Result<()> {
    let Some(crash) = Crash::set("crashnew", limits)? else { return Ok(()) };
    crash.everywhere(By::Start, &OVER_NEW_MAPS)
}

#[test]
fn fault_05_an_agent_that_dies_while_it_turns_over_to_new_maps_leaves_sound_ones() -> Result<()> {
    let Some(crash) = Crash::set("crashturn", limits)? else { return Ok(()) };
    crash.everywhere(By::Reload, &OVER_NEW_MAPS)
}

/// Nothing is forwarded before or by what is left; the next start must not stumble over it.
#[test]
fn fault_05_an_agent_that_dies_in_its_very_first_start_leaves_nothing_in_the_way() -> Result<()> {
    let Some(mut crash) = Crash::set("crashfirst", tables_and_program)? else { return Ok(()) };
    for point in ["generation", "apply", "meta", "attach", "pin"] {
        let mut passes = 0;
        loop {
            crash.balancer.process.kill();
            crash.balancer.xlb(&["detach"])?;
            if !crash.dies(By::Start, point, passes)? {
                break;
            }
            crash
                .completes()
                .with_context(|| format!("died at `{point}` after it was passed {passes} times"))?;
            passes += 1;
        }
        println!("{point}: {passes} deaths");
        ensure!(passes > 0, "a first start does not come to `{point}`");
    }
    Ok(())
}
