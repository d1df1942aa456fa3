//! Links every payload as a static ELF executable at a fixed physical address.

fn main() {
    let directory =
        std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets the package's directory");
    let script = format!("{directory}/payload.ld");
    println!("cargo::rerun-if-changed={script}");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--no-eh-frame-hdr",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        &format!("-Wl,-T,{script}"),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
