//! Rows from one store to another, as when a layer becomes lazy: types and rotation may differ.

use std::{collections::BTreeMap, ops::Range};

use super::{Chain, Format, Rotations, RowShape, Store};
use crate::ggml::{BufferType, Context, Due, Error, Graph, Packing, Scheduler, Source, TILE, Tensor, Type};

/// Rows of tiles that are made at once: their elements are in memory as f32 meanwhile.
const STRIP: usize = 64 * TILE;

/// A run of rows: from one store's rows to another's.
#[derive(Debug, Clone)]
pub(crate) struct Move {
    pub from: Range<usize>,
    pub to: usize,
}

/// How rows are moved.
#[derive(Clone, Copy)]
pub(crate) struct Moving<'a> {
    pub shape: RowShape,
    pub rotations: &'a Rotations,
    /// The target's first rows, which have no say in the scales of tiles: the sink's, which attention reads elsewhere.
    pub n_sink: usize,
    pub memory: BufferType,
}

/// Copies rows into a store, converting types and rotation. Of rows that several moves name the last is kept.
///
/// Rows of equal format are copied as they are, so that nothing is quantised twice; those of tiles, where whole tiles go to
/// whole tiles. The target's tiles are made anew: rows of them that nothing is moved to are empty.
pub(crate) fn move_rows(
    scheduler: &mut Scheduler,
    sources: &[(&Chain, &[Move])],
    to: &Store,
    moving: Moving<'_>,
) -> Result<(), Error> {
    let shared = |from: &Chain, is_key: bool| {
        let ty = |format: Format| if is_key { (format.k, format.rotate_k) } else { (format.v, format.rotate_v) };
        ty(from.format()) == ty(to.format)
    };
    let of_values = to.own_value_rows().map(|_| false);
    for is_key in std::iter::once(true).chain(of_values) {
        let target = (tensor(to, is_key), 0..to.n_rows());
        let whole = match sources {
            [(from, moves)] if shared(from, is_key) => whole_tiles(moves, moving.n_sink).map(|moves| (*from, moves)),
            _ => None,
        };
        match (target.0.ty().is_tiles(), whole) {
            (false, _) => move_tensor(scheduler, sources, target, (to.format, is_key), moving)?,
            (true, Some((from, moves))) => {
                move_tensor(scheduler, &[(from, &moves)], target, (to.format, is_key), moving)?;
            }
            (true, None) => make_tiles(scheduler, sources, to, is_key, moving)?,
        }
    }
    Ok(())
}

/// The whole tiles that have the rows of these moves where they are to be; `None` where that is not so. The target's first
/// `n_sink` rows are not looked at.
fn whole_tiles(moves: &[Move], n_sink: usize) -> Option<Vec<Move>> {
    let mut tiles: BTreeMap<usize, usize> = BTreeMap::new();
    for Move { from, to } in moves {
        for (row, source) in (*to..).zip(from.clone()).skip(n_sink.saturating_sub(*to)) {
            let known = *tiles.entry(row / TILE).or_insert(source / TILE);
            if row % TILE != source % TILE || known != source / TILE {
                return None;
            }
        }
    }
    Some(tiles.into_iter().map(|(to, from)| Move { from: from * TILE..(from + 1) * TILE, to: to * TILE }).collect())
}

fn tensor(store: &Store, is_key: bool) -> &Tensor {
    if is_key { &store.k } else { store.value_rows() }
}

/// Moves what comes to rows of one tensor of a store: to those of `target`, of which `window` is the part that it holds.
fn move_tensor(
    scheduler: &mut Scheduler,
    sources: &[(&Chain, &[Move])],
    (target, window): (&Tensor, Range<usize>),
    (format, is_key): (Format, bool),
    moving: Moving<'_>,
) -> Result<(), Error> {
    let n_runs: usize =
        sources.iter().flat_map(|(from, moves)| moves.iter().map(|a| from.runs(a.from.clone()).count())).sum();
    let graph = Graph::new(32 * n_runs.max(1));
    for (from, moves) in sources {
        let turn = |format: Format| if is_key { format.rotate_k } else { format.rotate_v };
        let turn = turn(from.format()) != turn(format);
        for a in *moves {
            for run in from.runs(a.from.clone()) {
                let first = a.to + run.rows.start - a.from.start;
                let (start, end) = (first.max(window.start), (first + run.rows.len()).min(window.end));
                if start >= end {
                    continue;
                }
                let rows = run.first + start - first..run.first + end - first;
                let target_rows = graph.rows(target, start - window.start, end - start);
                let source = tensor(run.store, is_key);
                let source_rows = converted(&graph, (source, rows), &target_rows, (turn, is_key), moving);
                graph.expand(&graph.copy(&source_rows, &target_rows));
            }
        }
    }
    scheduler.compute_once(&graph)
}

/// Rows as they are where they can be copied so, else as f32, turned.
fn converted(
    graph: &Graph,
    (source, rows): (&Tensor, Range<usize>),
    target: &Tensor,
    (turn, is_key): (bool, bool),
    moving: Moving<'_>,
) -> Tensor {
    if source.ty() == target.ty() && !turn {
        return graph.rows(source, rows.start, rows.len());
    }
    let rows = match source.ty().is_tiles() {
        true => graph.unpack_tiles(source, moving.shape.heads, rows.start, rows.len()),
        false => graph.cast(&graph.rows(source, rows.start, rows.len()), Type::F32),
    };
    match (turn, is_key) {
        (false, _) => rows,
        (true, true) => moving.rotations.rotate_key(graph, &rows),
        (true, false) => moving.rotations.rotate_value(graph, &rows),
    }
}

/// Makes a store's tiles of what is moved to their rows, some at a time.
fn make_tiles(
    scheduler: &mut Scheduler,
    sources: &[(&Chain, &[Move])],
    to: &Store,
    is_key: bool,
    moving: Moving<'_>,
) -> Result<(), Error> {
    let RowShape { heads, key_size, value_size, .. } = moving.shape;
    let width = heads * if is_key { key_size } else { value_size };
    let ends = sources.iter().flat_map(|(_, moves)| moves.iter().map(|a| a.to + a.from.len()));
    let end = ends.max().unwrap_or(0);
    for first in (0..end).step_by(STRIP) {
        let rows = first..end.min(first + STRIP);
        let n_tiles = rows.len().div_ceil(TILE);
        let context = Context::new(2);
        let elements = context.tensor(Type::F32, &[width, n_tiles * TILE]);
        let list = context.tensor(Type::I32, &[Due::LEN, n_tiles]);
        context.alloc(moving.memory, "rows of a cache that is converted")?;
        move_tensor(scheduler, sources, (&elements, rows.clone()), (to.format, is_key), moving)?;
        let due = |tile: usize| {
            let start = first + tile * TILE;
            Due {
                tile: start / TILE,
                counted: moving.n_sink.saturating_sub(start).min(TILE),
                rows: std::array::from_fn(|r| Source::Own(tile * TILE + r)),
            }
        };
        list.write(0, &Due::list(&(0..n_tiles).map(due).collect::<Vec<_>>(), n_tiles));
        let graph = Graph::new(4);
        let tiles = std::slice::from_ref(tensor(to, is_key));
        graph.expand(&graph.pack_tiles(&Packing { own: &elements, exact: &[], tiles, due: &list, heads }));
        scheduler.compute_once(&graph)?;
    }
    Ok(())
}
