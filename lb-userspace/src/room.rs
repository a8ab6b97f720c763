//! How much memory this host has for maps, and whether those of a configuration fit into it. Makes no maps.

use std::fs;
use std::path::{Path, PathBuf};

use crate::capacity::{Capacity, MapRows, bytes};
use crate::config::{Places, Problem, Subject};

/// What memory there is, and who says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    pub bytes: u64,
    /// `MemAvailable`, or the file of a control group.
    pub by: String,
}

/// Who says what the whole host has.
const HOST: &str = "MemAvailable";

impl Available {
    /// Of this host, or of the control groups that this process is in, if that is less. Nothing where the kernel does not say.
    pub fn here() -> Option<Self> {
        let host = available_of(&fs::read_to_string("/proc/meminfo").ok()?)?;
        let host = Self { bytes: host, by: HOST.to_owned() };
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let groups = groups_of(&own, Path::new("/sys/fs/cgroup"));
        groups.iter().filter_map(|group| Self::of_group(group)).chain([host]).min_by_key(|found| found.bytes)
    }

    /// Nothing where the group has no limit. What the kernel gives back when it is asked for (files' pages, caches) is available.
    fn of_group(group: &Path) -> Option<Self> {
        let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let taken = number("memory.current")?.saturating_sub(reclaimable_of(&stat));
        let bytes = number("memory.max")?.saturating_sub(taken);
        Some(Self { bytes, by: group.join("memory.max").display().to_string() })
    }

    /// Bytes that maps may take: the agent's own copies of tables, and everybody else, need some.
    pub fn for_maps(&self) -> u64 {
        self.bytes / 4 * 3
    }

    /// Refuses maps that need more, before any is made.
    pub fn check(&self, capacity: &Capacity, cpus: u64, places: &Places) -> Result<(), Problem> {
        let (wanted, limit) = (capacity.bytes(cpus), self.for_maps());
        if wanted <= limit {
            return Ok(());
        }
        let maps = capacity.rows();
        let (key, share) = largest(&maps, cpus);
        let fixed: u64 = maps.iter().filter(|map| map.limit.is_none()).map(|map| map.bytes(cpus)).sum();
        let message = format!(
            "the maps take {}, and no more than {} may be taken: three quarters of the {} that are available ({})",
            bytes(wanted),
            bytes(limit),
            bytes(self.bytes),
            self.by
        );
        let more =
            if self.by == HOST { "give the host more memory" } else { "raise the limit of that group" };
        let hint = if fixed < limit {
            format!("lower limits.{key}, which makes {} of it, or {more}", bytes(share))
        } else {
            format!("{more}: lower limits do not suffice")
        };
        Err(places.problem(Subject::Limits, message, hint))
    }
}

/// The limit that decides the most, and how many bytes.
fn largest(maps: &[MapRows], cpus: u64) -> (&'static str, u64) {
    let share = |key: &'static str| {
        let of_it = maps.iter().filter(|map| map.limit == Some(key));
        (key, of_it.map(|map| map.bytes(cpus)).sum())
    };
    let keys: Vec<&'static str> = maps.iter().filter_map(|map| map.limit).collect();
    keys.into_iter().map(share).max_by_key(|(_, bytes)| *bytes).unwrap_or(("slots", 0))
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes that `memory.stat` of a control group says can be had back.
fn reclaimable_of(stat: &str) -> u64 {
    let values = stat.lines().filter_map(|line| line.split_once(' '));
    let back = values.filter(|(name, _)| ["active_file", "inactive_file", "slab_reclaimable"].contains(name));
    back.filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok()).sum()
}

/// Directories of the control group of version 2 that `/proc/self/cgroup` names, and of those that it is in.
fn groups_of(own: &str, root: &Path) -> Vec<PathBuf> {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    let within = root.join(path);
    within.ancestors().take_while(|group| group.starts_with(root)).map(Path::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const GIB: u64 = 1 << 30;

    fn loaded(limits: &str) -> config::Loaded {
        let text = format!(
            "interfaces: [eth0]\nseed: 1\nlimits: {{{limits}}}\n\
             pools: {{web: {{forward: nat, backends: [10.0.0.2]}}}}\n\
             services: [{{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}}]\n"
        );
        config::parse("xlb.yaml", &text).unwrap_or_else(|wrong| panic!("{wrong}"))
    }

    fn refusal(limits: &str, available: u64) -> Option<String> {
        let loaded = loaded(limits);
        let available = Available { bytes: available, by: "MemAvailable".to_owned() };
        let capacity = Capacity::new(&loaded.config.limits);
        available.check(&capacity, 2, &loaded.places).err().map(|problem| problem.to_string())
    }

    #[test]
    fn maps_that_take_more_than_there_is_are_refused_with_place_sizes_and_the_limit_to_lower() {
        assert_eq!(refusal("slots: 1048576", GIB), None);
        for (limits, key) in [
            ("pins: 134217728", "limits.pins, which makes 1.0 GiB"),
            ("connections: 67108864", "limits.connections, which makes 4.5 GiB"),
            ("vips: 32768", "limits.vips, which makes 5"),
            ("slots: 134217728", "limits.slots, which makes 5"),
        ] {
            let refused = refusal(limits, GIB / 2).unwrap_or_else(|| panic!("{limits}"));
            let place = "xlb.yaml:3:9 limits: the maps take ";
            for word in [place, "no more than 384.0 MiB", "512.0 MiB that are available (MemAvailable)", key]
            {
                assert!(refused.contains(word), "{word:?} is not in {refused}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_helps() {
        let loaded = loaded("slots: 1048576");
        let capacity = Capacity::new(&loaded.config.limits);
        let refused = |bytes, cpus, by: &str| {
            let available = Available { bytes, by: by.to_owned() };
            available.check(&capacity, cpus, &loaded.places).expect_err("too little").to_string()
        };
        // Counters of each CPU alone are more than that, and no limit decides them.
        let none = refused(64 << 20, 256, "MemAvailable");
        assert!(none.contains("give the host more memory: lower limits do not suffice"), "{none}");
        // No limit alone makes them fit, all together do.
        let some = refused(12 << 20, 1, "MemAvailable");
        assert!(some.contains("; lower limits.connections, which makes"), "{some}");
        let group = refused(24 << 20, 1, "/sys/fs/cgroup/xlb/memory.max");
        assert!(group.contains("raise the limit of that group"), "{group}");
    }

    #[test]
    fn what_the_kernel_says_of_memory_is_read() {
        let meminfo = "MemTotal:       24682808 kB\nMemFree:  1 kB\nMemAvailable:   23583012 kB\n";
        assert_eq!(available_of(meminfo), Some(23_583_012 * 1024));
        assert_eq!(available_of("MemTotal: 1 kB\n"), None);
        let root = Path::new("/sys/fs/cgroup");
        let groups = groups_of("0::/system.slice/xlb.service\n", root);
        assert_eq!(groups, [root.join("system.slice/xlb.service"), root.join("system.slice"), root.into()]);
        assert_eq!(groups_of("0::/\n", root), [root.to_owned()]);
        assert!(groups_of("3:memory:/old\n", root).is_empty());
        assert!(Available::here().is_some_and(|found| found.bytes > 0));
    }

    #[test]
    fn the_least_of_a_group_and_those_around_it_counts() {
        let dir = std::env::temp_dir().join(format!("xlb-room-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("memory.max"), "max\n").unwrap();
        fs::write(dir.join("memory.current"), "4096\n").unwrap();
        assert_eq!(Available::of_group(&dir), None);
        fs::write(dir.join("memory.max"), "1052672\n").unwrap();
        assert_eq!(Available::of_group(&dir).map(|found| found.bytes), Some(1 << 20));
        // Pages of files come back when somebody needs memory.
        let stat = "anon 1024\nfile 3072\ninactive_file 2048\nactive_file 512\nslab_reclaimable 512\n";
        fs::write(dir.join("memory.stat"), stat).unwrap();
        assert_eq!(Available::of_group(&dir).map(|found| found.bytes), Some((1 << 20) + 3072));
        fs::remove_dir_all(&dir).unwrap();
    }
}
