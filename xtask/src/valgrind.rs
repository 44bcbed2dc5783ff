//! The C programs of ffi/tests under Valgrind. It knows no AVX-512, so that the library is built for any x86-64-v3
//! processor.

use anyhow::Result;

use crate::dist;
use crate::prepare::{self, Env};
use crate::sh::{self, step};

pub fn run() -> Result<()> {
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    prepare::valgrind()?;
    let out = env.target_dir()?.join("dist-portable");
    let dist = step("library", || dist::build(&env, &out, true))?;
    step("C programs under Valgrind", || {
        let mut test = env.cargo();
        test.env("SIMLAYER_DIST", &dist).args(["test", "--release", "-p", "simlayer-ffi", "--test", "c_programs"]);
        sh::run(test.args(["--", "--ignored", "--nocapture", "valgrind"]))
    })
}
