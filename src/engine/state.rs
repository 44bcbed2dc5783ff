//! Sequences as bytes, so that a conversation can go on in another process.
//!
//! A state is little-endian: a header (magic, version, length, what tells the model's weights from others, its sizes), the
//! tokens, the layers' data, and a checksum of all of it. Everything is checked before anything is changed: the checksum
//! first, then each length and each setting against the model and the session.
//!
//! A whole state has all rows. A partial one, a checkpoint's, has those that cutting a longer sequence cannot bring back:
//! the rings' windows and the exact rows.

use std::{
    io::{self, Write},
    iter,
    ops::Range,
};

use xxhash_rust::xxh3::Xxh3Default;

use super::{
    Error,
    sequence::{LayerCache, Sequence},
    session::{SeqId, Session},
};
use crate::{
    cache::{Format, Span},
    ggml::Type,
    model::FINGERPRINT_BYTES,
    vocab::Token,
};

const MAGIC: [u8; 8] = *b"SIMLAYER";
const VERSION: u32 = 2;
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

pub(super) fn mismatch(what: impl Into<String>) -> StateError {
    StateError::Mismatch(what.into())
}

/// How much a state has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Whole,
    Partial,
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
pub(super) struct Reader<'a> {
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
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LayerHeader {
    pub lazy: bool,
    score: Option<f32>,
    pub span: Option<Span>,
    pub format: Format,
    /// Behind the sink, the rows are those of no position before this one; 0 while nothing was dropped.
    pub held_from: usize,
    rows: usize,
    /// What the layer's exact store keeps, where it has one.
    pub exact: Option<Span>,
}

impl LayerHeader {
    pub fn of(layer: &LayerCache, n_past: usize, kind: Kind) -> LayerHeader {
        let format = layer.store.as_ref().map_or(layer.format, |store| store.format);
        let held_from = match kind {
            Kind::Whole => layer.held_from,
            Kind::Partial => layer.ring_from(n_past),
        };
        let exact = layer.exact.as_ref().map(|exact| exact.span);
        let header =
            LayerHeader { lazy: layer.lazy, score: layer.score, span: layer.span, format, held_from, rows: 0, exact };
        let rows = header.ranges(n_past, kind).iter().map(Range::len).sum();
        LayerHeader { rows: if layer.store.is_some() { rows } else { 0 }, ..header }
    }

    /// The rows of the layer's store that a state has.
    pub fn ranges(&self, n_past: usize, kind: Kind) -> Vec<Range<usize>> {
        match (kind, self.span) {
            (Kind::Whole, None) => iter::once(0..n_past).collect(),
            (Kind::Whole, Some(span)) => iter::once(0..span.used_rows(n_past)).collect(),
            (Kind::Partial, None) => Vec::new(),
            (Kind::Partial, Some(span)) => LayerCache::ring_ranges(span, n_past, self.held_from),
        }
    }

    const BYTES: usize = 1 + 1 + 4 + SPAN_BYTES + 4 + 4 + 1 + 1 + 8 + 8 + SPAN_BYTES;

    fn write(&self, to: &mut Writer<'_>) -> io::Result<()> {
        to.u8(u8::from(self.lazy))?;
        to.u8(u8::from(self.score.is_some()))?;
        to.u32(self.score.unwrap_or(0.0).to_bits())?;
        write_span(to, self.span)?;
        to.u32(self.format.k.raw())?;
        to.u32(self.format.v.raw())?;
        to.u8(u8::from(self.format.rotate_k))?;
        to.u8(u8::from(self.format.rotate_v))?;
        to.u64(self.held_from)?;
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
        let (held_from, rows) = (from.size()?, from.size()?);
        Ok(LayerHeader { lazy, score, span, format, held_from, rows, exact: read_span(from)? })
    }
}

const SPAN_BYTES: usize = 1 + 8 + 8 + 8;

fn write_span(to: &mut Writer<'_>, span: Option<Span>) -> io::Result<()> {
    to.u8(u8::from(span.is_some()))?;
    let span = span.unwrap_or(Span { n_sink: 0, n_window: 0, n_slack: 0 });
    to.u64(span.n_sink)?;
    to.u64(span.n_window)?;
    to.u64(span.n_slack)
}

fn read_span(from: &mut Reader<'_>) -> Result<Option<Span>, StateError> {
    let is_there = from.flag()?;
    let span = Span { n_sink: from.size()?, n_window: from.size()?, n_slack: from.size()? };
    let is_possible = span.n_window > 0 && span.n_sink.max(span.n_window).max(span.n_slack) <= i32::MAX as usize;
    if is_there && !is_possible {
        return Err(StateError::Damaged("what a layer keeps makes no sense"));
    }
    Ok(is_there.then_some(span))
}

/// A state whose header and checksum are right.
pub(super) struct State<'a> {
    pub kind: Kind,
    pub n_past: usize,
    exact_from: usize,
    score_next: bool,
    scored: (usize, usize),
    pub tokens: Vec<Token>,
    /// The layers.
    rest: Reader<'a>,
    pub length: usize,
}

/// One layer's rows in a state.
pub(super) struct LayerRows<'a> {
    pub header: LayerHeader,
    pub rows: &'a [u8],
    pub exact: &'a [u8],
}

impl<'a> State<'a> {
    /// Puts what is not the layers' into a sequence.
    pub fn settle(&self, sequence: &mut Sequence) {
        sequence.n_past = self.n_past;
        (sequence.exact_from, sequence.score_next, sequence.scored) = (self.exact_from, self.score_next, self.scored);
        sequence.tokens.clone_from(&self.tokens);
        sequence.behind.clear();
    }

    /// The layers' rows, in order, checked against what a model's layers can keep.
    pub fn layers(&mut self, session: &Session) -> Result<Vec<LayerRows<'a>>, StateError> {
        let n_layer = session.model.hparams().n_layer;
        let layers = (0..n_layer).map(|index| session.read_layer(self, index)).collect::<Result<_, _>>()?;
        if self.rest.rest.is_empty() { Ok(layers) } else { Err(TOO_LONG) }
    }
}

impl Session {
    /// Bytes that [`Session::save_seq`] writes.
    pub fn seq_state_bytes(&self, seq: SeqId) -> usize {
        self.state_bytes(seq, Kind::Whole)
    }

    pub(super) fn state_bytes(&self, seq: SeqId, kind: Kind) -> usize {
        HEADER_BYTES + self.body_bytes(seq, kind) + CHECKSUM_BYTES
    }

    fn body_bytes(&self, seq: SeqId, kind: Kind) -> usize {
        let sizes = 1 + FINGERPRINT_BYTES + 4 + self.model.hparams().architecture.len() + 4 * 4;
        let sizes = sizes + 8 + 8 + 1 + 8 + 8;
        let Some(sequence) = self.sequences.get(&seq) else { return sizes };
        let layer = |layer: &LayerCache| {
            let header = LayerHeader::of(layer, sequence.n_past, kind);
            let exact_rows = header.exact.map_or(0, Span::n_rows);
            LayerHeader::BYTES
                + header.rows * self.row_bytes(header.format)
                + exact_rows * self.row_bytes(header.format.exact())
        };
        sizes + size_of_val(&sequence.tokens[..]) + sequence.layers.iter().map(layer).sum::<usize>()
    }

    /// Bytes of a token's key and value in one layer.
    fn row_bytes(&self, format: Format) -> usize {
        format.k.row_bytes(self.width) + format.v.row_bytes(self.width)
    }

    /// Writes a sequence: its tokens, their keys and values as they are, lazy layers with what they hold, and the scores.
    /// The logits are not part of it.
    ///
    /// # Errors
    /// When `to` cannot be written.
    pub fn save_seq(&self, seq: SeqId, to: &mut dyn Write) -> io::Result<()> {
        self.save_state(seq, Kind::Whole, to)
    }

    pub(super) fn save_state(&self, seq: SeqId, kind: Kind, to: &mut dyn Write) -> io::Result<()> {
        let hparams = self.model.hparams();
        let mut to = Writer { to, hash: Xxh3Default::new() };
        to.bytes(&MAGIC)?;
        to.u32(VERSION)?;
        to.u64(self.state_bytes(seq, kind))?;

        to.u8(u8::from(kind == Kind::Partial))?;
        to.bytes(self.model.fingerprint())?;
        to.u32(hparams.architecture.len() as u32)?;
        to.bytes(hparams.architecture.as_bytes())?;
        for size in [hparams.n_layer, hparams.n_embd, self.width, hparams.head_size] {
            to.u32(size as u32)?;
        }
        let sequence = self.sequences.get(&seq);
        to.u64(sequence.map_or(0, |sequence| sequence.n_past))?;
        to.u64(sequence.map_or(0, |sequence| sequence.exact_from))?;
        to.u8(u8::from(sequence.is_some_and(|sequence| sequence.score_next)))?;
        let (n_scored, scored_at) = sequence.map_or((0, 0), |sequence| sequence.scored);
        to.u64(n_scored)?;
        to.u64(scored_at)?;
        let tokens = sequence.map_or(&[][..], |sequence| &sequence.tokens);
        to.bytes(&tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>())?;
        let mut buffer = Vec::new();
        for (layer, n_past) in sequence.iter().flat_map(|sequence| sequence.layers.iter().map(|l| (l, sequence.n_past)))
        {
            let header = LayerHeader::of(layer, n_past, kind);
            header.write(&mut to)?;
            buffer.clear();
            if let Some(store) = &layer.store {
                store.read_rows(&header.ranges(n_past, kind), &mut buffer);
            }
            to.bytes(&buffer)?;
            to.bytes(&layer.exact_rows())?;
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
        let mut state = self.open_state(from)?;
        if state.kind == Kind::Partial {
            return Err(mismatch("it is a checkpoint, which restores the sequence that it was made of only"));
        }
        if state.n_past == 0 {
            return if state.rest.rest.is_empty() { Ok((None, state.length)) } else { Err(TOO_LONG) };
        }
        let layers = state.layers(self)?;
        let mut sequence = self.new_sequence();
        state.settle(&mut sequence);
        for (index, rows) in layers.iter().enumerate() {
            sequence.layers[index] = self.layer_of(rows, index, state.n_past)?;
        }
        Ok((Some(sequence), state.length))
    }

    /// Checks a state's header and checksum.
    pub(super) fn open_state<'a>(&self, from: &'a [u8]) -> Result<State<'a>, StateError> {
        let length = Session::state_length(from)?;
        let (checked, checksum) = from[..length].split_at(length - CHECKSUM_BYTES);
        let mut hash = Xxh3Default::new();
        hash.update(checked);
        if hash.digest().to_le_bytes() != checksum {
            return Err(StateError::Damaged("its checksum is wrong"));
        }
        let mut reader = Reader { rest: &checked[HEADER_BYTES..] };
        let kind = if reader.flag()? { Kind::Partial } else { Kind::Whole };
        let fingerprint: [u8; FINGERPRINT_BYTES] = reader.array()?;

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
        if fingerprint != *self.model.fingerprint() {
            return Err(mismatch("it is of a model of the same shape, but with other weights (or another RoPE)"));
        }
        let n_past = reader.size()?;
        if n_past > self.params.n_ctx {
            return Err(mismatch(format!("it holds {n_past} tokens, the context {}", self.params.n_ctx)));
        }
        let exact_from = reader.size()?.min(n_past);
        let score_next = reader.flag()?;
        let scored = (reader.size()?.min(self.params.n_ctx), reader.size()?.min(n_past));
        let bytes = reader.bytes(n_past * size_of::<Token>())?;
        let tokens: Vec<Token> =
            bytes.chunks_exact(4).map(|bytes| bytes.try_into().map_or(-1, Token::from_le_bytes)).collect();
        if tokens.iter().any(|&token| usize::try_from(token).map_or(true, |id| id >= hparams.n_vocab)) {
            return Err(StateError::Damaged("a token is none of the vocabulary"));
        }
        Ok(State { kind, n_past, exact_from, score_next, scored, tokens, rest: reader, length })
    }

    fn read_layer<'a>(&self, state: &mut State<'a>, index: usize) -> Result<LayerRows<'a>, StateError> {
        let (kind, n_past, reader) = (state.kind, state.n_past, &mut state.rest);
        let header = LayerHeader::read(reader)?;
        let LayerHeader { lazy, span, format, held_from, rows, exact, .. } = header;
        let by_design = self.model.hparams().windows[index];
        match (lazy, span) {
            (true, Some(_)) if by_design.is_none() => {}
            (false, span) if span.map(|span| (span.n_sink, span.n_window)) == by_design.map(|window| (0, window)) => {}
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
        let is_held = match (kind, span) {
            (_, None) => held_from == 0,
            // What a ring of this size has of so many tokens, or less.
            (Kind::Whole, Some(span)) => held_from >= span.held_from(n_past) && span.resumable(held_from) <= n_past,
            (Kind::Partial, Some(span)) => {
                let first = span.held_from(n_past).max(span.n_sink);
                (first..=n_past.max(span.n_sink)).contains(&held_from)
                    && (held_from == span.n_sink || span.resumable(held_from) <= n_past)
            }
        };
        if !is_held || rows != header.ranges(n_past, kind).iter().map(Range::len).sum::<usize>() {
            return Err(StateError::Damaged("a layer has another number of rows than tokens"));
        }
        if exact != self.makers[index].exact_span_for(format) {
            return Err(mismatch("another number of newest tokens is kept in f16 beside a quantised cache"));
        }
        // Asked before memory is: a length that lies must not allocate.
        let exact_rows = exact.map_or(0, Span::n_rows);
        let bytes = rows.checked_mul(self.row_bytes(format)).ok_or(StateError::Damaged("it ends too early"))?;
        let rows = reader.bytes(bytes)?;
        Ok(LayerRows { header, rows, exact: reader.bytes(exact_rows * self.row_bytes(format.exact()))? })
    }

    /// The layer of a whole state, in stores of its own.
    fn layer_of(&self, saved: &LayerRows<'_>, index: usize, n_past: usize) -> Result<LayerCache, StateError> {
        let LayerHeader { lazy, score, span, format, held_from, rows, .. } = saved.header;
        let mut layer = LayerCache::new(span, lazy, format);
        (layer.score, layer.held_from) = (score, held_from);
        let store = self.makers[index].make(rows, span, format)?;
        store.write_rows(&saved.header.ranges(n_past, Kind::Whole), saved.rows);
        layer.store = Some(store);
        layer.exact = self.makers[index].make_exact(format)?;
        layer.put_exact_rows(saved.exact);
        Ok(layer)
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
