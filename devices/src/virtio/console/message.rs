//! Messages of the control queues (section 5.3.6.2).

/// Size in bytes of the part that all messages have.
pub(super) const HEADER_SIZE: usize = 8;

/// The kinds of messages.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// A message from the device about a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeviceMessage<'a> {
    /// The port exists.
    Add,
    /// Its name.
    Name(&'a str),
    /// Whether the host has its end open.
    Open(bool),
}

impl DeviceMessage<'_> {
    /// Encodes the message about `port` as the driver reads it.
    pub(super) fn to_bytes(self, port: usize) -> Vec<u8> {
        let (event, value, name) = match self {
            DeviceMessage::Add => (event::PORT_ADD, 1, ""),
            DeviceMessage::Name(name) => (event::PORT_NAME, 1, name),
            DeviceMessage::Open(open) => (event::PORT_OPEN, u16::from(open), ""),
        };
        let mut bytes = (port as u32).to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(name.bytes());
        bytes
    }
}

/// A message from the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DriverMessage {
    /// Whether the driver is ready for messages about ports.
    DeviceReady(bool),
    /// Whether the driver has made a port usable.
    PortReady { port: usize, ready: bool },
    /// Whether the guest has its end of a port open.
    PortOpen { port: usize, open: bool },
    /// A message that only a device sends, or that is not in the standard.
    Unknown { event: u16 },
}

impl DriverMessage {
    pub(super) fn from_bytes(bytes: [u8; HEADER_SIZE]) -> DriverMessage {
        let [id @ .., event_low, event_high, value_low, value_high] = bytes;
        let port = u32::from_le_bytes(id) as usize;
        let is_set = [value_low, value_high] != [0, 0];
        match u16::from_le_bytes([event_low, event_high]) {
            event::DEVICE_READY => DriverMessage::DeviceReady(is_set),
            event::PORT_READY => DriverMessage::PortReady {
                port,
                ready: is_set,
            },
            event::PORT_OPEN => DriverMessage::PortOpen { port, open: is_set },
            event => DriverMessage::Unknown { event },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_the_standard_lays_them_out() {
        assert_eq!(
            DeviceMessage::Name("ab").to_bytes(0x102),
            [2, 1, 0, 0, 7, 0, 1, 0, b'a', b'b']
        );
        assert_eq!(
            DeviceMessage::Open(false).to_bytes(1),
            [1, 0, 0, 0, 6, 0, 0, 0]
        );
        assert_eq!(
            DriverMessage::from_bytes([5, 0, 0, 0, 6, 0, 1, 0]),
            DriverMessage::PortOpen {
                port: 5,
                open: true
            }
        );
        assert_eq!(
            DriverMessage::from_bytes([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1]),
            DriverMessage::DeviceReady(true)
        );
        assert_eq!(
            DriverMessage::from_bytes([0, 0, 0, 0, 1, 0, 1, 0]),
            DriverMessage::Unknown { event: 1 }
        );
    }
}
