//! Mesa's Vulkan drivers, of which one version does not do.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh;

/// Debian's package.
pub const PACKAGE: &str = "mesa-vulkan-drivers";

/// Mesa 22.3, which is Debian 12's, counts references in buffers that are freed already: it seems to do so for all of a
/// descriptor set, those that no shader uses included. See docs/devices.md.
pub fn does(version: &str) -> bool {
    major(version).is_none_or(|major| major > 22)
}

/// The first number of a version: 25 of `25.0.7-2~bpo12+1`.
fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

/// A version that apt knows, and where it is from.
#[derive(Debug, PartialEq)]
struct Known {
    version: String,
    mirror: String,
    suite: String,
}

/// Of what `apt-cache madison` prints: `package | version | mirror suite/component architecture Packages`.
fn known(text: &str) -> Vec<Known> {
    let line = |line: &str| {
        let mut parts = line.split('|').map(str::trim).skip(1);
        let version = parts.next()?.to_owned();
        let mut source = parts.next()?.split_whitespace();
        let (mirror, suite) = (source.next()?.to_owned(), source.next()?.split('/').next()?.to_owned());
        Some(Known { version, mirror, suite })
    };
    text.lines().filter_map(line).collect()
}

/// Installs the drivers: of the suite that apt would take them from where those do, else of its backports, which apt need not
/// know. Nothing is installed that is of no use. `folder` is for the list of sources.
pub fn install(folder: &Path) -> Result<()> {
    sh::run(&mut apt(&[], &["update"]))?;
    let known = known(&sh::output(Command::new("apt-cache").args(["madison", PACKAGE]))?);
    let Some(first) = known.first() else { bail!("apt knows no {PACKAGE}: please install Mesa's Vulkan drivers") };
    if let Some(known) = known.iter().find(|known| does(&known.version)) {
        return sh::run(&mut apt(&[], &["install", "-y", "--no-install-recommends", "-t", &known.suite, PACKAGE]));
    }
    eprintln!("{PACKAGE} {} writes to freed memory; looking for another", first.version);
    // Sources of our own for these commands, so that the system's stay as they are.
    let (mirror, suite) = (&first.mirror, first.suite.trim_end_matches("-security").trim_end_matches("-updates"));
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let list = folder.join("backports.list");
    let backports = format!("{suite}-backports");
    std::fs::write(&list, format!("deb {mirror} {suite} main\ndeb {mirror} {backports} main\n"))
        .with_context(|| list.display().to_string())?;
    let options = [format!("Dir::Etc::sourcelist={}", list.display())];
    sh::run(&mut apt(&options, &["update"]))?;
    let mut madison = Command::new("apt-cache");
    madison.arg("-o").arg(&options[0]).args(["madison", PACKAGE]);
    let found = self::known(&sh::output(&mut madison)?);
    if !found.iter().any(|known| known.suite == backports && does(&known.version)) {
        bail!("{PACKAGE} {} is all that apt has; please install Mesa 23 or later", first.version);
    }
    sh::run(&mut apt(&options, &["install", "-y", "--no-install-recommends", "-t", &backports, PACKAGE]))
}

fn apt(options: &[String], args: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q");
    command.args(options.iter().flat_map(|option| ["-o", option])).args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_versions() {
        assert_eq!(major("22.3.6-1+deb12u2"), Some(22));
        assert_eq!(major("25.0.7-2~bpo12+1"), Some(25));
        assert_eq!(major(""), None);
        assert!(!does("22.3.6-1+deb12u1") && does("25.0.7-2~bpo12+1"));
    }

    #[test]
    fn what_apt_prints_is_read() {
        let text = "mesa-vulkan-drivers | 25.0.7-2~bpo12+1 | http://mirror.example/debian bookworm-backports/main amd64 Packages\n\
                    mesa-vulkan-drivers | 22.3.6-1+deb12u1 | http://mirror.example/debian bookworm/main amd64 Packages\n";
        let found = known(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].version.as_str(), found[1].suite.as_str()), ("22.3.6-1+deb12u1", "bookworm"));
        assert_eq!(
            (found[0].mirror.as_str(), found[0].suite.as_str()),
            ("http://mirror.example/debian", "bookworm-backports")
        );
    }
}
