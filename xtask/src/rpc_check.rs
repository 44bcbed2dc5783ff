//! That the tests of logits and lazy layers pass with weights and caches in other processes: on two of this program's own RPC
//! servers, whose memory no pointer of ours reaches.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::prepare::{self, Env};
use crate::sh::{self, step};
use crate::test::build_reference;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Servers that layers are shared out over.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    servers: u8,
    /// Only the tests whose names contain this.
    filter: Option<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    step("packages", || {
        prepare::libclang(&mut env)?;
        prepare::cmake(&mut env)
    })?;
    step("model", prepare::model)?;
    step("reference (unmodified llama.cpp)", || build_reference(&env).map(|_| ()))?;
    // The workspace's features, as in all tests: otherwise all would be compiled twice.
    let tests = ["--release", "--workspace", "--test", "logits", "--test", "lazy"];
    step("tests: build", || {
        sh::run(env.cargo().args(["build", "--release", "--workspace", "--bin", "simlayer-run"]))?;
        sh::run(env.cargo().arg("test").args(tests).arg("--no-run"))
    })?;
    let program = env.target_dir()?.join("release/simlayer-run");
    let servers = (0..args.servers).map(|_| Server::start(&program)).collect::<Result<Vec<_>>>()?;
    let addresses: Vec<&str> = servers.iter().map(|server| server.address.as_str()).collect();
    step("tests", || {
        let mut test = env.cargo();
        test.arg("test").args(tests).arg("--no-fail-fast").arg("--").args(&args.filter);
        test.args(["--test-threads=1", "--nocapture"]);
        sh::run(test.env("SIMLAYER_TEST_RPC", addresses.join(",")))
    })
}

/// A server at a free port of this machine, ended with this value.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(program: &Path) -> Result<Server> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = sh::command(program);
        // Layers of one are computed when those of the other are done.
        let threads = thread::available_parallelism()?.to_string();
        command.args(["rpc-server", "-t", &threads, "-p", &address.port().to_string()]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut server = Server { child: child.with_context(|| sh::shown(&command))?, address: address.to_string() };
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            if server.child.try_wait()?.is_some() || start.elapsed() > Duration::from_secs(30) {
                bail!("`{}` does not listen", sh::shown(&command));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
