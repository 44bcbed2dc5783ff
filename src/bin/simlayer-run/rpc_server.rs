//! Lends this machine's devices to others.

use std::net::{IpAddr, SocketAddrV4, ToSocketAddrs};

use simlayer::ggml::{
    Device,
    logging::{self, LogLevel},
    rpc::Server,
};

use crate::{args::RpcServerArgs, failure::Failure, options::devices_named};

pub fn run(args: RpcServerArgs) -> Result<(), Failure> {
    logging::set_log(LogLevel::Info);
    let address = address(&args.host, args.port)?;
    let devices = match &args.device[..] {
        [] => Some(Device::all_but_processor()).filter(|all| !all.is_empty()).unwrap_or_else(|| vec![Device::cpu()]),
        names => devices_named(names)?,
    };
    let all_cores = || std::thread::available_parallelism().map_or(4, usize::from);
    let memory = match args.mem.map(|mib| mib.checked_mul(1 << 20)) {
        Some(None) => return Err(Failure::usage("--mem: no machine has as much")),
        memory => memory.flatten(),
    };
    eprintln!(
        "The protocol has no authentication and no encryption: whoever reaches {address} can use the devices and read \
         what is in them."
    );
    if !address.ip().is_loopback() {
        eprintln!("WARNING: this address is not of this machine alone; use it in networks that you trust only.");
    }
    let threads = args.threads.unwrap_or_else(all_cores);
    Err(Server { address, threads, devices, memory, cache: args.cache }.run().into())
}

/// ggml listens at IPv4 addresses only.
fn address(host: &str, port: u16) -> Result<SocketAddrV4, Failure> {
    let resolved = (host, port).to_socket_addrs().map_err(|error| Failure::usage(format!("--host {host}: {error}")))?;
    let found = resolved.into_iter().find_map(|address| match address.ip() {
        IpAddr::V4(ip) => Some(SocketAddrV4::new(ip, port)),
        IpAddr::V6(_) => None,
    });
    found.ok_or_else(|| Failure::usage(format!("--host {host}: it has no IPv4 address")))
}
