//! Tests of the qcow2 format. QEMU's tools are the judges; the tests fail without them.

mod support;

mod property;
mod read;
