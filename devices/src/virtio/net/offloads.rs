//! Offloads: work that the driver and the host leave to each other, by feature bits.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use crate::tap::Offloads;

/// Features that say which packets the driver can receive unsegmented.
pub(super) const GUEST_SEGMENTATION: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;
/// Features that the driver may switch off and on again with `CTRL_GUEST_OFFLOADS` (section 5.1.6.5.6).
pub(super) const GUEST_OFFLOADS: u64 =
    GUEST_SEGMENTATION | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;

/// Features that say which work the driver may leave to the host.
const HOST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// Returns the features to offer to the driver if the host supports `offloads`. A host that `takes_unfinished`
/// packets does all the work that the driver may leave to it, except for UDP segmentation: it supports that in
/// both directions or in neither.
pub(super) fn offload_features(offloads: Offloads, takes_unfinished: bool) -> u64 {
    let mut features = if takes_unfinished { HOST_OFFLOADS } else { 0 };
    for (known, bits) in [
        (
            offloads.checksum,
            1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ),
        (offloads.tcp4_segmentation, 1 << VIRTIO_NET_F_GUEST_TSO4),
        (offloads.tcp6_segmentation, 1 << VIRTIO_NET_F_GUEST_TSO6),
        (offloads.ecn, 1 << VIRTIO_NET_F_GUEST_ECN),
        (
            offloads.udp_segmentation,
            1 << VIRTIO_NET_F_GUEST_USO4
                | 1 << VIRTIO_NET_F_GUEST_USO6
                | 1 << VIRTIO_NET_F_HOST_USO,
        ),
    ] {
        if known {
            features |= bits;
        }
    }
    features
}

/// Returns the work that the host may leave to the driver.
pub(super) fn offloads(features: u64) -> Offloads {
    let negotiated = |feature: u32| features & 1 << feature != 0;
    Offloads {
        checksum: negotiated(VIRTIO_NET_F_GUEST_CSUM),
        tcp4_segmentation: negotiated(VIRTIO_NET_F_GUEST_TSO4),
        tcp6_segmentation: negotiated(VIRTIO_NET_F_GUEST_TSO6),
        ecn: negotiated(VIRTIO_NET_F_GUEST_ECN),
        udp_segmentation: negotiated(VIRTIO_NET_F_GUEST_USO4)
            && negotiated(VIRTIO_NET_F_GUEST_USO6),
    }
}
