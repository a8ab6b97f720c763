//! Mounts as `/proc/PID/mountinfo` lists them, and whether one of this process's outlives it. It mounts nothing.

use std::io;

/// What a line of mountinfo (proc_pid_mountinfo(5)) says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount<'a> {
    pub device: (u32, u32),
    /// `shared:N`, `master:N` and the like.
    pub propagation: Vec<&'a str>,
    pub kind: &'a str,
    /// What was mounted, as the one who mounted it called it.
    pub source: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split(' ').skip(2);
        let (major, minor) = words.next()?.split_once(':')?;
        let device = (major.parse().ok()?, minor.parse().ok()?);
        // The root inside of the file system, the mount point, its options.
        let mut words = words.skip(3);
        let propagation = words.by_ref().take_while(|word| *word != "-").collect();
        Some(Self { device, propagation, kind: words.next()?, source: words.next()? })
    }
}

/// The last mount of a bpffs, given its device.
pub fn find_bpf(mountinfo: &str, device: (u32, u32)) -> Option<Mount<'_>> {
    mountinfo.lines().filter_map(Mount::parse).rfind(|mount| mount.kind == "bpf" && mount.device == device)
}

/// Whether a bpffs stays when the processes of this mount namespace have ended.
#[derive(Debug)]
pub enum Outlives {
    Yes,
    No,
    /// Process 1 does not show its mounts, and nothing else tells.
    Unknown(io::Error),
}

/// Asks the mounts of process 1, whose mount namespace lasts as long as the machine, or the container.
pub fn outlives(device: (u32, u32)) -> io::Result<Outlives> {
    let own = std::fs::read_to_string("/proc/self/mountinfo")?;
    // In a container xlb may be process 1 itself, which proves nothing.
    let first = if std::process::id() == 1 {
        Err(io::Error::other("this process is process 1"))
    } else {
        std::fs::read_to_string("/proc/1/mountinfo")
    };
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt"));
    let same = std::process::id() != 1
        && namespace("1").ok().is_some_and(|first| namespace("self").is_ok_and(|own| own == first));
    Ok(judge(device, &own, first, same))
}

fn judge(device: (u32, u32), own: &str, first: io::Result<String>, same_namespace: bool) -> Outlives {
    match first {
        Ok(first) if find_bpf(&first, device).is_some() => Outlives::Yes,
        Ok(_) => Outlives::No,
        Err(_) if same_namespace => Outlives::Yes,
        // It came from another namespace, where its master is.
        Err(_)
            if find_bpf(own, device)
                .is_some_and(|mount| mount.propagation.iter().any(|word| word.starts_with("master:"))) =>
        {
            Outlives::Yes
        }
        Err(error) => Outlives::Unknown(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIVATE: &str = "43 27 0:39 / /run/xlb/bpf rw,relatime - bpf xlb rw,mode=700\n";
    const SLAVE: &str = "43 27 0:39 / /run/with\\040space/bpf rw shared:2 master:7 - bpf bpf rw\n";
    const OTHERS: &str =
        "22 27 0:21 / /proc rw - proc proc rw\n44 27 0:39 / /mnt rw - tmpfs x rw\n\nnonsense\n";

    fn denied() -> io::Result<String> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn a_line_with_optional_fields_and_one_without_are_read() {
        let text = format!("{OTHERS}{SLAVE}");
        let mount =
            Mount { device: (0, 39), propagation: vec!["shared:2", "master:7"], kind: "bpf", source: "bpf" };
        assert_eq!(find_bpf(&text, (0, 39)), Some(mount));
        assert_eq!(find_bpf(PRIVATE, (0, 39)).map(|mount| mount.source), Some("xlb"));
        assert_eq!(find_bpf(PRIVATE, (0, 40)), None);
    }

    #[test]
    fn process_1_decides_where_it_shows_its_mounts() {
        assert!(matches!(judge((0, 39), PRIVATE, Ok(PRIVATE.into()), false), Outlives::Yes));
        // A mount point of the same place, but another bpffs: that of an unshared namespace over the machine's.
        assert!(matches!(judge((0, 40), PRIVATE, Ok(PRIVATE.into()), false), Outlives::No));
        assert!(matches!(judge((0, 39), PRIVATE, Ok(OTHERS.into()), false), Outlives::No));
    }

    #[test]
    fn without_process_1_a_mount_that_came_from_elsewhere_is_trusted_and_others_are_not() {
        assert!(matches!(judge((0, 39), PRIVATE, denied(), true), Outlives::Yes));
        assert!(matches!(judge((0, 39), SLAVE, denied(), false), Outlives::Yes));
        assert!(matches!(judge((0, 39), PRIVATE, denied(), false), Outlives::Unknown(_)));
    }
}
