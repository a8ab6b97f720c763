//! xlb with its fail points, which other builds do not have: it aborts where `FAILPOINTS` says so
//! (`FAILPOINTS="apply=7*off->return"` lets seven writes pass).

fn main() -> std::process::ExitCode {
    let _scenario = fail::FailScenario::setup();
    lb_userspace::cli::main()
}
