//! What can go wrong with networks, with what may help.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why something cannot be done with a network. Each error displays as one line with cause and remedy.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A network cannot be called so.
    #[error(
        "invalid network name '{text}': 1 to 40 letters, digits and the characters '.', '_' and '-', of which the first \
         is a letter or digit"
    )]
    Name {
        /// The name.
        text: String,
    },
    /// A machine cannot be called so on a network.
    #[error(
        "invalid host name '{text}': 1 to 63 letters, digits and '-', of which the first and the last are not '-'"
    )]
    HostName {
        /// The name.
        text: String,
    },
    /// No network is called so.
    #[error("there is no network '{name}'; {remedy}")]
    Unknown {
        /// The name.
        name: String,
        /// Which networks there are.
        remedy: String,
    },
    /// There is such a network already.
    #[error("there is a network '{name}' already; 'bantam network undefine {name}' removes it")]
    Exists {
        /// The name.
        name: String,
    },
    /// The network is not started, and not to be started by its users.
    #[error("network '{name}' is not started; 'bantam network start {name}' starts it")]
    NotStarted {
        /// The name.
        name: String,
    },
    /// The network is started.
    #[error("network '{name}' is started; 'bantam network stop {name}' stops it")]
    Started {
        /// The name.
        name: String,
    },
    /// The text is not a subnet that a network can have.
    #[error("invalid subnet '{text}': {reason}")]
    Subnet {
        /// The text.
        text: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The addresses of a network are those of something else.
    #[error(
        "subnet {subnet} overlaps {other}; choose another subnet, or leave it out and a free one is chosen"
    )]
    Overlap {
        /// The subnet.
        subnet: String,
        /// What has its addresses.
        other: String,
    },
    /// All subnets that could be chosen overlap something.
    #[error(
        "every subnet that could be chosen overlaps a route of the host; name a free one with --subnet"
    )]
    NoFreeSubnet,
    /// Options of a definition exclude each other.
    #[error("{0}")]
    Options(String),
    /// There is no such bridge.
    #[error(
        "there is no bridge '{bridge}'; as root 'ip link add {bridge} type bridge && ip link set {bridge} up' makes one"
    )]
    BridgeMissing {
        /// Its name.
        bridge: String,
    },
    /// The interface is something else.
    #[error("interface '{name}' is not a bridge; choose another name")]
    NotBridge {
        /// Its name.
        name: String,
    },
    /// An interface has the name that a bridge is to have.
    #[error(
        "cannot start network '{network}': there is an interface '{bridge}' already, which is not its own; remove it, or \
         define the network with another name for its bridge (--bridge)"
    )]
    InterfaceExists {
        /// The network.
        network: String,
        /// The name.
        bridge: String,
    },
    /// There is no such interface.
    #[error("there is no interface '{name}'; 'ip link' lists those of the host")]
    InterfaceMissing {
        /// Its name.
        name: String,
    },
    /// This user may not do it.
    #[error(
        "cannot {action}: not permitted; networks of the host take root (CAP_NET_ADMIN), '--net user' works without"
    )]
    NotPermitted {
        /// What was being done.
        action: String,
    },
    /// A program is not installed.
    #[error("cannot find the program '{program}'; install the package '{package}'")]
    ProgramMissing {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program has failed.
    #[error("cannot {action}: {program}: {reason}")]
    Program {
        /// What was being done.
        action: String,
        /// The program.
        program: &'static str,
        /// What it says.
        reason: String,
    },
    /// The kernel refuses a change of its interfaces, addresses or routes.
    #[error("cannot {action}: {source}")]
    Netlink {
        /// What was being done.
        action: String,
        /// Why not.
        source: io::Error,
    },
    /// A file of the networks cannot be used.
    #[error("cannot {action} '{path}': {source}", path = .path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of the networks has contents that it cannot have.
    #[error("cannot use '{path}': {reason}; remove it, or define the network again", path = .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Another command takes too long.
    #[error(
        "another command has been changing networks for {seconds} s; try again when it has ended"
    )]
    Busy {
        /// How long it was waited for.
        seconds: u64,
    },
    /// Another machine has the MAC address.
    #[error(
        "another machine on network '{network}' has MAC address {mac}; give this one another by 'mac='"
    )]
    MacInUse {
        /// The network.
        network: String,
        /// The address.
        mac: String,
    },
    /// Another machine has the name.
    #[error(
        "another machine on network '{network}' is called '{hostname}'; give this one another 'hostname='"
    )]
    HostNameInUse {
        /// The network.
        network: String,
        /// The name.
        hostname: String,
    },
    /// All addresses of a network are in use.
    #[error(
        "network '{network}' has no free address; end machines, or define a network with a larger subnet"
    )]
    NoFreeAddress {
        /// The network.
        network: String,
    },
    /// The host has no such group of users.
    #[error("there is no group '{name}'; 'getent group' lists those of the host")]
    GroupMissing {
        /// Its name.
        name: String,
    },
    /// Ordinary users may not use the network.
    #[error(
        "network '{network}' is for root only; as root 'bantam network group {network} GROUP' opens it to a group, and \
         '--net user' works without"
    )]
    ForRoot {
        /// The network.
        network: String,
    },
    /// This user may not use the network.
    #[error(
        "network '{network}' is for members of the group '{group}'; as root 'usermod -aG {group} {user}' makes you one \
         from your next login on, and '--net user' works without"
    )]
    NotMember {
        /// The network.
        network: String,
        /// The group.
        group: String,
        /// The user.
        user: String,
    },
    /// The process that gives users places has ended.
    #[error(
        "nobody gives places on network '{network}' any more; as root 'bantam network start {network}' repairs it"
    )]
    BrokerMissing {
        /// The network.
        network: String,
    },
    /// The process that gives users places cannot be talked to.
    #[error("cannot get a place on network '{network}': {source}")]
    Broker {
        /// The network.
        network: String,
        /// Why not.
        source: io::Error,
    },
    /// The process that takes places for a machine cannot be talked to.
    #[error(
        "cannot get a place on a network: the process that takes places for the machine does not answer: {source}"
    )]
    Keeper {
        /// Why not.
        source: io::Error,
    },
    /// Something of a network that is started has ended.
    #[error(
        "network '{network}' is not complete any more; as root 'bantam network start {network}' repairs it"
    )]
    Incomplete {
        /// The network.
        network: String,
    },
    /// A user has many places on a network.
    #[error(
        "network '{network}' has {limit} machines of yours, the most that a user can have there; end one"
    )]
    TooManyPlaces {
        /// The network.
        network: String,
        /// How many a user can have.
        limit: usize,
    },
    /// A user asks for something that users may not have.
    #[error("cannot give the machine a place on a network: {reason}")]
    Request {
        /// What it is.
        reason: String,
    },
    /// A process of root has refused a place.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The host has no random numbers.
    #[error("cannot read random numbers of the host: {0}")]
    Random(#[from] getrandom::Error),
}

impl NetworkError {
    /// Returns a function that makes the error of a failed change of interfaces, addresses or routes.
    pub(crate) fn netlink(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
        let action = action.into();
        move |source| match is_denial(&source) {
            true => NetworkError::NotPermitted { action },
            false => NetworkError::Netlink { action, source },
        }
    }

    /// Returns a function that makes the error of a file that cannot be used.
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> NetworkError {
        let path = path.into();
        move |source| match is_denial(&source) {
            true => NetworkError::NotPermitted {
                action: format!("{action} '{}'", path.display()),
            },
            false => NetworkError::File {
                action,
                path,
                source,
            },
        }
    }
}

/// Whether the host has refused something for lack of rights.
fn is_denial(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EPERM | Errno::EACCES))
}
