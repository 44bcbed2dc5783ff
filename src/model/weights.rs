//! From the tensors that an architecture asks for to memory on the layers' devices.

use std::collections::{HashMap, HashSet};

use super::{Error, ModelParams, Placement, Progress};
use crate::{
    ggml::{self, BufferType, Context, Device, Tensor, Type},
    gguf::{Gguf, TensorInfo},
};

/// Where a tensor's data will be.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    /// In the mapped file, by its number.
    Map(usize),
    /// Copied (and repacked) into memory of this kind.
    Memory(BufferType),
}

/// Where one tensor of a model is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TensorPlace {
    pub name: String,
    pub ty: Type,
    pub bytes: usize,
    pub device: Device,
    /// The kind of memory there, as ggml names it (`CPU_REPACK`, `CUDA0`); `file` where it is read from the mapped file.
    pub memory: String,
    /// Whether a [`TensorOverride`](super::TensorOverride) says so.
    pub overridden: bool,
}

/// The tensors that go to one place, and the context that holds them.
type Placed<'a> = (Place, Context, Vec<(Tensor, &'a TensorInfo)>);

/// Finds a model's tensors in its file, checks them, and gives them memory.
///
/// An architecture asks for each tensor by name and shape and gets a handle; [`Loader::finish`] then places the data,
/// so that a file with a wrong tensor fails before anything large is allocated.
pub(crate) struct Loader<'a> {
    file: &'a Gguf,
    placement: Placement,
    repacking: Vec<BufferType>,
    /// Whether weights are repacked that our own kernels multiply as they are.
    ggml_kernels: bool,
    contexts: Vec<Placed<'a>>,
    asked: HashSet<&'a str>,
    /// The tensors, by name. Of a tied embedding the table.
    tensors: HashMap<String, Tensor>,
    /// Whether a kind of memory can multiply a type and shape: asking ggml allocates, and layers are alike.
    answers: HashMap<(Place, Type, Vec<usize>), bool>,
    /// Beginnings of the names of tensors that are not run.
    ignored: Vec<String>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(file: &'a Gguf, params: &ModelParams, placement: Placement) -> Self {
        let repacking = if params.repack { Device::cpu().repacking_buffer_types() } else { Vec::new() };
        Loader {
            file,
            placement,
            repacking,
            ggml_kernels: params.ggml_kernels,
            contexts: Vec::new(),
            asked: HashSet::new(),
            tensors: HashMap::new(),
            answers: HashMap::new(),
            ignored: Vec::new(),
        }
    }

    /// A matrix that hidden states are multiplied by, `[input width, output width]`.
    pub fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Tensor, Error> {
        let info = self.require(name, &shape)?;
        self.check_weight_type(info)?;
        Ok(self.multiplied(info, &shape))
    }

    /// A matrix of each expert, `[input width, output width, experts]`.
    pub fn experts(&mut self, name: &str, shape: [usize; 3]) -> Result<Tensor, Error> {
        let info = self.require(name, &shape)?;
        self.check_weight_type(info)?;
        Ok(self.multiplied(info, &shape))
    }

    /// A matrix of each head, `[input width, output width, heads]`: all are multiplied at once, each by an input of its own.
    pub fn matrices(&mut self, name: &str, shape: [usize; 3]) -> Result<Tensor, Error> {
        let info = self.require(name, &shape)?;
        self.check_weight_type(info)?;
        let device = self.placement.tensor(&info.name);
        if device != Device::cpu() && self.can_multiply(device, device.buffer_type(), info.ty, &shape[..2]) {
            return Ok(self.add(Place::Memory(device.buffer_type()), info));
        }
        // What is repacked is multiplied one by one.
        Ok(self.add(Loader::unpacked(Device::cpu(), info), info))
    }

    /// A bias of each expert, `[width, experts]`, f32.
    pub fn optional_expert_biases(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Tensor>, Error> {
        self.has(name).then(|| self.floats(name, &shape)).transpose()
    }

    /// Whether the file has this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// Tensors whose names begin so may be in the file without being asked for: parts that are not run.
    pub fn ignore(&mut self, prefix: String) {
        self.ignored.push(prefix);
    }

    /// The embedding table, `[n_embd, n_vocab]`: rows are looked up by token.
    pub fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Tensor, Error> {
        self.stored(name, &shape)
    }

    /// Matrices with the processor, in the file's own layout, so that parts of them can be taken.
    pub fn stored(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        let info = self.require(name, shape)?;
        self.check_weight_type(info)?;
        // Looked up by the processor, wherever the layers are.
        Ok(self.add(Loader::unpacked(Device::cpu(), info), info))
    }

    /// A norm's weights, a bias, or frequency factors: one row of f32.
    pub fn vector(&mut self, name: &str, n: usize) -> Result<Tensor, Error> {
        self.floats(name, &[n])
    }

    /// Several rows of f32, `[width, rows]`.
    pub fn rows(&mut self, name: &str, shape: [usize; 2]) -> Result<Tensor, Error> {
        self.floats(name, &shape)
    }

    fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        let info = self.require(name, shape)?;
        if info.ty != Type::F32 {
            return Err(self.wrong(info, format!("has type {}, expected f32", info.ty)));
        }
        let device = self.placement.tensor(&info.name);
        Ok(self.add(Loader::unpacked(device, info), info))
    }

    /// As [`Loader::vector`], for one that the file may lack.
    pub fn optional_vector(&mut self, name: &str, n: usize) -> Result<Option<Tensor>, Error> {
        self.has(name).then(|| self.vector(name, n)).transpose()
    }

    fn require(&mut self, name: &str, shape: &[usize]) -> Result<&'a TensorInfo, Error> {
        let file = self.file;
        let Some(info) = file.tensor(name) else {
            return Err(Error::MissingTensor { path: file.path().to_owned(), tensor: name.to_owned() });
        };
        let found = info.shape.map(|n| n as usize);
        let expected = [0, 1, 2, 3].map(|i| shape.get(i).copied().unwrap_or(1));
        if found != expected {
            let found = &found[..info.n_dims.clamp(1, 4)];
            return Err(self.wrong(info, format!("has shape {found:?}, expected {shape:?}")));
        }
        self.asked.insert(&info.name);
        Ok(info)
    }

    fn check_weight_type(&self, info: &TensorInfo) -> Result<(), Error> {
        if info.ty.is_weight_type() {
            Ok(())
        } else {
            Err(self.wrong(info, format!("type {} cannot be multiplied", info.ty)))
        }
    }

    fn wrong(&self, info: &TensorInfo, why: String) -> Error {
        Error::Tensor { path: self.file.path().to_owned(), tensor: info.name.clone(), why }
    }

    /// On the layer's device where that has kernels for this weight. With the processor: in the first kind of repacking
    /// memory that has kernels for it, else, and where our own kernels want it so, in the file.
    fn multiplied(&mut self, info: &'a TensorInfo, shape: &[usize]) -> Tensor {
        // As a matrix the embedding serves for the output.
        let is_output = info.name == "token_embd.weight";
        let device = match self.placement.overridden(&info.name) {
            Some(device) => device,
            None if is_output => self.placement.output(),
            None => self.placement.tensor(&info.name),
        };
        if device != Device::cpu() && self.can_multiply(device, device.buffer_type(), info.ty, shape) {
            return self.add(Place::Memory(device.buffer_type()), info);
        }
        let device = Device::cpu();
        if !self.ggml_kernels && ggml::multiplies_as_stored(info.ty, shape[0]) {
            return self.add(Loader::unpacked(device, info), info);
        }
        for memory in self.repacking.clone() {
            if self.can_multiply(device, memory, info.ty, shape) {
                return self.add(Place::Memory(memory), info);
            }
        }
        self.add(Loader::unpacked(device, info), info)
    }

    fn can_multiply(&mut self, device: Device, memory: BufferType, ty: Type, shape: &[usize]) -> bool {
        let answer = self.answers.entry((Place::Memory(memory), ty, shape.to_vec()));
        *answer.or_insert_with(|| device.can_multiply(memory, ty, shape))
    }

    /// In the file when its data is aligned as ggml's kernels want it, else copied; copied to another device.
    fn unpacked(device: Device, info: &TensorInfo) -> Place {
        if device.buffer_type().is_host() && info.offset.is_multiple_of(32) {
            Place::Map(info.file)
        } else {
            Place::Memory(device.buffer_type())
        }
    }

    fn add(&mut self, place: Place, info: &'a TensorInfo) -> Tensor {
        let index = match self.contexts.iter().position(|(other, ..)| *other == place) {
            Some(index) => index,
            None => {
                // A tied embedding is asked for twice, hence twice the file's tensors.
                self.contexts.push((place, Context::new(2 * self.file.tensors().len()), Vec::new()));
                self.contexts.len() - 1
            }
        };
        let (_, context, tensors) = &mut self.contexts[index];
        let shape = info.shape.map(|n| n as usize);
        let tensor = context.tensor(info.ty, &shape[..info.n_dims.clamp(1, 4)]).named(&info.name);
        tensors.push((tensor.clone(), info));
        self.tensors.entry(info.name.clone()).or_insert_with(|| tensor.clone());
        tensor
    }

    /// Where each tensor that was asked for is, in the file's order. A tied embedding may be in two places.
    pub(super) fn places(&self) -> Vec<TensorPlace> {
        let devices = self.placement.devices();
        let mut places: Vec<(usize, usize, TensorPlace)> = Vec::new();
        for (place, _, tensors) in &self.contexts {
            let (device, memory) = match *place {
                Place::Map(_) => (Device::cpu(), "file".to_owned()),
                Place::Memory(memory) => {
                    let device = devices.iter().copied().find(|device| device.buffer_type() == memory);
                    (device.unwrap_or_else(Device::cpu), memory.name())
                }
            };
            places.extend(tensors.iter().map(|(_, info)| {
                let overridden = self.placement.overridden(&info.name) == Some(device);
                let (name, ty, bytes) = (info.name.clone(), info.ty, info.n_bytes);
                (info.file, info.offset, TensorPlace { name, ty, bytes, device, memory: memory.clone(), overridden })
            }));
        }
        places.sort_by_key(|&(file, offset, _)| (file, offset));
        places.into_iter().map(|(.., place)| place).collect()
    }

    /// Gives every tensor its data and returns them by name, with their bytes. A tensor that nobody asked for is an error:
    /// the model would not be the one that the file's author meant.
    pub(super) fn finish(self, progress: Option<&Progress>) -> Result<(HashMap<String, Tensor>, usize), Error> {
        let path = self.file.path();
        let unknown = |info: &&TensorInfo| {
            !self.asked.contains(&*info.name) && !self.ignored.iter().any(|prefix| info.name.starts_with(prefix))
        };
        if let Some(info) = self.file.tensors().iter().find(unknown) {
            return Err(Error::UnknownTensor { path: path.to_owned(), tensor: info.name.clone() });
        }
        let failed = |source| Error::Ggml { path: path.to_owned(), source };
        let total: usize = self.contexts.iter().flat_map(|(_, _, tensors)| tensors).map(|(_, info)| info.n_bytes).sum();
        let mut loaded = 0;
        // False: the caller wants no more.
        let mut tell = |n_bytes: usize| {
            loaded += n_bytes;
            match progress {
                Some(progress) if !progress.0(loaded as f32 / total.max(1) as f32) => {
                    Err(Error::Cancelled { path: path.to_owned() })
                }
                _ => Ok(()),
            }
        };
        tell(0)?;
        let mut bytes = 0;
        for (place, context, tensors) in &self.contexts {
            bytes += tensors.iter().map(|(_, info)| info.n_bytes).sum::<usize>();
            match *place {
                Place::Map(index) => {
                    let places: Vec<_> = tensors.iter().map(|(tensor, info)| (tensor, info.offset)).collect();
                    context.place_in_map(Device::cpu(), &self.file.maps()[index], &places).map_err(failed)?;
                    tell(tensors.iter().map(|(_, info)| info.n_bytes).sum())?;
                }
                Place::Memory(memory) => {
                    context.alloc(memory, "weights").map_err(failed)?;
                    for (tensor, info) in tensors {
                        tensor.write(0, self.file.data(info));
                        tell(info.n_bytes)?;
                    }
                }
            }
            context.set_usage_weights();
        }
        self.release_unused_pages();
        Ok((self.tensors, bytes))
    }

    /// The header, and tensors that were copied, need not stay in memory.
    fn release_unused_pages(&self) {
        for (index, map) in self.file.maps().iter().enumerate() {
            let placed = self.contexts.iter().filter(|(place, ..)| *place == Place::Map(index));
            let mut used: Vec<_> =
                placed.flat_map(|(.., tensors)| tensors).map(|(_, info)| (info.offset, info.n_bytes)).collect();
            used.sort_unstable();
            used.push((map.len(), 0));
            let mut end = 0;
            for (offset, n_bytes) in used {
                if offset > end {
                    ggml::release_pages(map, end..offset);
                }
                end = end.max(offset + n_bytes);
            }
        }
    }
}
