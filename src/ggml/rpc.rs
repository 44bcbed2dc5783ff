//! Devices of other machines, by ggml's RPC backend, and the server that lends this machine's.
//!
//! ggml's client aborts the process when a connection fails, so [`connect`] first asks the server by itself whether it
//! is there and speaks the protocol. A connection that is lost later ends the process by
//! [`on_fatal_error`](super::logging::on_fatal_error)'s handler; that cannot be undone within a process.

use std::{
    ffi::CString,
    io::{self, Read, Write},
    net::{SocketAddr, SocketAddrV4, TcpStream, ToSocketAddrs},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use ggml_sys as sys;

use super::{Device, Error};

/// How long a server may take to answer at first.
const PATIENCE: Duration = Duration::from_secs(5);

/// The first message to a server, and the first answer: sizes without their lengths.
const HELLO: u8 = 14;
const HELLO_BYTES: usize = 24;
const ANSWER_BYTES: usize = 4 + 24;

/// The servers that are connected, with their devices.
static SERVERS: Mutex<Vec<(String, Vec<Device>)>> = Mutex::new(Vec::new());

/// Connects to a server, `host:port`, and makes its devices known to ggml. They stay known as long as the process lives.
///
/// # Errors
/// When nobody answers there within some seconds, or not in this protocol.
pub fn connect(endpoint: &str) -> Result<Vec<Device>, Error> {
    let failed = |why: String| Error::Remote { endpoint: endpoint.to_owned(), why };
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, devices)) = servers.iter().find(|(known, _)| known == endpoint) {
        return Ok(devices.clone());
    }
    probe(endpoint).map_err(failed)?;
    let name = CString::new(endpoint).map_err(|_| failed("the address has a NUL byte".to_owned()))?;
    // SAFETY: ggml copies the name. It aborts when it cannot connect: the server answered just now.
    let registry = unsafe { sys::ggml_backend_rpc_add_server(name.as_ptr()) };
    if registry.is_null() {
        return Err(failed("it has no devices to lend".to_owned()));
    }
    // SAFETY: a registry that lives as long as the process and is not registered yet; the index is below the count.
    let devices: Vec<Device> = unsafe {
        sys::ggml_backend_register(registry);
        let n = sys::ggml_backend_reg_dev_count(registry);
        (0..n).map(|i| Device::from_raw(sys::ggml_backend_reg_dev_get(registry, i))).collect()
    };
    servers.push((endpoint.to_owned(), devices.clone()));
    Ok(devices)
}

/// The connected servers at whose address nobody listens any more. Waits a little for one: a process that is ending
/// closes its connections one after the other.
pub fn lost() -> Vec<String> {
    // In the handler of a fatal error another thread may hold the list for ever.
    let Ok(servers) = SERVERS.try_lock() else { return Vec::new() };
    let is_lost = |endpoint: &&String| {
        resolve(endpoint).is_ok_and(|address| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err())
    };
    for _ in 0..10 {
        let lost: Vec<String> = servers.iter().map(|(endpoint, _)| endpoint).filter(is_lost).cloned().collect();
        if !lost.is_empty() {
            return lost;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Vec::new()
}

fn resolve(endpoint: &str) -> Result<SocketAddr, String> {
    let addresses = endpoint.to_socket_addrs().map_err(|error| format!("{error} (give HOST:PORT)"))?;
    // ggml's own sockets know no others.
    addresses.into_iter().find(SocketAddr::is_ipv4).ok_or_else(|| "the host has no IPv4 address".to_owned())
}

/// Greets the server as ggml does and reads its version.
fn probe(endpoint: &str) -> Result<(), String> {
    let address = resolve(endpoint)?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).map_err(|error| {
        format!("cannot connect: {error}; is `simlayer-run rpc-server` (or llama.cpp's rpc-server) running there?")
    })?;
    let answer = greet(&mut stream).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "it does not answer: it serves another client (a server serves one at a time), or is no RPC server of ggml"
                .to_owned()
        }
        _ => format!("it ended the connection ({error}): it is no RPC server of ggml, or of another version"),
    })?;
    let (major, minor) = (answer[0], answer[1]);
    let ours = (sys::RPC_PROTO_MAJOR_VERSION, sys::RPC_PROTO_MINOR_VERSION);
    if u32::from(major) != ours.0 || u32::from(minor) > ours.1 {
        return Err(format!("it speaks version {major}.{minor} of ggml's protocol, this build {}.{}", ours.0, ours.1));
    }
    Ok(())
}

fn greet(stream: &mut TcpStream) -> io::Result<[u8; ANSWER_BYTES]> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut hello = vec![HELLO];
    hello.extend((HELLO_BYTES as u64).to_ne_bytes());
    hello.resize(hello.len() + HELLO_BYTES, 0);
    stream.write_all(&hello)?;
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    if u64::from_ne_bytes(length) != ANSWER_BYTES as u64 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an unknown answer"));
    }
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// What a server lends.
#[derive(Debug, Clone)]
pub struct Server {
    pub address: SocketAddrV4,
    /// Threads of devices that have any.
    pub threads: usize,
    pub devices: Vec<Device>,
    /// Bytes that each device gives at most; `None` for all that it has.
    pub memory: Option<usize>,
    /// A folder in which large weights are kept, so that they need not be sent again.
    pub cache: Option<PathBuf>,
}

impl Server {
    /// Serves one client after the other, for ever. The protocol has no authentication: whoever reaches the port can
    /// use the devices, and read and write what is in them.
    ///
    /// # Errors
    /// When it cannot listen at the address. It returns for no other reason.
    pub fn run(self) -> Error {
        let endpoint = self.address.to_string();
        let failed = |why: String| Error::Remote { endpoint: endpoint.clone(), why };
        // ggml says no more than that it failed.
        if let Err(error) = std::net::TcpListener::bind(self.address) {
            return failed(format!("cannot listen: {error}"));
        }
        let cache = match self.cache.as_ref().map(|path| path.to_str().and_then(|path| CString::new(path).ok())) {
            Some(None) => return failed("the cache folder's name is not valid UTF-8".to_owned()),
            cache => cache.flatten(),
        };
        let Ok(name) = CString::new(endpoint.clone()) else { return failed("no address".to_owned()) };
        let limit = |device: &Device| match self.memory {
            // SAFETY: a live device.
            Some(bytes) => unsafe { sys::simlayer_rpc_limited_device(device.raw(), bytes) },
            None => device.raw(),
        };
        let mut devices: Vec<_> = self.devices.iter().map(limit).collect();
        super::memory::map_large_blocks(128 << 10);
        // SAFETY: strings and the list outlive the call, in which the server works.
        unsafe {
            sys::ggml_backend_rpc_start_server(
                name.as_ptr(),
                cache.as_ref().map_or(std::ptr::null(), |cache| cache.as_ptr()),
                self.threads,
                devices.len(),
                devices.as_mut_ptr(),
            );
        }
        failed("the server ended: it cannot listen there, or a device could not be started".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn why(endpoint: &str) -> String {
        connect(endpoint).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_server_is_refused() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        assert!(why(&address).contains("cannot connect"), "{}", why(&address));
        assert!(why("127.0.0.1").contains("HOST:PORT"), "{}", why("127.0.0.1"));
        assert!(why("[::1]:50052").contains("IPv4"), "{}", why("[::1]:50052"));
    }

    /// Another program's server, and one of another version.
    #[test]
    fn other_protocols_are_refused() {
        let mut other = [0u8; 8 + ANSWER_BYTES];
        other[..8].copy_from_slice(&(ANSWER_BYTES as u64).to_ne_bytes());
        other[8] = 99;
        let http = b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec();
        for (answer, expected) in [(http, "no RPC server"), (other.to_vec(), "version 99.0")] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut greeting = [0; 1 + 8 + HELLO_BYTES];
                stream.read_exact(&mut greeting).unwrap();
                stream.write_all(&answer).unwrap();
            });
            let why = why(&address);
            server.join().unwrap();
            assert!(why.contains(expected) && why.contains(&address), "{why}");
        }
    }
}
