//! Files that are cut, broken, huge or not files at all.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// A file that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Scratch {
        let path = std::env::temp_dir().join(format!("xlb-config-{}-{name}", std::process::id()));
        fs::write(&path, bytes).expect("the directory for temporary files takes one more");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The one problem of a file that cannot be read, without its name.
fn refusal(bytes: &[u8], name: &str) -> String {
    let file = Scratch::new(name, bytes);
    let problems = load(&file.0).expect_err("this must not load");
    assert_eq!(problems.0.len(), 1, "{problems}");
    problems.to_string().replace(&file.0.display().to_string(), "FILE")
}

#[test]
fn a_file_that_is_no_text_or_no_file_is_one_problem() {
    let not_utf8 = refusal(b"interfaces:\n- \xffeth0\n", "utf8");
    assert_eq!(not_utf8, "FILE:2:3: byte 0xff is not UTF-8; save the file as UTF-8");
    let empty = refusal(b"", "empty");
    let expected = "FILE:1:1: the file holds no configuration; begin with the interfaces: interfaces: [eth0]";
    assert_eq!(empty, expected);
    let large = refusal(&vec![b'\n'; 16 * 1024 * 1024 + 1], "large");
    assert_eq!(large, "FILE: is larger than 16 MiB; is this the right file?");

    let missing = load(Path::new("/nowhere/xlb.yaml")).expect_err("this file does not exist");
    let expected = "/nowhere/xlb.yaml: cannot be read: No such file or directory (os error 2); \
                    name the file with --config";
    assert_eq!(missing.to_string(), expected);
    let directory = load(Path::new("/")).expect_err("this is a directory");
    assert_eq!(directory.to_string(), "/: is a directory; name a file, such as /xlb.yaml");
}

#[test]
fn a_file_that_ends_within_a_line_is_refused() {
    let whole = Scratch::new("whole", GOOD.as_bytes());
    assert!(load(&whole.0).is_ok(), "this file is good");
    let cut = Scratch::new("cut", GOOD.trim_end().as_bytes());
    let problems = load(&cut.0).expect_err("the last line is cut").0;
    let printed = problems[0].to_string();
    let expected = ":61:52: the last line has no line break, so the file may be cut off; \
                    if it is whole, end it with a line break";
    assert!(printed.ends_with(expected), "{printed}");
    assert_eq!(problems.len(), 1);
}

/// A cut within a line is refused (see above): here are the cuts between two lines.
#[test]
fn a_file_cut_at_any_byte_never_names_what_the_whole_file_does_not() {
    let whole = loaded(GOOD).config;
    for cut in (0..GOOD.len()).filter(|&cut| GOOD.is_char_boundary(cut)) {
        let Ok(part) = parse("xlb.yaml", &GOOD[..cut]) else {
            continue;
        };
        if !GOOD[..cut].ends_with('\n') {
            continue;
        }
        for pool in &part.config.pools {
            let full = whole.pools.iter().find(|full| full.name == pool.name);
            let full = full.expect("the whole file has the pool");
            assert!(pool.backends.iter().all(|backend| full.backends.contains(backend)), "{cut}");
        }
        let services = &part.config.services;
        assert!(services.iter().all(|service| whole.services.contains(service)), "{cut}");
    }
}

/// Runs `parse`, which must refuse the text within a second, in an unoptimised build too. The best
/// of three runs counts: the machine may be busy with something else.
fn at_once(name: &str, text: &str) -> Problems {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        let result = parse("xlb.yaml", text);
        best = best.min(start.elapsed());
        if best < Duration::from_secs(1) {
            return result.expect_err(name);
        }
    }
    panic!("{name} took {best:?}");
}

#[test]
fn a_document_that_would_grow_when_read_is_refused_at_once() {
    let mut aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..30 {
        let each = format!("*a{}, ", level - 1).repeat(10);
        aliases.push_str(&format!("a{level}: &a{level} [{each}]\n"));
    }
    let problems = at_once("aliases of aliases", &aliases);
    assert!(problems.0.iter().all(|p| p.message.contains("anchors (&) and aliases (*)")));

    for (name, unit) in [
        ("lists", "["),
        ("lists in lists", "[[],"),
        ("mappings", "{"),
        ("mappings with keys", "{a: "),
        ("block lists", "- "),
        ("complex keys", "? "),
        ("anchors", "&a "),
        ("tags", "!a "),
    ] {
        let problems = at_once(name, &unit.repeat(300_000));
        assert!(problems.0.len() < 3, "{name}: {problems}");
    }
    let stairs: String = (0..1000).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
    at_once("a staircase of mappings", &stairs);
}

#[test]
fn a_few_lines_that_name_many_triples_are_counted_and_not_compared() {
    let vips: Vec<String> = (1..=10).map(|i| format!("10.0.0.{i}")).collect();
    let ports: Vec<String> = (1..=1000).map(|port| port.to_string()).collect();
    let (vips, ports) = (vips.join(","), ports.join(","));
    let service = |i| {
        let name = format!("name: s{i}, protocol: [tcp, udp], pool: a");
        format!("- {{vip: [{vips}], ports: [{ports}], {name}}}\n")
    };
    let services: String = (0..10).map(service).collect();
    let text = format!("interfaces: [eth0]\npools: {{a: {{forward: ipip}}}}\nservices:\n{services}");
    let problems = at_once("triples", &text).0;
    let expected = "xlb.yaml:1:1 limits.vips: 2048 is the limit, but the file has 200000 \
                    (VIP, port or range, protocol) triples; more than 32768 are not possible";
    assert_eq!(problems[0].to_string(), expected);
    let expected = "xlb.yaml:5:10 services[1].vip[0]: 10.0.0.1:1 tcp (and 19999 more) already belongs to \
                    s0 at line 4 (services[0].vip[0]); remove it from one of the two services";
    assert_eq!(problems[1].to_string(), expected);
    assert_eq!(problems.len(), 5, "the fifth service is the last within the budget");
}

#[test]
fn problems_beyond_a_thousand_are_counted_and_not_shown() {
    let text = format!("interfaces: [eth0]\ntrace: maybe\npools:\n{}", "  a: {}\n".repeat(2000));
    let problems = at_once("duplicates", &text);
    assert_eq!(problems.0.len(), 1001);
    let last = problems.0.last().map(ToString::to_string);
    assert_eq!(last.as_deref(), Some("xlb.yaml: 1001 more are not shown; start with those above"));
}

#[test]
fn all_mistakes_of_a_very_bad_file_are_reported_together_in_order() {
    let bad = GOOD
        .replace("mode: native", "mode: nativ")
        .replace("vip_arp: true", "vip_arp: yes")
        .replace("slots: 65536", "slots: 65537")
        .replace("interval: 2s", "interval: 2")
        .replace("forward: ipip", "forwrad: ipip")
        .replace("10.0.1.12", "10.0.1.11")
        .replace("weight: 50", "weight: 101")
        .replace("pool: dns", "pool: dsn")
        .replace("vip: 203.0.113.53", "vip: 10.0.1.11")
        .replace("ports: 53", "port: 53");
    let expected = [
        "xlb.yaml:3:7 mode: nativ is not allowed; did you mean native?",
        "xlb.yaml:6:10 vip_arp: yes is not allowed; use true",
        "xlb.yaml:8:43 limits.slots: 65537 is not a multiple of 4096; use 69632",
        "xlb.yaml:10:33 defaults.health.interval: 2 has no unit; write 2s",
        "xlb.yaml:13:3 pools.web.forward: is missing; use ipip or gue (encapsulated), l2 (backends on-link), nat or fullnat (addresses translated)",
        "xlb.yaml:14:5 pools.web.forwrad: is not a known key; did you mean forward?",
        "xlb.yaml:18:9 pools.web.backends[0]: 10.0.1.11 is also the VIP at line 51 (services[1].vip); \
         a backend needs an address of its own: its packets would come back to the balancer",
        "xlb.yaml:19:9 pools.web.backends[1]: 10.0.1.11 is already a backend of this pool at line 18 \
         (pools.web.backends[0]); remove one of the two",
        "xlb.yaml:20:38 pools.web.backends[2].weight: 101 is not allowed; use 0-100 (0 takes no flows)",
        "xlb.yaml:35:3 pools.far.forward: is missing; use ipip or gue (encapsulated), l2 (backends on-link), nat or fullnat (addresses translated)",
        "xlb.yaml:36:5 pools.far.forwrad: is not a known key; did you mean forward?",
        "xlb.yaml:50:5 services[1].ports: is missing; use a port such as 80, a range such as 8000-8100, a list of them, or any",
        "xlb.yaml:52:5 services[1].port: is not a known key; did you mean ports?",
        "xlb.yaml:54:11 services[1].pool: there is no pool dsn; did you mean dns?",
    ];
    assert_eq!(errors(&bad), expected);
}

/// Whatever happens, every problem is one line that is safe to print.
fn check_any(text: &str) {
    let problems = match parse("xlb.yaml", text) {
        Ok(loaded) => loaded.warnings,
        Err(Problems(problems)) => {
            assert!(!problems.is_empty(), "{text:?} is refused without a reason");
            problems
        }
    };
    for problem in problems {
        let printed = problem.to_string();
        assert!(!printed.chars().any(char::is_control), "{printed:?}");
    }
}

const PIECES: &[&str] = &[
    "a",
    " ",
    "  ",
    "\n",
    "\n  ",
    "\n- ",
    ": ",
    ":",
    ", ",
    "[",
    "]",
    "{",
    "}",
    "'",
    "\"",
    "|",
    ">\n",
    "? ",
    "&a ",
    "*a",
    "!",
    "!!str ",
    "#",
    " #",
    "%",
    "---\n",
    "...\n",
    "\t",
    "~",
    "null",
    "0x1",
    "\r\n",
    "\\",
    "\\n",
    "\u{e9}",
    "<<: ",
    "-",
    "\r",
    "\u{1f600}",
    "\u{a0}",
    "\u{85}",
    "\u{feff}",
    "@",
    "10",
];

proptest! {
    #[test]
    fn parse_never_panics_on_arbitrary_text(text in any::<String>()) {
        check_any(&text);
    }

    #[test]
    fn parse_never_panics_on_pieces_of_yaml(
        pieces in prop::collection::vec(prop::sample::select(PIECES), 0..24),
    ) {
        check_any(&pieces.concat());
    }

    #[test]
    fn parse_never_panics_on_a_good_file_with_a_wrong_piece(
        at in 0..GOOD.len(),
        removed in 0..8_usize,
        piece in prop::sample::select(PIECES),
    ) {
        let end = (at + removed).min(GOOD.len());
        check_any(&format!("{}{piece}{}", &GOOD[..at], &GOOD[end..]));
    }
}
