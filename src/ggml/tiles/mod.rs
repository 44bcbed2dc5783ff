//! Tiles: keys or values of [`TILE`] tokens and one KV head in two to four bits an element, with a scale for each token and
//! a scale and a mean for each channel (after KVarN, arXiv 2606.03458).
//!
//! Element `j` of token `r` is `mean[j] + channel[j] × token[r] × (code[r, j] − middle)`. A channel's scale can go into a
//! query, once for a tile, and a token's multiplies what comes of it; so nothing but codes is read in the inner loops.
//!
//! A tile is one piece of memory, and the tiles of a token's KV heads are neighbours. A store of tiles has rows all the same,
//! each of a [`TILE`]th of a tile's bytes: rows that are copied or saved are those of whole tiles.

mod layout;
mod op;
mod quantize;

pub(crate) use layout::TILE;
pub(super) use layout::{BLOCK, Layout};
pub(crate) use op::{Due, Packing, Source};
pub(super) use op::{PackOp, UnpackOp};
pub(super) use quantize::{channels, pack, unpack};
