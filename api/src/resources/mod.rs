//! The bodies of requests and answers, field by field as Firecracker names them.
//!
//! A field that is not listed is refused. What a client has put is what it gets back: fields that it left
//! out stay out where they have no default.

mod cpu_config;
mod devices;
mod logger;
mod machine;
mod metrics;
mod mmds;
mod rate_limiter;

pub use cpu_config::{Bitmap, CpuConfig, CpuidLeaf, KvmCapability, Msr, Number, Register};
pub use devices::{
    Balloon, BalloonHinting, BalloonHintingStatus, BalloonStatisticsUpdate, BalloonUpdate,
    CacheType, Drive, DriveUpdate, Entropy, IoEngine, NetworkInterface, NetworkInterfaceUpdate,
    Serial, Vsock,
};
pub use logger::{LogLevel, Logger};
pub use machine::{
    Action, ActionType, BootSource, CpuTemplate, HugePages, InstanceInformation,
    MachineConfiguration, MachineConfigurationUpdate, Version, Vm, VmState,
};
pub use metrics::Metrics;
pub use mmds::{MetadataConfig, MetadataVersion};
pub use rate_limiter::{RateLimiter, TokenBucket};
