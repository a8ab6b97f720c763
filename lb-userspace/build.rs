//! Compiles lb-ebpf for the BPF target, in a target directory of its own, and leaves the objects in
//! OUT_DIR for `include_bytes`. Chooses between two toolchains; `scripts/setup` installs either.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";
const OBJECTS: [&str; 4] = ["balancer", "bench", "decap", "pass"];

/// Wide loads at any alignment, which the verifier allows on packets: without the feature every
/// header field is loaded byte by byte (1.3 times the time on IPv4, 1.8 on IPv6).
const RUSTFLAGS: [&str; 4] = [
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    "-Ctarget-cpu=v3",
    "-Ctarget-feature=+allows-misaligned-mem-access",
];

/// A compiler with `core` for the BPF target, and what cargo needs to use it.
struct Toolchain {
    cargo: Command,
    environment: &'static [(&'static str, &'static str)],
    arguments: &'static [&'static str],
}

fn main() {
    println!("cargo::rerun-if-changed=../lb-ebpf");
    println!("cargo::rerun-if-changed=../lb-common/src");
    println!("cargo::rerun-if-changed=../lb-common/Cargo.toml");
    println!("cargo::rerun-if-changed=../Cargo.lock");
    println!("cargo::rerun-if-env-changed=PATH");
    if let Err(message) = build() {
        println!("cargo::error={message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().ok_or("the crate has no parent directory")?;
    // Of the profile, whatever the features: they change nothing of the programs.
    let target_dir = out_dir.ancestors().nth(3).ok_or("OUT_DIR has too few parents")?.join("bpf");
    let path = path_with_linker();
    let Toolchain { mut cargo, environment, arguments } = debian()
        .or_else(nightly)
        .ok_or("no Rust compiler with `core` for the BPF target; run ./scripts/setup, which installs one")?;
    let linker = find(&path, "bpf-linker")
        .ok_or("bpf-linker is not installed; run ./scripts/setup, which installs it")?;
    println!("cargo::rerun-if-changed={}", linker.display());
    // To cargo the linker is a name: with a newer one nothing would be linked again.
    if newer(&linker, &target_dir) {
        fs::remove_dir_all(&target_dir).map_err(|error| format!("{}: {error}", target_dir.display()))?;
    }

    // What cargo and rustup tell this script is about the host's compiler.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let about_host = text.starts_with("CARGO") || text.starts_with("RUST");
        if about_host && text != "CARGO_HOME" && text != "RUSTUP_HOME" {
            cargo.env_remove(&name);
        }
    }
    let output = configure(&mut cargo, environment, workspace, &target_dir, &path)
        .args(arguments)
        .output()
        .map_err(|error| format!("cargo for the BPF target did not start: {error}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        for line in stderr.lines() {
            eprintln!("{line}");
        }
        return Err(format!("lb-ebpf did not compile ({}); its errors are above", output.status));
    }
    for object in OBJECTS {
        let built = target_dir.join(TARGET).join("release").join(object);
        fs::copy(&built, out_dir.join(object)).map_err(|error| format!("{}: {error}", built.display()))?;
    }
    Ok(())
}

fn configure<'c>(
    cargo: &'c mut Command,
    environment: &[(&str, &str)],
    workspace: &Path,
    target_dir: &Path,
    path: &OsString,
) -> &'c mut Command {
    cargo
        .args(["build", "--release", "--locked", "--package", "lb-ebpf", "--bins", "--target", TARGET])
        .current_dir(workspace)
        .env("PATH", path)
        .env("CARGO_TARGET_DIR", target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        .envs(environment.iter().copied())
}

/// Debian's rustc-web, which brings `core` for BPF compiled. aya-ebpf needs one unstable feature, and so do our
/// atomic operations.
fn debian() -> Option<Toolchain> {
    let sysroot = output(Command::new("/usr/bin/rustc").args(["--print", "sysroot"]))?;
    let library = Path::new(&sysroot).join("lib/rustlib").join(TARGET).join("lib");
    if !library.is_dir() || !Path::new("/usr/bin/cargo").exists() {
        return None;
    }
    let environment = &[("RUSTC", "/usr/bin/rustc"), ("RUSTC_BOOTSTRAP", "aya_ebpf,lb_common")];
    Some(Toolchain { cargo: Command::new("/usr/bin/cargo"), environment, arguments: &[] })
}

/// rustup's nightly with the source of `core`.
fn nightly() -> Option<Toolchain> {
    let sysroot = output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
    if !Path::new(&sysroot).join("lib/rustlib/src/rust/library").is_dir() {
        return None;
    }
    let mut cargo = Command::new("rustup");
    cargo.args(["run", "nightly", "cargo"]);
    Some(Toolchain { cargo, environment: &[], arguments: &["-Zbuild-std=core"] })
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// PATH, with the place where `cargo install` puts bpf-linker behind it.
fn path_with_linker() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    if let Some(home) = home {
        path.push(":");
        path.push(home.join("bin"));
    }
    path
}

fn find(path: &OsString, program: &str) -> Option<PathBuf> {
    env::split_paths(path).map(|directory| directory.join(program)).find(|program| program.is_file())
}

/// Whether a file has changed since a directory was made.
fn newer(file: &Path, directory: &Path) -> bool {
    let made = fs::metadata(directory).and_then(|made| made.created().or(made.modified()));
    let changed = fs::metadata(file).and_then(|file| file.modified());
    matches!((changed, made), (Ok(changed), Ok(made)) if changed > made)
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
