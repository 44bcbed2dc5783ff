//! Sequences as bytes, so that a conversation can go on in another process.
//!
//! A state is little-endian: a header (magic, version, length, the model's sizes), the layers' data, and a checksum of
//! all of it. Everything is checked before anything is changed: the checksum first, then each length and each setting
//! against the model and the session.

use std::io::{self, Write};

use xxhash_rust::xxh3::Xxh3Default;

use super::{
    Error,
    sequence::{LayerCache, Sequence},
    session::{SeqId, Session},
};
use crate::{
    cache::{Format, Span, Store},
    ggml::Type,
};

const MAGIC: [u8; 8] = *b"SIMLAYER";
const VERSION: u32 = 1;
/// Magic, version, length.
const HEADER_BYTES: usize = 8 + 4 + 8;
const CHECKSUM_BYTES: usize = 8;

/// Why a saved state was refused. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    #[error("the state is damaged: {0}; save it again")]
    Damaged(&'static str),
    #[error("the state is of version {0}, this library reads version {VERSION}: save it again")]
    Version(u32),
    #[error("the state does not fit here: {0}")]
    Mismatch(String),
    #[error(transparent)]
    Engine(#[from] Error),
    #[error("the state cannot be written: {0}")]
    Io(#[from] io::Error),
}

fn mismatch(what: impl Into<String>) -> StateError {
    StateError::Mismatch(what.into())
}

/// Counts and hashes what goes through it.
struct Writer<'a> {
    to: &'a mut dyn Write,
    hash: Xxh3Default,
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.to.write_all(bytes)
    }

    fn u8(&mut self, value: u8) -> io::Result<()> {
        self.bytes(&[value])
    }

    fn u32(&mut self, value: u32) -> io::Result<()> {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(&mut self, value: usize) -> io::Result<()> {
        self.bytes(&(value as u64).to_le_bytes())
    }
}

/// Reads within a slice; whatever lies beyond its end is an error.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], StateError> {
        let (bytes, rest) = self.rest.split_at_checked(n).ok_or(StateError::Damaged("it ends too early"))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        self.bytes(N)?.try_into().map_err(|_| StateError::Damaged("it ends too early"))
    }

    fn u8(&mut self) -> Result<u8, StateError> {
        Ok(self.array::<1>()?[0])
    }

    fn flag(&mut self) -> Result<bool, StateError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(StateError::Damaged("a flag is neither 0 nor 1")),
        }
    }

    fn u32(&mut self) -> Result<u32, StateError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn size(&mut self) -> Result<usize, StateError> {
        let value = u64::from_le_bytes(self.array()?);
        usize::try_from(value).map_err(|_| StateError::Damaged("a number is too large"))
    }
}

/// One layer as it is written before its rows.
struct LayerHeader {
    lazy: bool,
    score: Option<f32>,
    span: Option<Span>,
    format: Format,
    rows: usize,
    /// What the layer's exact store keeps, where it has one.
    exact: Option<Span>,
}

impl LayerHeader {
    fn of(layer: &LayerCache, n_past: usize) -> LayerHeader {
        let format = layer.store.as_ref().map_or(layer.format, |store| store.format);
        let rows = if layer.store.is_some() { layer.used_rows(n_past) } else { 0 };
        let exact = layer.exact.as_ref().map(|exact| exact.span);
        LayerHeader { lazy: layer.lazy, score: layer.score, span: layer.span, format, rows, exact }
    }

    const BYTES: usize = 1 + 1 + 4 + SPAN_BYTES + 4 + 4 + 1 + 1 + 8 + SPAN_BYTES;

    fn write(&self, to: &mut Writer<'_>) -> io::Result<()> {
        to.u8(u8::from(self.lazy))?;
        to.u8(u8::from(self.score.is_some()))?;
        to.u32(self.score.unwrap_or(0.0).to_bits())?;
        write_span(to, self.span)?;
        to.u32(self.format.k.raw())?;
        to.u32(self.format.v.raw())?;
        to.u8(u8::from(self.format.rotate_k))?;
        to.u8(u8::from(self.format.rotate_v))?;
        to.u64(self.rows)?;
        write_span(to, self.exact)
    }

    fn read(from: &mut Reader<'_>) -> Result<LayerHeader, StateError> {
        let lazy = from.flag()?;
        let has_score = from.flag()?;
        let score = f32::from_bits(from.u32()?);
        let score = has_score.then_some(score);
        let span = read_span(from)?;
        let mut ty = || {
            let ty = Type::from_raw(from.u32()?).filter(|ty| Type::CACHE.contains(ty));
            ty.ok_or(StateError::Damaged("a type is no cache type"))
        };
        let (k, v) = (ty()?, ty()?);
        let format = Format { k, v, rotate_k: from.flag()?, rotate_v: from.flag()? };
        Ok(LayerHeader { lazy, score, span, format, rows: from.size()?, exact: read_span(from)? })
    }
}

const SPAN_BYTES: usize = 1 + 8 + 8;

fn write_span(to: &mut Writer<'_>, span: Option<Span>) -> io::Result<()> {
    to.u8(u8::from(span.is_some()))?;
    let span = span.unwrap_or(Span { n_sink: 0, n_window: 0 });
    to.u64(span.n_sink)?;
    to.u64(span.n_window)
}

fn read_span(from: &mut Reader<'_>) -> Result<Option<Span>, StateError> {
    let is_there = from.flag()?;
    let span = Span { n_sink: from.size()?, n_window: from.size()? };
    Ok(is_there.then_some(span))
}

impl Session {
    /// Bytes that [`Session::save_seq`] writes.
    pub fn seq_state_bytes(&self, seq: SeqId) -> usize {
        HEADER_BYTES + self.body_bytes(seq) + CHECKSUM_BYTES
    }

    fn body_bytes(&self, seq: SeqId) -> usize {
        let sizes = 4 + self.model.hparams().architecture.len() + 4 * 4;
        let sizes = sizes + 8 + 8 + 1;
        let Some(sequence) = self.sequences.get(&seq) else { return sizes };
        let layer = |layer: &LayerCache| {
            let header = LayerHeader::of(layer, sequence.n_past);
            let exact_rows = header.exact.map_or(0, Span::n_rows);
            LayerHeader::BYTES
                + header.rows * self.row_bytes(header.format)
                + exact_rows * self.row_bytes(header.format.exact())
        };
        sizes + sequence.layers.iter().map(layer).sum::<usize>()
    }

    /// Bytes of a token's key and value in one layer.
    fn row_bytes(&self, format: Format) -> usize {
        format.k.row_bytes(self.width) + format.v.row_bytes(self.width)
    }

    /// Writes a sequence: its tokens' keys and values as they are, lazy layers with what they hold, and the scores.
    /// The tokens themselves and the logits are not part of it.
    ///
    /// # Errors
    /// When `to` cannot be written.
    pub fn save_seq(&self, seq: SeqId, to: &mut dyn Write) -> io::Result<()> {
        let hparams = self.model.hparams();
        let mut to = Writer { to, hash: Xxh3Default::new() };
        to.bytes(&MAGIC)?;
        to.u32(VERSION)?;
        to.u64(self.seq_state_bytes(seq))?;

        to.u32(hparams.architecture.len() as u32)?;
        to.bytes(hparams.architecture.as_bytes())?;
        for size in [hparams.n_layer, hparams.n_embd, self.width, hparams.head_size] {
            to.u32(size as u32)?;
        }
        let sequence = self.sequences.get(&seq);
        to.u64(sequence.map_or(0, |sequence| sequence.n_past))?;
        to.u64(sequence.map_or(0, |sequence| sequence.exact_from))?;
        to.u8(u8::from(sequence.is_some_and(|sequence| sequence.score_next)))?;
        let mut buffer = Vec::new();
        for (layer, n_past) in sequence.iter().flat_map(|sequence| sequence.layers.iter().map(|l| (l, sequence.n_past)))
        {
            let header = LayerHeader::of(layer, n_past);
            header.write(&mut to)?;
            let exact = layer.exact.as_ref().map(|exact| (&exact.store, exact.span.n_rows()));
            for (store, n_rows) in layer.store.iter().map(|store| (store, header.rows)).chain(exact) {
                for rows in [&store.k, &store.v] {
                    buffer.resize(n_rows * rows.ty().row_bytes(self.width), 0u8);
                    rows.read(0, &mut buffer);
                    to.bytes(&buffer)?;
                }
            }
        }
        let checksum = to.hash.digest();
        to.to.write_all(&checksum.to_le_bytes())
    }

    /// Bytes of the state at the beginning of `from`, as its header says.
    ///
    /// # Errors
    /// When it does not begin with a header, or `from` is shorter than the header says.
    pub fn state_length(from: &[u8]) -> Result<usize, StateError> {
        let mut reader = Reader { rest: from };
        if reader.array()? != MAGIC {
            return Err(StateError::Damaged("it does not begin as a state of simlayer does"));
        }
        match reader.u32()? {
            VERSION => {}
            other => return Err(StateError::Version(other)),
        }
        let length = reader.size()?;
        if length < HEADER_BYTES + CHECKSUM_BYTES || length > from.len() {
            return Err(StateError::Damaged("its length is not the one that its header gives"));
        }
        Ok(length)
    }

    /// Reads what [`Session::save_seq`] wrote into sequence `seq`, whose old tokens are gone then. Returns the bytes
    /// that the state took; there may be others behind it.
    ///
    /// # Errors
    /// When the state is damaged, of another model or of other cache types, does not fit the context, or memory runs
    /// out. Nothing is changed then.
    pub fn load_seq(&mut self, seq: SeqId, from: &[u8]) -> Result<usize, StateError> {
        let (sequence, length) = self.read_seq(from)?;
        self.put_seq(seq, sequence);
        Ok(length)
    }

    /// Reads several sequences, as [`Session::load_seq`] does; all sequences that there were are gone then.
    ///
    /// # Errors
    /// As [`Session::load_seq`].
    pub fn load_seqs(&mut self, states: &[(SeqId, &[u8])]) -> Result<(), StateError> {
        let mut sequences = Vec::new();
        for &(seq, from) in states {
            sequences.push((seq, self.read_seq(from)?.0));
        }
        self.clear();
        for (seq, sequence) in sequences {
            self.put_seq(seq, sequence);
        }
        Ok(())
    }

    fn put_seq(&mut self, seq: SeqId, sequence: Option<Sequence>) {
        self.seq_clear(seq);
        self.sequences.extend(sequence.map(|sequence| (seq, sequence)));
    }

    /// The sequence in a state, `None` for an empty one, and the state's length.
    fn read_seq(&mut self, from: &[u8]) -> Result<(Option<Sequence>, usize), StateError> {
        let length = Session::state_length(from)?;
        let (checked, checksum) = from[..length].split_at(length - CHECKSUM_BYTES);
        let mut hash = Xxh3Default::new();
        hash.update(checked);
        if hash.digest().to_le_bytes() != checksum {
            return Err(StateError::Damaged("its checksum is wrong"));
        }
        let mut reader = Reader { rest: &checked[HEADER_BYTES..] };

        let hparams = self.model.hparams();
        let n = reader.u32()? as usize;
        let architecture = reader.bytes(n)?;
        if architecture != hparams.architecture.as_bytes() {
            return Err(mismatch("it is of a model of another architecture"));
        }
        for (name, size) in [
            ("layers", hparams.n_layer),
            ("embedding length", hparams.n_embd),
            ("width of keys", self.width),
            ("head size", hparams.head_size),
        ] {
            let found = reader.u32()? as usize;
            if found != size {
                return Err(mismatch(format!("its model has {found} for the {name}, this one {size}")));
            }
        }
        let n_past = reader.size()?;
        if n_past > self.params.n_ctx {
            return Err(mismatch(format!("it holds {n_past} tokens, the context {}", self.params.n_ctx)));
        }
        let exact_from = reader.size()?.min(n_past);
        let score_next = reader.flag()?;
        if n_past == 0 {
            return if reader.rest.is_empty() { Ok((None, length)) } else { Err(TOO_LONG) };
        }
        let mut sequence = Sequence { n_past, score_next, exact_from, ..self.new_sequence() };
        for (index, layer) in sequence.layers.iter_mut().enumerate() {
            *layer = self.read_layer_state(&mut reader, index, n_past)?;
        }
        if !reader.rest.is_empty() {
            return Err(TOO_LONG);
        }
        Ok((Some(sequence), length))
    }

    fn read_layer_state(&self, reader: &mut Reader<'_>, index: usize, n_past: usize) -> Result<LayerCache, StateError> {
        let LayerHeader { lazy, score, span, format, rows, exact } = LayerHeader::read(reader)?;
        let by_design = self.model.hparams().windows[index].map(|n_window| Span { n_sink: 0, n_window });
        match (lazy, span) {
            (true, Some(Span { n_sink, n_window }))
                if by_design.is_none() && n_window > 0 && n_sink.max(n_window) <= i32::MAX as usize => {}
            (false, span) if span == by_design => {}
            _ => return Err(mismatch("what a layer keeps is not what this model's layers can keep")),
        }
        let types_fit =
            [format.k, format.v].iter().all(|ty| self.model.hparams().head_size.is_multiple_of(ty.block_size()));
        if !types_fit || (!self.params.flash_attn && format.v.is_quantized()) {
            return Err(mismatch("a layer's cache types cannot be used here"));
        }
        if !lazy && format != self.active_format {
            let (found, here) = (format, self.active_format);
            return Err(mismatch(format!(
                "its keys and values are {}/{}, the context's {}/{} (or are rotated otherwise)",
                found.k, found.v, here.k, here.v
            )));
        }
        let mut layer = LayerCache::new(span, lazy, format);
        layer.score = score;
        if rows != layer.used_rows(n_past) {
            return Err(StateError::Damaged("a layer has another number of rows than tokens"));
        }
        if exact != self.makers[index].exact_span_for(format) {
            return Err(mismatch("another number of newest tokens is kept in f16 beside a quantised cache"));
        }
        // Asked before memory is: a length that lies must not allocate.
        let exact_rows = exact.map_or(0, Span::n_rows);
        let bytes = rows.checked_mul(self.row_bytes(format));
        let bytes = bytes.and_then(|bytes| bytes.checked_add(exact_rows * self.row_bytes(format.exact())));
        if bytes.is_none_or(|bytes| bytes > reader.rest.len()) {
            return Err(StateError::Damaged("it ends too early"));
        }
        let store = self.makers[index].make(rows, span, format)?;
        self.fill(&store, rows, reader)?;
        layer.store = Some(store);
        layer.exact = self.makers[index].make_exact(format)?;
        if let Some(exact) = &layer.exact {
            self.fill(&exact.store, exact_rows, reader)?;
        }
        Ok(layer)
    }

    /// Reads a store's first rows.
    fn fill(&self, store: &Store, n_rows: usize, reader: &mut Reader<'_>) -> Result<(), StateError> {
        for rows in [&store.k, &store.v] {
            rows.write(0, reader.bytes(n_rows * rows.ty().row_bytes(self.width))?);
        }
        Ok(())
    }
}

const TOO_LONG: StateError = StateError::Damaged("something follows behind its end");

impl From<crate::ggml::Error> for StateError {
    fn from(error: crate::ggml::Error) -> StateError {
        StateError::Engine(error.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simlayer_testkit::RandomModel;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;
    use crate::{
        Model, ModelParams, SessionParams,
        engine::session::{BatchEntry, Outputs},
        lazy::Policy,
    };

    fn session(policy: &str, ty: Type) -> Session {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        RandomModel { n_layer: 3, ..RandomModel::tiny() }.write(&path);
        let model = Model::load(&path, &ModelParams::default()).unwrap();
        let mut params = SessionParams { n_ctx: 256, n_threads: 1, type_k: ty, type_v: ty, ..SessionParams::default() };
        params.lazy.policy = policy.parse::<Policy>().unwrap();
        (params.lazy.n_sink, params.lazy.n_window) = (2, 16);
        Session::new(&model, params).unwrap()
    }

    fn read(session: &mut Session, seq: SeqId, tokens: std::ops::Range<i32>) {
        let tokens: Vec<i32> = tokens.map(|token| 3 + token % 20).collect();
        let entry = BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end: tokens.len() > 1 };
        session.run(&[entry]).unwrap();
    }

    fn saved(session: &Session, seq: SeqId) -> Vec<u8> {
        let mut bytes = Vec::new();
        session.save_seq(seq, &mut bytes).unwrap();
        assert_eq!(bytes.len(), session.seq_state_bytes(seq));
        bytes
    }

    /// Whatever the stores are: the same bytes come back, and the next token's logits are the same to the bit.
    #[test]
    fn what_is_saved_comes_back() {
        for ty in [Type::F16, Type::F32] {
            for policy in ["off", "layers:1", "budget:0.7"] {
                let mut session = session(policy, ty);
                read(&mut session, 0, 0..50);
                let bytes = saved(&session, 0);
                assert_eq!(session.load_seq(7, &bytes).unwrap(), bytes.len());
                assert_eq!(saved(&session, 7), bytes);
                assert_eq!(session.layers(7), session.layers(0));
                read(&mut session, 0, 50..51);
                let expected = session.logits().to_vec();
                read(&mut session, 7, 50..51);
                assert_eq!(session.logits(), expected);
            }
        }
    }

    #[test]
    fn an_empty_sequence_is_a_state_too() {
        let mut session = session("off", Type::F16);
        let bytes = saved(&session, 0);
        read(&mut session, 0, 0..5);
        session.load_seq(0, &bytes).unwrap();
        assert_eq!(session.seq_n_past(0), 0);
    }

    #[test]
    fn states_that_do_not_fit_are_refused() {
        let mut one = session("off", Type::F16);
        read(&mut one, 0, 0..50);
        let bytes = saved(&one, 0);
        let mut other = session("off", Type::F32);
        let error = other.load_seq(0, &bytes).unwrap_err().to_string();
        assert!(error.contains("f16/f16, the context's f32/f32"), "{error}");
        let mut long = bytes.clone();
        long.push(0);
        assert_eq!(one.load_seq(0, &long).unwrap(), bytes.len());
        assert!(one.load_seq(0, &bytes[..bytes.len() - 1]).unwrap_err().to_string().contains("its length"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Also where the checksum is right, since whoever damages a state may know how to make one.
        #[test]
        fn damaged_states_are_refused_or_harmless(
            changes in prop::collection::vec((0usize..600, any::<u8>()), 1..6),
            cut in prop::option::of(0usize..4000),
            fix_checksum: bool,
        ) {
            thread_local! {
                static GOOD: std::cell::RefCell<(Session, Vec<u8>)> = std::cell::RefCell::new({
                    let mut session = session("layers:1", Type::F16);
                    read(&mut session, 0, 0..50);
                    let bytes = saved(&session, 0);
                    (session, bytes)
                });
            }
            GOOD.with_borrow_mut(|(session, good)| {
                let mut bad = good.clone();
                for (at, value) in changes {
                    // Mostly the headers: of the state, and of the layers behind it.
                    bad[at] = value;
                }
                bad.truncate(cut.unwrap_or(usize::MAX).max(HEADER_BYTES + CHECKSUM_BYTES));
                if fix_checksum {
                    let end = bad.len() - CHECKSUM_BYTES;
                    let length = (bad.len() as u64).to_le_bytes();
                    bad[12..20].copy_from_slice(&length);
                    let checksum = xxh3_64(&bad[..end]);
                    bad[end..].copy_from_slice(&checksum.to_le_bytes());
                }
                let n_past = session.seq_n_past(0);
                match session.load_seq(0, &bad) {
                    // Then it can be gone on with.
                    Ok(_) => if session.seq_n_past(0) < 250 { read(session, 0, 0..1) },
                    Err(_) => assert_eq!(session.seq_n_past(0), n_past),
                }
                session.load_seq(0, good).unwrap();
            });
            prop_assert!(true);
        }
    }
}
