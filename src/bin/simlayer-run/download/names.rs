//! Which of a repository's files is the model, as llama.cpp's `-hf` chooses it. Names only.

/// What a repository without the asked-for name is looked through for, one after the other.
const USUAL: [&str; 2] = ["q4_k_m", "q8_0"];
/// Parts of the names of files that are no model by themselves.
const BESIDE_MODELS: [&str; 6] = ["mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"];

/// The model of this quantisation; without one the usual ones, or else the first. Of a split model the first file.
pub fn choose<'a>(names: &[&'a str], quant: Option<&str>) -> Option<&'a str> {
    let begins = |name: &&&str| is_model(name) && split(name).is_none_or(|split| split.index == 1);
    let first = |tag: &str| names.iter().filter(begins).find(|name| has_tag(name, tag)).copied();
    match quant {
        Some(quant) => first(quant),
        None => USUAL.into_iter().find_map(first).or_else(|| names.iter().find(begins).copied()),
    }
}

/// All files of the model that this one belongs to, itself included.
pub fn parts(name: &str) -> Vec<String> {
    match split(name) {
        None => vec![name.to_owned()],
        Some(Split { prefix, count, .. }) => {
            (1..=count).map(|index| format!("{prefix}-{index:05}-of-{count:05}.gguf")).collect()
        }
    }
}

/// Whether a file's name is that of a GGUF file with a model.
pub fn is_model(path: &str) -> bool {
    let name = file_name(path);
    name.ends_with(".gguf") && !BESIDE_MODELS.iter().any(|part| name.contains(part))
}

/// Whether it is what reads pictures or sounds for a model.
pub fn is_projector(path: &str) -> bool {
    path.ends_with(".gguf") && file_name(path).contains("mmproj")
}

/// What follows the last slash.
pub fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// As in `model-Q4_K_M.gguf` and `model-q4_k_m-00001-of-00002.gguf`.
fn has_tag(path: &str, tag: &str) -> bool {
    let (path, tag) = (path.to_ascii_lowercase(), tag.to_ascii_lowercase());
    path.match_indices(&tag).any(|(at, _)| path[at + tag.len()..].starts_with(['.', '-']))
}

struct Split<'a> {
    prefix: &'a str,
    index: usize,
    count: usize,
}

/// What `-00001-of-00002.gguf` says. Files beyond any number that is in use are one file with a strange name.
fn split(name: &str) -> Option<Split<'_>> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, index) = rest.rsplit_once('-')?;
    let number = |digits: &str| digits.parse().ok().filter(|_| digits.len() == 5);
    let (index, count) = (number(index)?, number(count)?);
    (1..=count).contains(&index).then_some(Split { prefix, index, count })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [&str; 8] = [
        "README.md",
        "imatrix.gguf",
        "mmproj-model-f16.gguf",
        "model-BF16/model-BF16-00002-of-00002.gguf",
        "model-BF16/model-BF16-00001-of-00002.gguf",
        "model-Q3_K_L.gguf",
        "model-Q4_K_M.gguf",
        "model-q8_0.gguf",
    ];

    #[test]
    fn models_are_chosen_as_llama_cpp_does() {
        assert_eq!(choose(&FILES, None), Some("model-Q4_K_M.gguf"));
        assert_eq!(choose(&FILES[..5], None), Some("model-BF16/model-BF16-00001-of-00002.gguf"));
        assert_eq!(choose(&[FILES[5], FILES[7]], None), Some("model-q8_0.gguf"));
        assert_eq!(choose(&FILES, Some("q3_k_l")), Some("model-Q3_K_L.gguf"));
        assert_eq!(choose(&FILES, Some("Q8_0")), Some("model-q8_0.gguf"));
        assert_eq!(choose(&FILES, Some("bf16")), Some("model-BF16/model-BF16-00001-of-00002.gguf"));
        // Not what only begins so, nor what is none.
        assert_eq!(choose(&FILES, Some("Q4")), None);
        assert_eq!(choose(&FILES, Some("f16")), Some("model-BF16/model-BF16-00001-of-00002.gguf"));
        assert_eq!(choose(&FILES[..3], None), None);
    }

    #[test]
    fn split_models_have_all_parts() {
        assert_eq!(parts("a/m-00002-of-00003.gguf"), [1, 2, 3].map(|i| format!("a/m-0000{i}-of-00003.gguf")));
        for whole in ["m.gguf", "m-1-of-2.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf"] {
            assert_eq!(parts(whole), [whole]);
        }
    }
}
