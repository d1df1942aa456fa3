//! Tests of the qcow2 format. QEMU's tools are the judges; the tests fail without them.

mod memory_file;
mod support;

mod change;
mod crash;
mod fuzz;
mod property;
mod read;
mod threads;
