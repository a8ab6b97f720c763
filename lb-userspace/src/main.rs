//! The `xlb` binary.

#![deny(unsafe_code)]

fn main() -> std::process::ExitCode {
    lb_userspace::memory::return_large_blocks();
    lb_userspace::cli::main()
}
