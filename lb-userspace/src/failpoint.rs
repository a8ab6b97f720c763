//! Places where tests let the agent die, to see that whatever it leaves behind is sound. Nothing without the feature
//! `fail-points`.

/// Ends the process on the spot where `FAILPOINTS` says so: `FAILPOINTS="apply=7*off->return"` lets seven pass.
macro_rules! fail_point {
    ($name:literal) => {
        ::fail::fail_point!($name, |_| std::process::abort())
    };
}
