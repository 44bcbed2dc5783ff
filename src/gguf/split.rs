//! The naming of split models: `<prefix>-00002-of-00004.gguf`, counted from 1 in the name and from 0 in the file.

use std::path::{Path, PathBuf};

/// The end of the name of part `index` (from 0) of `count`.
fn suffix(index: u16, count: u16) -> String {
    format!("-{:05}-of-{count:05}.gguf", u32::from(index) + 1)
}

/// The path of part `index`, given the path of part 0; `None` when that one is not named as a split's first part.
pub(super) fn part(first: &Path, index: u16, count: u16) -> Option<PathBuf> {
    let prefix = first.file_name()?.to_str()?.strip_suffix(&suffix(0, count))?;
    Some(first.with_file_name(format!("{prefix}{}", suffix(index, count))))
}

/// The name of part 0, given the path of part `index`.
pub(super) fn first(path: &Path, index: u16, count: u16) -> Option<String> {
    let prefix = path.file_name()?.to_str()?.strip_suffix(&suffix(index, count))?;
    Some(format!("{prefix}{}", suffix(0, count)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let path = Path::new("/models/a.b-00001-of-00012.gguf");
        assert_eq!(part(path, 11, 12), Some("/models/a.b-00012-of-00012.gguf".into()));
        assert_eq!(part(path, 1, 13), None);
        assert_eq!(part(Path::new("a.gguf"), 1, 2), None);
        assert_eq!(part(Path::new("/"), 1, 2), None);
        assert_eq!(first(Path::new("x-00003-of-00012.gguf"), 2, 12).as_deref(), Some("x-00001-of-00012.gguf"));
        assert_eq!(first(Path::new("x-00003-of-00012.gguf"), 1, 12), None);
    }
}
