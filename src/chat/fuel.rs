//! How much a template may do before it counts as endless.

/// Steps that a template may take; 64 bytes of text count as one. Real templates need some hundreds for a message, so
/// this is enough for a thousand messages and more, and an endless template stops at once.
pub(super) const FUEL: u64 = 1_000_000;

/// Bytes that one unit of fuel pays for.
pub(super) const BYTES_PER_FUEL: usize = 64;
