//! Rows from one store to another, as when a layer becomes lazy: types and rotation may differ.

use std::ops::Range;

use super::{Chain, Rotations, Store};
use crate::ggml::{Error, Graph, Scheduler, Tensor};

/// A run of rows: from one store's rows to another's.
#[derive(Debug, Clone)]
pub(crate) struct Move {
    pub from: Range<usize>,
    pub to: usize,
}

/// Copies rows into a store in one graph, converting types and rotation.
///
/// Rows of equal format are copied as they are, so that nothing is quantised twice.
pub(crate) fn move_rows(
    scheduler: &mut Scheduler,
    from: &Chain,
    to: &Store,
    moves: &[Move],
    rotations: &Rotations,
) -> Result<(), Error> {
    let format = from.format();
    let runs = |Move { from: rows, to: first }: &Move| {
        let (start, first) = (rows.start, *first);
        from.runs(rows.clone()).map(move |run| (first + run.rows.start - start, run))
    };
    let runs: Vec<_> = moves.iter().flat_map(runs).collect();
    let graph = Graph::new(32 * runs.len().max(1));
    for (first, run) in runs {
        let n = run.rows.len();
        let keys = (&run.store.k, &to.k, format.rotate_k != to.format.rotate_k, true);
        let values = run.store.own_value_rows().zip(to.own_value_rows());
        let values = values.map(|(from_v, to_v)| (from_v, to_v, format.rotate_v != to.format.rotate_v, false));
        for (source, target, turn, is_key) in std::iter::once(keys).chain(values) {
            let source_rows = graph.rows(source, run.first, n);
            let target_rows = graph.rows(target, first, n);
            let source_rows = converted(&graph, &source_rows, &target_rows, turn, is_key, rotations);
            graph.expand(&graph.copy(&source_rows, &target_rows));
        }
    }
    scheduler.alloc(&graph)?;
    scheduler.compute(&graph)?;
    scheduler.release();
    Ok(())
}

/// The rows as f32, turned, unless they can be copied as they are.
fn converted(graph: &Graph, rows: &Tensor, target: &Tensor, turn: bool, is_key: bool, rotations: &Rotations) -> Tensor {
    if rows.ty() == target.ty() && !turn {
        return rows.clone();
    }
    let rows = graph.cast(rows, crate::ggml::Type::F32);
    match (turn, is_key) {
        (false, _) => rows,
        (true, true) => rotations.rotate_key(graph, &rows),
        (true, false) => rotations.rotate_value(graph, &rows),
    }
}
