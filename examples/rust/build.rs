// FLEXQ_LIB_DIR is the folder of libflexq, FLEXQ_LIBS what to link: "flexq" if it is shared, "flexq stdc++" if static.
fn main() {
    println!("cargo:rerun-if-env-changed=FLEXQ_LIB_DIR");
    println!("cargo:rerun-if-env-changed=FLEXQ_LIBS");
    let folder = std::env::var("FLEXQ_LIB_DIR").expect("FLEXQ_LIB_DIR must name the folder of libflexq");
    println!("cargo:rustc-link-search=native={folder}");
    for library in std::env::var("FLEXQ_LIBS").unwrap_or("flexq".into()).split_whitespace() {
        println!("cargo:rustc-link-lib={library}");
    }
}
