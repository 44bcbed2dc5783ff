//! A model's map from a token's normed input to how much its rows of keys and values will be asked for, as a file.
//!
//! The file is in the format safetensors: some numbers for each element of a layer's input are too many for a profile's text,
//! and any program that knows that format can look at them. Its metadata say which model it is of, as a profile does.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{
    Identity,
    known::{profile_folder, stem},
};

const EXTENSION: &str = "simlayer.safetensors";
const FORMAT: &str = "simlayer-prune";
const VERSION: &str = "1";

/// The largest header that is read: a layer takes some 200 bytes.
const MOST_HEADER: u64 = 16 << 20;

/// From a layer's normed input to the logarithm of how much a row is asked for, for each KV head
/// (after KVzap, arXiv 2601.07891).
#[derive(Debug, Clone, PartialEq)]
pub struct PruneMap {
    pub model: Identity,
    /// Rows whose score is below this were the least asked for in the calibration, of all layers and heads together.
    pub bound: f32,
    /// The share of the calibration's rows that are not below it.
    pub kept: f32,
    /// By the layers' numbers: those whose rows can be pruned.
    pub layers: BTreeMap<usize, LayerMap>,
}

/// One layer's map.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerMap {
    /// For each KV head as many numbers as the input has elements.
    pub weights: Vec<f32>,
    /// For each KV head what is added to the product.
    pub biases: Vec<f32>,
}

/// Why a map cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PruneMapError {
    #[error(
        "no map of {model} to prune by is known: there is no {beside}{}; make one with `simlayer-run calibrate --fit-prune`",
        .folder.as_ref().map_or(String::new(), |folder| format!(", and none of it in {}", folder.display()))
    )]
    NoneKnown { model: String, beside: PathBuf, folder: Option<PathBuf> },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is no map to prune by: {why}")]
    Syntax { path: PathBuf, why: String },
    #[error("{path} is a map of another model: {theirs}, and this one is {here}")]
    OtherModel { path: PathBuf, theirs: String, here: String },
}

impl PruneMap {
    /// The map's place beside its model: `model.gguf` → `model.simlayer.safetensors`.
    pub fn path_beside(model: &Path) -> PathBuf {
        model.with_extension(EXTENSION)
    }

    /// Where the user's map of a model belongs: in the folder of profiles; beside the model where there is none.
    pub fn path_for(model_path: &Path, model: &Identity) -> PathBuf {
        match profile_folder() {
            Some(folder) => folder.join(format!("{}.{EXTENSION}", stem(model))),
            None => PruneMap::path_beside(model_path),
        }
    }

    /// A model's map: the one beside it, else the one in the folder of profiles.
    ///
    /// # Errors
    /// When there is none, or it cannot be read, or is another model's.
    pub fn find(model_path: &Path, model: &Identity) -> Result<PruneMap, PruneMapError> {
        let (beside, users) = (PruneMap::path_beside(model_path), PruneMap::path_for(model_path, model));
        let Some(path) = [&beside, &users].into_iter().find(|path| path.is_file()) else {
            return Err(PruneMapError::NoneKnown {
                model: model.name.clone().unwrap_or_else(|| model_path.display().to_string()),
                beside,
                folder: profile_folder(),
            });
        };
        let map = PruneMap::read(path)?;
        if map.model.is_of(model) {
            return Ok(map);
        }
        let told = |model: &Identity| {
            format!("{}, norms {}", model.name.as_deref().unwrap_or(&model.architecture), model.norms_sha256)
        };
        Err(PruneMapError::OtherModel { path: path.clone(), theirs: told(&map.model), here: told(model) })
    }

    /// # Errors
    /// When the file cannot be read, or is no map.
    pub fn read(path: &Path) -> Result<PruneMap, PruneMapError> {
        let bytes = fs::read(path).map_err(|source| PruneMapError::Io { path: path.to_owned(), source })?;
        parse(&bytes).map_err(|why| PruneMapError::Syntax { path: path.to_owned(), why })
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), PruneMapError> {
        let wrong = |source| PruneMapError::Io { path: path.to_owned(), source };
        let bytes = self.to_bytes().map_err(|error| wrong(io::Error::other(error)))?;
        fs::write(path, bytes).map_err(wrong)
    }

    fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut header = Map::new();
        let metadata = json!({
            "format": FORMAT,
            "version": VERSION,
            "model": serde_json::to_string(&self.model)?,
            "bound": self.bound.to_string(),
            "kept": self.kept.to_string(),
        });
        header.insert("__metadata__".to_owned(), metadata);
        let mut data: Vec<u8> = Vec::new();
        for (index, LayerMap { weights, biases }) in &self.layers {
            let n_heads = biases.len();
            let shapes = [vec![n_heads, weights.len() / n_heads.max(1)], vec![n_heads]];
            for ((part, values), shape) in [("weight", weights), ("bias", biases)].into_iter().zip(shapes) {
                let start = data.len();
                data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                let tensor = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
                header.insert(format!("layers.{index}.{part}"), tensor);
            }
        }
        let mut header = serde_json::to_vec(&Value::Object(header))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok([&(header.len() as u64).to_le_bytes()[..], &header, &data].concat())
    }
}

fn parse(bytes: &[u8]) -> Result<PruneMap, String> {
    let short = || "it ends too early".to_owned();
    let (length, rest) = bytes.split_first_chunk().ok_or_else(short)?;
    let length = Some(u64::from_le_bytes(*length)).filter(|&length| length <= MOST_HEADER).ok_or_else(short)?;
    let (header, data) = rest.split_at_checked(length as usize).ok_or_else(short)?;
    let header: Map<String, Value> = serde_json::from_slice(header).map_err(|error| error.to_string())?;
    let metadata = header.get("__metadata__").ok_or("it has no metadata")?;
    let said = |key: &str| metadata[key].as_str().ok_or_else(|| format!("its metadata do not say {key}"));
    if said("format")? != FORMAT || said("version")? != VERSION {
        return Err(format!("it is of format {} {}, not {FORMAT} {VERSION}", said("format")?, said("version")?));
    }
    let model: Identity = serde_json::from_str(said("model")?).map_err(|error| error.to_string())?;
    let number = |key| said(key)?.parse::<f32>().map_err(|error| format!("{key}: {error}"));
    let (bound, kept) = (number("bound")?, number("kept")?);

    let floats = |name: &str, shape: &[usize]| -> Result<Option<Vec<f32>>, String> {
        let Some(tensor) = header.get(name) else { return Ok(None) };
        let wrong = || format!("{name} is not F32 of shape {shape:?} inside the file");
        if tensor["dtype"] != "F32" || tensor["shape"] != json!(shape) {
            return Err(wrong());
        }
        let offset = |i: usize| tensor["data_offsets"][i].as_u64().and_then(|at| usize::try_from(at).ok());
        let range = offset(0).zip(offset(1)).and_then(|(start, end)| data.get(start..end)).ok_or_else(wrong)?;
        let (values, []) = range.as_chunks::<4>() else { return Err(wrong()) };
        let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
        let is_good = values.len() == shape.iter().product::<usize>() && values.iter().all(|value| value.is_finite());
        if is_good { Ok(Some(values)) } else { Err(wrong()) }
    };
    let mut layers = BTreeMap::new();
    for index in 0..model.n_layer {
        let (weight, bias) = (format!("layers.{index}.weight"), format!("layers.{index}.bias"));
        let n_heads = header.get(&bias).and_then(|bias| bias["shape"][0].as_u64()).unwrap_or(0);
        let n_heads = usize::try_from(n_heads).map_err(|error| error.to_string())?;
        if n_heads > model.n_head.max(model.n_head_kv) {
            return Err(format!("{bias} is of {n_heads} heads"));
        }
        let both = floats(&weight, &[n_heads, model.n_embd])?.zip(floats(&bias, &[n_heads])?);
        if let Some((weights, biases)) = both.filter(|_| n_heads > 0) {
            layers.insert(index, LayerMap { weights, biases });
        }
    }
    if layers.is_empty() {
        return Err("it has no layers".to_owned());
    }
    Ok(PruneMap { model, bound, kept, layers })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> PruneMap {
        let model = Identity {
            name: Some("a model".into()),
            architecture: "llama".into(),
            n_layer: 4,
            n_embd: 3,
            n_head: 4,
            n_head_kv: 2,
            norms_sha256: "ab".repeat(32),
        };
        let layer =
            |at: f32| LayerMap { weights: (0..6).map(|i| at + i as f32 / 7.0).collect(), biases: vec![-at, 0.5] };
        PruneMap { model, bound: -1.625, kept: 0.4, layers: [(0, layer(1.0)), (3, layer(2.0))].into() }
    }

    #[test]
    fn is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = PruneMap::path_beside(&folder.path().join("m.gguf"));
        map().write(&path).unwrap();
        assert_eq!(PruneMap::read(&path).unwrap(), map());
        assert_eq!(PruneMap::find(&folder.path().join("m.gguf"), &map().model).unwrap(), map());
        let other = Identity { norms_sha256: "cd".into(), ..map().model };
        let error = PruneMap::find(&folder.path().join("m.gguf"), &other).unwrap_err().to_string();
        assert!(error.contains("another model"), "{error}");
    }

    #[test]
    fn wrong_files_say_what_is_wrong() {
        let good = map().to_bytes().unwrap();
        for end in [0, 4, 8, 40, good.len() - 1] {
            parse(&good[..end]).unwrap_err();
        }
        let with = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let text: Vec<u8> = good.clone();
            let at = text.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
            let mut text = text;
            text[at..at + to.len()].copy_from_slice(to.as_bytes());
            parse(&text).unwrap_err()
        };
        assert!(with("\"version\":\"1\"", "\"version\":\"9\"").contains("not simlayer-prune 1"));
        assert!(with("\"F32\"", "\"I32\"").contains("layers.0.weight is not F32"));
        assert!(with("[2,3]", "[2,4]").contains("of shape [2, 3]"));
        let mut nan = good.clone();
        let n = nan.len();
        nan[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(parse(&nan).unwrap_err().contains("layers.3.bias"));
    }
}
