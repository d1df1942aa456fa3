# The tasks of a developer or user, one word each.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build build-packages run run-parts run-guest test distribution test-distribution bench guest payloads lint fmt kernel install packages

GUEST := resources/guest/build.sh
TARGET := x86_64-unknown-linux-gnu
TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
BANTAM := $(TARGET_DIR)/$(TARGET)/release/bantam
# Crates that are built for a guest, outside the workspace.
GUEST_CRATES := sysprep/helper tests/agent tests/payloads
PREFIX ?= /usr/local
# Whether to install a kernel, which takes some minutes to build.
KERNEL ?= yes
INSTALLED_KERNEL := $(if $(filter no,$(KERNEL)),,kernel)
# A static program applies its own relocations when it starts; glibc can do so from packed ones since
# version 2.36. Unpacked relocations are 150 KiB that every machine reads, and so keeps in memory.
GLIBC = $(shell getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)
PACK_RELOCATIONS = $(shell printf '%s\n' 2.36 $(GLIBC) | sort --check=quiet --version-sort && \
    echo -C link-arg=-Wl,-z,pack-relative-relocs)

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

# Static: one file that runs with any C library of the host, starts faster and takes less memory. The
# target is named so that the flags apply only to the monitor, not to build scripts and proc macros.
# A static program cannot look up getrandom(), and would read /dev/urandom, which a jail may not have.
# MAKEFLAGS is empty so that cargo does not look for make's job server.
build: build-packages ## Build the monitor for use
	MAKEFLAGS= RUSTFLAGS="-C target-feature=+crt-static --cfg getrandom_backend=\"linux_getrandom\" $(strip $(PACK_RELOCATIONS))" \
	    cargo build --release --target $(TARGET) --package bantam

run: run-parts ## Boot a Linux microVM: a shell at a terminal, a report otherwise
	@exec resources/run.sh "$(BANTAM)" "$(TARGET_DIR)/run"

# The guest is built while the monitor is compiled. Installing packages, which may ask for a password,
# comes first.
run-parts:
	@((EUID == 0)) || resources/install-packages.sh run
	$(MAKE) --no-print-directory --jobs=2 build run-guest

# Through a pipe, as two programs cannot both draw their progress on a terminal.
run-guest:
	@resources/install-packages.sh run
	$(GUEST) run 2>&1 >/dev/null | cat >&2

test: guest payloads ## Run all tests, on real KVM
	cargo build --package bantam
	cargo test --workspace

distribution: packages ## Test with cloud-init of Debian, as root (minutes)
	resources/guest/debian-root.sh >/dev/null
	cargo build --package bantam
	cargo test --workspace --test autostart --test first_boot --test distribution -- --ignored --skip login

test-distribution: packages ## Boot Debian under systemd to its login prompt, as root (many minutes)
	resources/guest/debian-root.sh >/dev/null
	cargo build --package bantam
	cargo test --workspace --test distribution -- --ignored login --nocapture

bench: build guest payloads ## Compare with QEMU's microvm (ONLY=start runs a part)
	BANTAM_BIN=$(BANTAM) cargo bench --package bantam-tests --bench bantam -- $(ONLY)

guest: packages ## Build the guest kernels and root file system (once, cached)
	@$(GUEST) all >/dev/null

payloads: packages ## Build the bare-metal guests
	cargo build --release --target $(TARGET) --target-dir "$(TARGET_DIR)/payloads" \
	    --manifest-path tests/payloads/Cargo.toml

lint: packages ## Check formatting and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	for crate in $(GUEST_CRATES); do
	    cargo fmt --manifest-path $$crate/Cargo.toml --check
	    cargo clippy --manifest-path $$crate/Cargo.toml -- -D warnings
	done

fmt: ## Format all code
	cargo fmt --all
	for crate in $(GUEST_CRATES); do cargo fmt --manifest-path $$crate/Cargo.toml; done

kernel: ## Build the kernel that machines boot by default (once, cached)
	@resources/install-packages.sh kernel
	$(GUEST) kernel distribution

install: build $(INSTALLED_KERNEL) ## Install bantam, its documentation, its kernel and its helper machine under PREFIX (KERNEL=no: no kernel)
	sysprep=$$($(GUEST) sysprep)
	$(if $(INSTALLED_KERNEL),mapfile -t kernel < <($(GUEST) kernel distribution),kernel=())
	resources/install.sh $(BANTAM) "$(DESTDIR)$(PREFIX)" "$$sysprep" "$${kernel[@]}"

build-packages:
	@resources/install-packages.sh build

packages: ## Install the Debian packages that the tasks above need
	@resources/install-packages.sh
.ONESHELL:
