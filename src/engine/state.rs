//! Sequences as bytes, so that a conversation can go on in another process.
//!
//! A state is little-endian: a header (magic, version, length, what tells the model's weights from others, its sizes), the
//! tokens, the layers' data, and a checksum of all of it. Everything is checked before anything is changed: the checksum
//! first, then each length and each setting against the model and the session.
//!
//! A whole state has all rows. A partial one, a checkpoint's, has those that cutting a longer sequence cannot bring back:
//! the rings' windows and the exact rows. Both have recurrent layers' states.

use std::{
    io::{self, Write},
    iter,
    ops::Range,
};

use xxhash_rust::xxh3::Xxh3Default;

use super::{
    batch::NO_TOKEN,
    error::Error,
    layer::{Exact, LayerCache, whole},
    looking::Looked,
    mark::Place,
    positions::{PLACED_BYTES, Positions},
    pruning,
    ring::Ring,
    sequence::Sequence,
    setup::{Kernel, Setup, rows},
};
use crate::{
    cache::{Chain, Format, Listed, Span},
    ggml::{self, Type},
    model::{FINGERPRINT_BYTES, Hparams, StateSize},
    vocab::Token,
};

const MAGIC: [u8; 8] = *b"SIMLAYER";
const VERSION: u32 = 5;
/// Older states that are read: of these the first say nothing of looks, and neither have tiles.
const WITHOUT_LOOKS: u32 = 3;
const WITHOUT_TILES: u32 = 4;
/// States of sequences whose rows are, or may be, pruned: they have heads' lists and rows' scores besides.
const WITH_PRUNING: u32 = 6;
/// States of sequences of which a layer rescues rows: they say how many, and have the rows' scores besides.
const WITH_RESCUE: u32 = 7;
/// Magic, version, length.
pub(super) const HEADER_BYTES: usize = 8 + 4 + 8;
pub(super) const CHECKSUM_BYTES: usize = 8;

/// Why a saved state was refused. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    #[error("the state is damaged: {0}; save it again")]
    Damaged(&'static str),
    #[error("the state is of version {0}, this library reads {WITHOUT_LOOKS} to {WITH_RESCUE}: save it again")]
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

    fn looked(&mut self) -> Result<Option<Looked>, StateError> {
        let (n_past, kl) = (self.size()?, f64::from_bits(u64::from_le_bytes(self.array()?)));
        Ok((n_past > 0).then_some(Looked { n_past, kl }))
    }
}

/// One layer as it is written before its rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LayerHeader {
    pub lazy: bool,
    score: Option<f32>,
    pub span: Option<Span>,
    pub format: Format,
    /// After the sink, the rows are those of no position before this one; 0 while nothing was dropped.
    pub held_from: usize,
    rows: usize,
    /// What the layer's exact store keeps, where it has one.
    pub exact: Option<Span>,
}

impl LayerHeader {
    pub fn of(layer: &LayerCache, n_past: usize, kind: Kind) -> LayerHeader {
        let format = layer.store.as_ref().map_or(layer.format, Chain::format);
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
        let first = |n| whole(iter::once(0..n).collect(), self.format);
        match (kind, self.span) {
            (Kind::Whole, None) => first(n_past.saturating_sub(self.held_from)),
            (Kind::Whole, Some(span)) => first(span.used_rows(n_past)),
            (Kind::Partial, None) => Vec::new(),
            (Kind::Partial, Some(span)) => LayerCache::ring_ranges(span, self.format, n_past, self.held_from),
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
        let mut ty = || Type::cache_type_from_raw(from.u32()?).ok_or(StateError::Damaged("a type is no cache type"));
        let (k, v) = (ty()?, ty()?);
        let format = Format { k, v, rotate_k: from.flag()?, rotate_v: from.flag()? };
        let (held_from, rows) = (from.size()?, from.size()?);
        Ok(LayerHeader { lazy, score, span, format, held_from, rows, exact: read_span(from)? })
    }
}

/// What a state of version [`WITH_PRUNING`] says of a layer besides, before its rows.
#[derive(Debug, Default)]
struct PruningHeader {
    has_scores: bool,
    /// Rows of each KV head's list, where there are lists.
    counts: Option<Vec<usize>>,
    /// Rows of each KV head that are rescued at most, from version [`WITH_RESCUE`] on.
    n_rescued: usize,
}

impl PruningHeader {
    /// `from`: the first position after the sink that the state has of a ring.
    fn of(layer: &LayerCache, from: usize, kind: Kind) -> PruningHeader {
        let n_rescued = layer.rescuing().map_or(0, |span| span.n_rescued);
        // A checkpoint has nothing of layers without a ring.
        if kind == Kind::Partial && n_rescued == 0 {
            return PruningHeader::default();
        }
        let pruned = layer.pruned.as_ref().map(|lists| lists.counts().collect());
        let counts = pruned.or_else(|| layer.n_listed_at(from));
        PruningHeader { has_scores: layer.scores.is_some(), counts, n_rescued }
    }

    fn n_listed(&self) -> usize {
        self.counts.iter().flatten().sum()
    }

    /// Bytes of it in a state of this version, and of the rows' scores behind the lists.
    fn bytes(&self, version: u32) -> usize {
        let of_rescue = if version == WITH_RESCUE { 8 } else { 0 };
        let of_scores = if self.n_rescued > 0 { size_of::<f32>() * self.n_listed() } else { 0 };
        2 + 8 * self.counts.as_ref().map_or(0, Vec::len) + of_rescue + of_scores
    }

    fn write(&self, version: u32, to: &mut Writer<'_>) -> io::Result<()> {
        to.u8(u8::from(self.has_scores))?;
        to.u8(u8::from(self.counts.is_some()))?;
        self.counts.iter().flatten().try_for_each(|&n| to.u64(n))?;
        if version == WITH_RESCUE { to.u64(self.n_rescued) } else { Ok(()) }
    }

    fn read(from: &mut Reader<'_>, version: u32, heads: usize) -> Result<PruningHeader, StateError> {
        let (has_scores, has_lists) = (from.flag()?, from.flag()?);
        let counts = has_lists.then(|| (0..heads).map(|_| from.size()).collect::<Result<_, _>>()).transpose()?;
        let n_rescued = if version == WITH_RESCUE { from.size()? } else { 0 };
        Ok(PruningHeader { has_scores, counts, n_rescued })
    }
}

/// The version of a sequence's state.
fn version_of(sequence: Option<&Sequence>, kind: Kind) -> u32 {
    let has = |what: fn(&LayerCache) -> bool| sequence.is_some_and(|sequence| sequence.layers.iter().any(what));
    match kind {
        _ if has(|layer| layer.rescuing().is_some()) => WITH_RESCUE,
        Kind::Whole if has(|layer| layer.pruned.is_some() || layer.scores.is_some()) => WITH_PRUNING,
        _ => VERSION,
    }
}

/// `f32`s as bytes.
fn to_bytes(values: &[f32]) -> impl Iterator<Item = u8> {
    values.iter().flat_map(|value| value.to_le_bytes())
}

fn to_f32(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks();
    values.iter().map(|value| f32::from_le_bytes(*value)).collect()
}

const SPAN_BYTES: usize = 1 + 8 + 8 + 8;

fn write_span(to: &mut Writer<'_>, span: Option<Span>) -> io::Result<()> {
    to.u8(u8::from(span.is_some()))?;
    let span = span.unwrap_or(Span { n_sink: 0, n_window: 0, n_slack: 0, chunked: false, n_rescued: 0 });
    to.u64(span.n_sink)?;
    to.u64(span.n_window)?;
    to.u64(span.n_slack)
}

fn read_span(from: &mut Reader<'_>) -> Result<Option<Span>, StateError> {
    let is_there = from.flag()?;
    // Whether there are chunks is the model's to say, and rescued rows are told behind.
    let [n_sink, n_window, n_slack] = [from.size()?, from.size()?, from.size()?];
    let span = Span { n_sink, n_window, n_slack, chunked: false, n_rescued: 0 };
    let is_possible = span.n_window > 0 && span.n_sink.max(span.n_window).max(span.n_slack) <= i32::MAX as usize;
    if is_there && !is_possible {
        return Err(StateError::Damaged("what a layer keeps makes no sense"));
    }
    Ok(is_there.then_some(span))
}

/// A state whose header and checksum are right.
pub(super) struct State<'a> {
    pub kind: Kind,
    pub place: Place,
    pub tokens: Vec<Token>,
    pub positions: Positions,
    /// The last look before dropping.
    looked: Option<Looked>,
    version: u32,
    /// The layers.
    rest: Reader<'a>,
    pub length: usize,
}

/// One layer's rows in a state.
pub(super) struct LayerRows<'a> {
    pub header: LayerHeader,
    pub rows: &'a [u8],
    pub exact: &'a [u8],
    /// The recurrent state; empty where the layer has none.
    pub state: &'a [u8],
    /// Rows of each KV head's list, where there are lists, and what is in them.
    counts: Option<Vec<usize>>,
    lists: &'a [u8],
    /// Of rescued rows in the lists, their scores.
    listed_scores: &'a [u8],
    /// The scores of `rows`; empty where they have none.
    scores: &'a [u8],
}

impl LayerRows<'_> {
    /// What was rescued, where anything was.
    pub fn listed(&self) -> Option<Listed> {
        let (counts, mut rest) = (self.counts.as_ref()?, &to_f32(self.listed_scores)[..]);
        let is_rescued = self.header.span.is_some_and(|span| span.n_rescued > 0);
        let mut next = |&n: &usize| {
            let (own, others) = rest.split_at(n);
            rest = others;
            own.to_vec()
        };
        is_rescued.then(|| Listed { scores: counts.iter().map(&mut next).collect(), rows: self.lists.to_vec() })
    }

    /// What a checkpoint has of the layer's ring.
    pub fn ring(&self) -> Ring {
        let (from, rows) = (self.header.held_from, self.rows.to_vec());
        Ring { from, rows, scores: to_f32(self.scores), listed: self.listed() }
    }
}

const LOOKED_BYTES: usize = 8 + 8;

/// Bytes of a state of a sequence, or of none.
pub(super) fn bytes(hparams: &Hparams, sequence: Option<&Sequence>, kind: Kind) -> usize {
    let sizes = 1 + FINGERPRINT_BYTES + 4 + hparams.architecture.len() + 4 * 4;
    let mut bytes = HEADER_BYTES + sizes + 8 + 8 + 1 + 8 + 8 + LOOKED_BYTES + CHECKSUM_BYTES;
    if let Some(sequence) = sequence {
        let version = version_of(Some(sequence), kind);
        let layer = |(index, layer): (usize, &LayerCache)| {
            let shape = rows(hparams, index);
            let header = LayerHeader::of(layer, sequence.n_past(), kind);
            let exact_rows = header.exact.map_or(0, Span::n_rows);
            let rows = header.rows * shape.row_bytes(header.format);
            let state = layer.state.as_ref().map_or(0, |state| state.row_bytes());
            let pruning = if version >= WITH_PRUNING {
                let pruning = PruningHeader::of(layer, header.held_from, kind);
                let scores = if pruning.has_scores { size_of::<f32>() * header.rows * shape.heads } else { 0 };
                let of_lists = pruning.n_listed() * shape.row_bytes(header.format) / shape.heads.max(1);
                pruning.bytes(version) + of_lists + scores
            } else {
                0
            };
            LayerHeader::BYTES + pruning + rows + exact_rows * shape.row_bytes(header.format.exact()) + state
        };
        bytes += 1 + sequence.positions.to_bytes(sequence.n_past()).len();
        bytes += size_of_val(&sequence.tokens[..]) + sequence.layers.iter().enumerate().map(layer).sum::<usize>();
    }
    bytes
}

/// Writes a state of a sequence, or of none.
pub(super) fn save(setup: &Setup, sequence: Option<&Sequence>, kind: Kind, to: &mut dyn Write) -> io::Result<()> {
    let hparams = setup.model.hparams();
    let mut to = Writer { to, hash: Xxh3Default::new() };
    to.bytes(&MAGIC)?;
    let version = version_of(sequence, kind);
    to.u32(version)?;
    to.u64(bytes(hparams, sequence, kind))?;

    to.u8(u8::from(kind == Kind::Partial))?;
    to.bytes(setup.model.fingerprint())?;
    to.u32(hparams.architecture.len() as u32)?;
    to.bytes(hparams.architecture.as_bytes())?;
    for size in [hparams.n_layer, hparams.n_embd, hparams.key_width(0), hparams.head_size] {
        to.u32(size as u32)?;
    }
    let Place { n_past, exact_from, scored: (n_scored, scored_at), score_next, state_row } =
        sequence.map_or_else(Place::default, |sequence| sequence.place);
    to.u64(n_past)?;
    to.u64(exact_from)?;
    to.u8(u8::from(score_next))?;
    to.u64(n_scored)?;
    to.u64(scored_at)?;
    let looked = sequence.and_then(|sequence| sequence.looked);
    let Looked { n_past: looked_at, kl } = looked.unwrap_or(Looked { n_past: 0, kl: 0.0 });
    to.u64(looked_at)?;
    to.bytes(&kl.to_bits().to_le_bytes())?;
    let tokens = sequence.map_or(&[][..], |sequence| &sequence.tokens);
    to.bytes(&tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>())?;
    if let Some(sequence) = sequence {
        let positions = sequence.positions.to_bytes(n_past);
        to.u8(u8::from(!positions.is_empty()))?;
        to.bytes(&positions)?;
    }
    let mut buffer = Vec::new();
    for layer in sequence.iter().flat_map(|sequence| &sequence.layers) {
        let header = LayerHeader::of(layer, n_past, kind);
        header.write(&mut to)?;
        buffer.clear();
        if version >= WITH_PRUNING {
            let pruning = PruningHeader::of(layer, header.held_from, kind);
            pruning.write(version, &mut to)?;
            if let Some(lists) = layer.pruned.as_ref().filter(|_| pruning.counts.is_some()) {
                lists.read(&mut buffer);
            }
            if let Some(Listed { scores, rows }) = layer.listed_at(header.held_from) {
                buffer.extend(rows);
                buffer.extend(to_bytes(&scores.concat()));
            }
            if pruning.has_scores {
                buffer.extend(to_bytes(&layer.scores_of(&header.ranges(n_past, kind))));
            }
        }
        if let Some(store) = &layer.store {
            store.read_rows(&header.ranges(n_past, kind), &mut buffer);
        }
        to.bytes(&buffer)?;
        to.bytes(&layer.exact_rows())?;
        to.bytes(&layer.state_row(state_row))?;
    }
    let checksum = to.hash.digest();
    to.to.write_all(&checksum.to_le_bytes())
}

/// Bytes of the state at the beginning of `from`, as its header says.
pub(super) fn length(from: &[u8]) -> Result<usize, StateError> {
    let mut reader = Reader { rest: from };
    if reader.array()? != MAGIC {
        return Err(StateError::Damaged("it does not begin as a state of simlayer does"));
    }
    match reader.u32()? {
        WITHOUT_LOOKS..=WITH_RESCUE => {}
        other => return Err(StateError::Version(other)),
    }
    let length = reader.size()?;
    if length < HEADER_BYTES + CHECKSUM_BYTES || length > from.len() {
        return Err(StateError::Damaged("its length is not the one that its header gives"));
    }
    Ok(length)
}

/// The sequence in a whole state, `None` for an empty one, and the state's length.
pub(super) fn read(setup: &Setup, from: &[u8]) -> Result<(Option<Sequence>, usize), StateError> {
    let mut state = State::open(setup, from)?;
    if state.kind == Kind::Partial {
        return Err(mismatch("it is a checkpoint, which restores the sequence that it was made of only"));
    }
    let length = state.length;
    if state.place.n_past == 0 {
        return if state.rest.rest.is_empty() { Ok((None, length)) } else { Err(TOO_LONG) };
    }
    let rows = state.layers(setup)?;
    let layer = |(index, rows)| layer_of(rows, index, state.place.n_past, setup);
    let layers = rows.iter().enumerate().map(layer).collect::<Result<_, _>>()?;
    let mut sequence = Sequence::of(state.place, state.tokens, layers);
    (sequence.positions, sequence.looked) = (state.positions, state.looked);
    Ok((Some(sequence), length))
}

/// The layer of a whole state, in stores of its own.
fn layer_of(saved: &LayerRows<'_>, index: usize, n_past: usize, setup: &Setup) -> Result<LayerCache, StateError> {
    let LayerHeader { lazy, score, span, format, held_from, rows, .. } = saved.header;
    let setup = &setup.layers[index];
    let mut layer = LayerCache::new(span, lazy, format, setup);
    (layer.score, layer.held_from) = (score, held_from);
    if layer.attends() {
        let store = setup.chain(setup.make(rows, span, format)?);
        store.write_rows(&saved.header.ranges(n_past, Kind::Whole), saved.rows);
        layer.store = Some(store);
        match (saved.listed(), &saved.counts, span) {
            (Some(listed), _, Some(span)) => {
                layer.rescued = Some(setup.make_rescued(format, span)?);
                layer.put_listed(held_from, Some(&listed));
            }
            (_, Some(counts), _) => {
                let mut lists = setup.make_lists(format);
                lists.write(counts, saved.lists)?;
                layer.pruned = Some(lists);
            }
            (_, None, _) => {}
        }
        layer.reserve_scores(setup)?;
        // Without a map as well: by these what has left the window since competes.
        if let (Some(_), None, Some(store)) = (layer.rescuing(), &layer.scores, &layer.store) {
            layer.scores = Some(setup.make_scores(store.n_rows())?);
        }
        layer.put_scores(&saved.header.ranges(n_past, Kind::Whole), &to_f32(saved.scores));
        layer.exact = Exact::new(format, setup)?;
        layer.put_exact_rows(saved.exact);
    }
    layer.reserve_state(setup)?;
    layer.put_state_row(0, saved.state);
    Ok(layer)
}

impl<'a> State<'a> {
    /// The layers' rows, in order, checked against what a model's layers can keep.
    pub fn layers(&mut self, setup: &Setup) -> Result<Vec<LayerRows<'a>>, StateError> {
        let n_layer = setup.layers.len();
        let layers = (0..n_layer).map(|index| self.layer(setup, index)).collect::<Result<_, _>>()?;
        if self.rest.rest.is_empty() { Ok(layers) } else { Err(TOO_LONG) }
    }

    /// Checks a state's header and checksum.
    pub fn open(setup: &Setup, from: &'a [u8]) -> Result<State<'a>, StateError> {
        let length = length(from)?;
        let (checked, checksum) = from[..length].split_at(length - CHECKSUM_BYTES);
        let mut hash = Xxh3Default::new();
        hash.update(checked);
        if hash.digest().to_le_bytes() != checksum {
            return Err(StateError::Damaged("its checksum is wrong"));
        }
        let version = u32::from_le_bytes(Reader { rest: &checked[MAGIC.len()..] }.array()?);
        let mut reader = Reader { rest: &checked[HEADER_BYTES..] };
        let kind = if reader.flag()? { Kind::Partial } else { Kind::Whole };
        let fingerprint: [u8; FINGERPRINT_BYTES] = reader.array()?;

        let hparams = setup.model.hparams();
        let n = reader.u32()? as usize;
        let architecture = reader.bytes(n)?;
        if architecture != hparams.architecture.as_bytes() {
            return Err(mismatch("it is of a model of another architecture"));
        }
        for (name, size) in [
            ("layers", hparams.n_layer),
            ("embedding length", hparams.n_embd),
            ("width of keys", hparams.key_width(0)),
            ("head size", hparams.head_size),
        ] {
            let found = reader.u32()? as usize;
            if found != size {
                return Err(mismatch(format!("its model has {found} for the {name}, this one {size}")));
            }
        }
        if fingerprint != *setup.model.fingerprint() {
            return Err(mismatch("it is of a model of the same shape, but with other weights (or another RoPE)"));
        }
        let n_past = reader.size()?;
        if n_past > setup.params.n_ctx {
            return Err(mismatch(format!("it holds {n_past} tokens, the context {}", setup.params.n_ctx)));
        }
        let exact_from = reader.size()?.min(n_past);
        let score_next = reader.flag()?;
        let scored = (reader.size()?.min(setup.params.n_ctx), reader.size()?.min(n_past));
        let looked = if version == WITHOUT_LOOKS { None } else { reader.looked()? };
        let bytes = reader.bytes(n_past * size_of::<Token>())?;
        let tokens: Vec<Token> =
            bytes.chunks_exact(4).map(|bytes| bytes.try_into().map_or(-1, Token::from_le_bytes)).collect();
        let is_known =
            |&token: &Token| token == NO_TOKEN || usize::try_from(token).is_ok_and(|id| id < hparams.n_vocab);
        if !tokens.iter().all(is_known) {
            return Err(StateError::Damaged("a token is none of the vocabulary"));
        }
        let has_positions = n_past > 0 && reader.flag()?;
        let bytes = reader.bytes(if has_positions { n_past * PLACED_BYTES } else { 0 })?;
        let positions = Positions::from_bytes(bytes).ok_or(StateError::Damaged("positions go back"))?;
        let place = Place { n_past, exact_from, scored, score_next, state_row: 0 };
        Ok(State { kind, place, tokens, positions, looked, version, rest: reader, length })
    }

    fn layer(&mut self, setup: &Setup, index: usize) -> Result<LayerRows<'a>, StateError> {
        let (kind, n_past, version) = (self.kind, self.place.n_past, self.version);
        let reader = &mut self.rest;
        let (hparams, plan) = (setup.model.hparams(), &setup.layers[index].plan);
        let mut header = LayerHeader::read(reader)?;
        if self.version <= WITHOUT_TILES && header.format.has_tiles() {
            return Err(StateError::Damaged("a layer has tiles, which states of its version have not"));
        }
        if !header.lazy {
            header.span = header.span.map(|span| Span { chunked: hparams.chunked, ..span });
        }
        let pruned = match version >= WITH_PRUNING {
            true => PruningHeader::read(reader, version, plan.rows.heads)?,
            false => PruningHeader::default(),
        };
        let n_rescued = pruned.n_rescued;
        header.span = header.span.map(|span| Span { n_rescued, ..span });
        let LayerHeader { lazy, span, format, held_from, rows, exact, .. } = header;
        let by_design = plan.by_design.map(|span| span.n_window);
        match (lazy, span) {
            (true, Some(_)) if hparams.can_be_lazy(index) => {}
            (false, span) if span.map(|span| (span.n_sink, span.n_window)) == by_design.map(|window| (0, window)) => {}
            _ => return Err(mismatch("what a layer keeps is not what this model's layers can keep")),
        }
        if !plan.rows.fits(format.k, format.v) {
            return Err(mismatch("a layer's cache types cannot be used here"));
        }
        if !lazy && format != plan.active && Some(format) != plan.narrow {
            let (found, here) = (format, plan.active);
            return Err(mismatch(format!(
                "its keys and values are {}/{}, the context's {}/{} (or are rotated otherwise)",
                found.k, found.v, here.k, here.v
            )));
        }
        let has_lists = pruned.counts.is_some() || n_rescued > 0;
        if has_lists && (plan.kernel != Kernel::Fused || !plan.attends || format.has_tiles()) {
            return Err(mismatch("its rows are pruned, which only this crate's own attention kernel reads"));
        }
        if n_rescued > i32::MAX as usize || (n_rescued > 0 && !lazy) {
            return Err(StateError::Damaged("a layer rescues rows that cannot"));
        }
        if let Some(span) = span.filter(|span| n_rescued > 0 && span.ring() < setup.params.n_ubatch) {
            let (ring, n_ubatch) = (span.ring(), setup.params.n_ubatch);
            return Err(mismatch(format!(
                "its lazy layers keep {ring} recent rows and rescue others, and a ubatch here has {n_ubatch} tokens: give \
                 ubatches of {ring} (-ub {ring})"
            )));
        }
        let is_held = match (kind, span) {
            (_, Some(_)) if n_rescued == 0 && (pruned.has_scores || pruned.counts.is_some()) => false,
            (_, Some(span))
                if pruned
                    .counts
                    .iter()
                    .flatten()
                    .any(|n| *n > n_rescued.min(held_from.saturating_sub(span.n_sink))) =>
            {
                false
            }
            (_, None) => match &pruned.counts {
                Some(counts) => {
                    let is_of_text = |n: &usize| *n <= held_from;
                    held_from.checked_add(pruning::WINDOW).is_some_and(|end| end <= n_past)
                        && counts.iter().all(is_of_text)
                }
                None => held_from == 0,
            },
            // What a ring of this size has of so many tokens, or less.
            (Kind::Whole, Some(span)) => held_from >= span.held_from(n_past) && span.resumable(held_from) <= n_past,
            (Kind::Partial, Some(span)) => {
                let first = span.held_from(n_past).max(span.n_sink);
                (first..=n_past.max(span.n_sink)).contains(&held_from)
                    && (held_from == span.n_sink || span.resumable(held_from) <= n_past)
            }
        };
        let kept = if plan.attends { header.ranges(n_past, kind).iter().map(Range::len).sum() } else { 0 };
        if !is_held || rows != kept {
            return Err(StateError::Damaged("a layer has another number of rows than tokens"));
        }
        if exact != plan.exact_span_for(format).filter(|_| plan.attends) {
            return Err(mismatch("another number of newest tokens is kept in f16 beside a quantised cache"));
        }
        // Asked before memory is: a length that lies must not allocate.
        let exact_rows = exact.map_or(0, Span::n_rows);
        let too_early = || StateError::Damaged("it ends too early");
        let row_bytes = plan.rows.row_bytes(format);
        let n_listed = pruned.n_listed();
        let bytes = n_listed.checked_mul(row_bytes / plan.rows.heads.max(1)).ok_or_else(too_early)?;
        let lists = reader.bytes(bytes)?;
        let listed_scores = reader.bytes(if n_rescued > 0 { size_of::<f32>() * n_listed } else { 0 })?;
        let n_scores = if pruned.has_scores { rows } else { 0 };
        let bytes = n_scores.checked_mul(size_of::<f32>() * plan.rows.heads).ok_or_else(too_early)?;
        let scores = reader.bytes(bytes)?;
        let bytes = rows.checked_mul(row_bytes).ok_or_else(too_early)?;
        let rows = reader.bytes(bytes)?;
        let exact = reader.bytes(exact_rows * plan.rows.row_bytes(format.exact()))?;
        let state = reader.bytes(plan.state.map_or(0, StateSize::bytes))?;
        Ok(LayerRows { header, rows, exact, state, counts: pruned.counts, lists, listed_scores, scores })
    }
}

const TOO_LONG: StateError = StateError::Damaged("something follows after its end");

impl From<ggml::Error> for StateError {
    fn from(error: ggml::Error) -> StateError {
        StateError::Engine(error.into())
    }
}
