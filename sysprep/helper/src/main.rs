// SPDX-License-Identifier: Apache-2.0

//! The first process of the helper machine: it does the task that the host has put on a disk, and switches the machine off.

fn main() {
    bantam_sysprep::guest::serve();
}
