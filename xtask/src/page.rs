//! The server's page in a real browser: tests/page/page.mjs holds conversations with the real program, and takes pictures.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::prepare::{self, Env};
use crate::root;
use crate::serving::{Served, Serving};
use crate::sh::{self, on_path};

/// Debian's, Ubuntu's, and the one that it is made from.
const BROWSERS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    served: Served,
    /// A Chromium; default: the one in PATH, which apt-get installs where it is missing.
    #[arg(long)]
    chromium: Option<PathBuf>,
    /// Where the pictures go; docs/ has some of them.
    #[arg(long)]
    pictures: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    let (program, model) = args.served.ready(&mut env)?;
    let chromium = args.chromium.clone().map_or_else(browser, Ok)?;
    let script = script(&env)?;
    let pictures = match &args.pictures {
        Some(folder) => std::path::absolute(folder)?,
        None => env.target_dir()?.join("page"),
    };
    fs::create_dir_all(&pictures)?;
    // Half of the layers are lazy, so that there is something to see.
    let options = ["-c", "4096", "--lazy", "budget:0.5", "--lazy-window", "128", "--parallel", "2"];
    let server = Serving::start(&env, &program, &model, &options, false)?;
    let mut node = env.command("node");
    sh::run(node.arg(script).arg(format!("{}/", server.url)).arg(&pictures).arg(chromium))?;
    println!("the page works; pictures of it are in {}", pictures.display());
    Ok(())
}

fn browser() -> Result<PathBuf> {
    if !BROWSERS.into_iter().any(on_path) {
        prepare::apt_install("chromium").context("please install Chromium, or name one with --chromium")?;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut files = std::env::split_paths(&path).flat_map(|folder| BROWSERS.map(|name| folder.join(name)));
    files.find(|file| file.is_file()).context("there is no Chromium in PATH: name one with --chromium")
}

/// The test beside what it needs, which npm installs.
fn script(env: &Env) -> Result<PathBuf> {
    if !on_path("node") || !on_path("npm") {
        bail!("this needs Node.js 20 or later, and npm (Debian: nodejs and npm)");
    }
    let folder = prepare::tools_dir().join("page");
    fs::create_dir_all(&folder)?;
    for name in ["page.mjs", "package.json"] {
        fs::copy(root().join("tests/page").join(name), folder.join(name))?;
    }
    let mut npm = env.command("npm");
    npm.current_dir(&folder).args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]);
    sh::run(&mut npm)?;
    Ok(folder.join("page.mjs"))
}
