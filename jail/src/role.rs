//! Roles of threads.

/// What a thread does, which decides what it may ask of the kernel.
///
/// A filter applies to the thread that installs it and to the threads that it starts, besides those that are in force
/// already. So a thread that starts others needs a filter that allows what they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Anything that the process does itself: it builds and ends machines, opens files, takes snapshots, and serves
    /// clients.
    Program,
    /// Runs a vCPU, and the registers of the devices that it accesses.
    Vcpu,
    /// Serves devices.
    Devices,
    /// Works on disk images that are open.
    Image,
    /// Copies, commits and moves images: it also opens and removes their files, and makes the rings and threads of the image
    /// that a disk has in the end.
    Job,
    /// Brings back the memory of a snapshot.
    Memory,
    /// Talks to gdb.
    Debugger,
    /// Writes to descriptors that are open.
    Writer,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 8] = [
        Role::Program,
        Role::Vcpu,
        Role::Devices,
        Role::Image,
        Role::Job,
        Role::Memory,
        Role::Debugger,
        Role::Writer,
    ];
}

/// What a machine needs of networks, which decides what sockets its threads may make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Networks {
    /// Sockets of IP on threads of devices: a user network.
    pub user: bool,
    /// Sockets of IP on threads of the program: a port for gdb, the connection by which the machine is moved.
    pub program: bool,
    /// Interfaces of the host, which are asked about by netlink.
    pub interfaces: bool,
    /// A network namespace that taps are opened in.
    pub namespace: bool,
    /// Unix sockets that the machine listens on, whose files its threads remove in the end.
    pub sockets: bool,
    /// Unix sockets that threads of devices connect to: those of the socket device, and of a program that is a network.
    pub streams: bool,
}
