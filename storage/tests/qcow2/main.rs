//! Tests of the qcow2 format. QEMU's tools are the judges; the tests fail without them.

#![allow(clippy::unwrap_used, reason = "every step of a test has to succeed")]

mod memory_file;
mod support;

mod allocate;
mod change;
mod crash;
mod fuzz;
mod jobs;
mod jobs_crash;
mod overlay_crash;
mod pending;
mod property;
mod read;
mod rebase;
mod threads;
