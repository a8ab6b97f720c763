//! The `xlb` binary.

#![deny(unsafe_code)]

fn main() -> std::process::ExitCode {
    #[cfg(feature = "fail-points")]
    let _fail_points = fail::FailScenario::setup();
    lb_userspace::cli::main()
}
