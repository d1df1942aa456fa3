//! Devices that a machine has once: entropy device, memory balloon, socket device.

use std::path::PathBuf;

use bantam_vmm::config::{
    BalloonConfig, BalloonSize, GuestCid, LimitConfig, LimitedDevice, MachineConfig, Quantity,
    VsockConfig,
};

use crate::disk::plain_rate;
use crate::error::Error;
use crate::values::{number, yes};
use crate::xml::Element;

/// The context identifier of a guest that may have any. It is told apart by its socket, so all can have the same.
const ANY_CID: i64 = 3;
/// The socket of a socket device, in the folder of the machine: libvirt has none.
const VSOCK_SOCKET: &str = "vsock.sock";
const MIB: u64 = 1 << 20;

/// Returns the path of the socket of a socket device, relative to the folder of its machine.
pub(crate) fn vsock_socket() -> PathBuf {
    VSOCK_SOCKET.into()
}

/// Returns the only device of its kind.
fn only<'a>(devices: &'a Element, name: &str) -> Result<Option<&'a Element>, Error> {
    let mut found = devices.all(name);
    let first = found.next();
    match found.next() {
        Some(_) => Err(Error::unsupported(
            format!("a second <{name}>"),
            "remove it",
        )),
        None => Ok(first),
    }
}

/// Checks that a device is the virtio one. `none` is handled by the caller.
fn check_model(device: &Element) -> Result<(), Error> {
    match device.get("model") {
        None | Some("virtio") => Ok(()),
        Some(model) => Err(Error::unsupported(
            format!("<{} model='{model}'>", device.name),
            "write model='virtio'",
        )),
    }
}

/// Reads the devices. The guest is to have `given_up` bytes less than all memory.
///
/// # Errors
/// If one is such that Bantam does not have it.
pub(crate) fn read_all(
    devices: &Element,
    given_up: u64,
    config: &mut MachineConfig,
) -> Result<(), Error> {
    config.rng = match only(devices, "rng")? {
        Some(rng) => Some(read_rng(rng)?),
        None => None,
    };
    config.balloon = match only(devices, "memballoon")? {
        Some(balloon) if balloon.get("model") == Some("none") => None,
        balloon => {
            // libvirt adds one to each domain that does not say that there is none.
            let mib = u32::try_from(given_up / MIB).unwrap_or(u32::MAX);
            let mut read = BalloonConfig::new(BalloonSize::from_mib(mib));
            if let Some(balloon) = balloon {
                check_model(balloon)?;
                read.deflate_on_oom = yes(balloon.get("autodeflate"));
                read.reporting = yes(balloon.get("freePageReporting"));
                let period = balloon.get_of("stats", "period").unwrap_or("0");
                let period = number(period, "the period of <memballoon>")?;
                read.statistics = u32::try_from(period)
                    .map_err(|_| Error::value("the period of <memballoon>", "is too long"))?;
            }
            Some(read)
        }
    };
    config.vsock = match only(devices, "vsock")? {
        Some(vsock) => {
            check_model(vsock)?;
            let cid = vsock.get_of("cid", "address");
            let cid = cid.map_or(Ok(ANY_CID), |cid| number(cid, "the address of <vsock>"))?;
            Some(VsockConfig {
                cid: GuestCid::try_from(cid)?,
                socket: vsock_socket(),
            })
        }
        None => None,
    };
    Ok(())
}

fn read_rng(rng: &Element) -> Result<LimitedDevice, Error> {
    check_model(rng)?;
    match rng.get_of("backend", "model") {
        None | Some("random" | "builtin") => {}
        Some(model) => {
            return Err(Error::unsupported(
                format!("<rng> with a backend of the model '{model}'"),
                "write <backend model='random'>/dev/urandom</backend>",
            ));
        }
    }
    let mut device = LimitedDevice::default();
    if let Some(rate) = rng.first("rate") {
        let bytes = rate.get("bytes").unwrap_or_default();
        let bytes = number(bytes, "the rate of <rng>")?;
        let period = rate.get("period").unwrap_or("1000");
        let period = number(period, "the period of <rng>")?;
        let per_second = (period > 0)
            .then(|| i128::from(bytes) * 1000 / i128::from(period))
            .and_then(|rate| i64::try_from(rate).ok())
            .ok_or_else(|| Error::value("the rate of <rng>", "is out of range"))?;
        device.limits.bytes = LimitConfig::Rate {
            per_second: Some(Quantity::try_from(per_second)?),
            burst: None,
        };
    }
    Ok(device)
}

/// Writes the devices.
pub(crate) fn write_all(config: &MachineConfig) -> Vec<Element> {
    let mut elements = Vec::new();
    let balloon = Element::new("memballoon");
    elements.push(match &config.balloon {
        None => balloon.attribute("model", "none"),
        Some(it) => {
            let mut balloon = balloon.attribute("model", "virtio");
            for (name, is_on) in [
                ("autodeflate", it.deflate_on_oom),
                ("freePageReporting", it.reporting),
            ] {
                if is_on {
                    balloon = balloon.attribute(name, "on");
                }
            }
            if it.statistics != 0 {
                let period = i32::try_from(it.statistics).unwrap_or(i32::MAX);
                balloon.push(Element::new("stats").attribute("period", period));
            }
            balloon
        }
    });
    if let Some(rng) = &config.rng {
        let mut element = Element::new("rng").attribute("model", "virtio");
        if let Some(rate) = plain_rate(rng.limits.bytes) {
            // libvirt's number has 32 bits; Bantam's own options have a larger one.
            let rate = u32::try_from(rate).unwrap_or(u32::MAX);
            let rate = Element::new("rate").attribute("bytes", rate);
            element.push(rate.attribute("period", 1000));
        }
        let backend = Element::new("backend").attribute("model", "random");
        element.push(backend.text("/dev/urandom"));
        elements.push(element);
    }
    if let Some(vsock) = &config.vsock {
        // Others are reserved, and libvirt does not take them.
        let cid = GuestCid::try_from(i64::from(vsock.cid.get())).map_or(3, GuestCid::get);
        let cid = Element::new("cid")
            .attribute("auto", "no")
            .attribute("address", cid);
        elements.push(
            Element::new("vsock")
                .attribute("model", "virtio")
                .child(cid),
        );
    }
    elements
}
