use std::ffi::OsString;

use clap::{CommandFactory, Parser};

use super::*;

fn strings(line: &str) -> Vec<OsString> {
    line.split(' ').map(OsString::from).collect()
}

#[test]
fn the_command_line_is_consistent() {
    QemuImgArgs::command().debug_assert();
}

#[test]
fn a_size_with_a_dash_is_not_an_option() {
    let prepared = |line| prepare(strings(line));
    assert_eq!(
        prepared("qemu-img resize a.img -1M"),
        strings("qemu-img resize a.img -- -1M")
    );
    assert_eq!(
        prepared("bantam image resize --shrink a.img -1M"),
        strings("bantam image resize --shrink a.img -- -1M")
    );
    for unchanged in [
        "bantam image resize a.img +1M",
        "bantam image resize a.img 1M -q",
        "bantam image resize -- a.img -1M",
        "bantam image info -1M",
        "bantam run -1M",
    ] {
        assert_eq!(prepared(unchanged), strings(unchanged));
    }
}

#[test]
fn command_lines_of_qemu_img_are_read() {
    for line in [
        "create -q -f raw a.img 1G",
        "create -f qcow2 -o cluster_size=64k,compat=1.1 -b base.img -F raw a.qcow2",
        "create -f qcow2 -u -b base.img -F raw a.qcow2 1G",
        "info -U --output=json --backing-chain a.img",
        "check -q -r leaks -f qcow2 a.qcow2",
        "convert -p -f vmdk -O qcow2 -c -o compression_type=zstd a.vmdk a.qcow2",
        "convert -n -f raw -O raw -S 64k -t none -T none -m 16 -W a.img /dev/sdx",
        "convert a.img b.img c.img",
        "resize -f raw --shrink a.img +1.5G",
        "compare -s -p -f raw -F qcow2 a.img b.qcow2",
        "map -s 1M -l 2M --output json a.img",
        "measure --size 10G -O raw",
        "dd -f raw -O raw bs=1M count=2 if=a.img of=b.img",
        "snapshot -c before a.qcow2",
        "snapshot -l a.qcow2",
    ] {
        let line = strings(&format!("qemu-img {line}"));
        if let Err(error) = QemuImgArgs::try_parse_from(prepare(line)) {
            panic!("{error}");
        }
    }
    for line in [
        "create -f nosuch a.img 1G",
        "create -f qcow2 -b base.img a.qcow2",
        "convert a.img",
        "snapshot -c a -d b a.qcow2",
        "measure",
    ] {
        let line = strings(&format!("qemu-img {line}"));
        assert!(QemuImgArgs::try_parse_from(line).is_err());
    }
}
