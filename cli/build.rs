//! Has the linker put functions in order, in a static program, which is how the monitor is built for use.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=layout.ld");
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        let folder = env::var("CARGO_MANIFEST_DIR").expect("cargo sets this");
        let script = Path::new(&folder).join("layout.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
}
