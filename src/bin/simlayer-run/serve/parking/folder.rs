//! The folder of one server, and the files that are made in it.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::Path,
};

use super::error::{ParkingError, failed};

/// Makes a file that must not be there yet.
pub(super) type Create = fn(&Path) -> io::Result<File>;

/// Conversations are private.
pub(super) fn make_private_folder(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

pub(super) fn create_private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    // Never through a link, nor over what is there.
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

pub(super) fn lock(dir: &Path) -> Result<File, ParkingError> {
    let path = dir.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ParkingError::InUse(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}
