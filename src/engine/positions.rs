//! Where a sequence's tokens stand for RoPE, where that is not simply their number in the sequence.
//!
//! Of a model that gives a token several positions (M-RoPE), a picture's tokens share the first of them and differ in the
//! others, by row and column; the text behind goes on after the largest. So a sequence with pictures has fewer positions
//! than tokens. Which tokens a query sees goes by their numbers all the same: rows of a picture follow each other.

/// The positions of a sequence's tokens; nothing is kept while each is the token's number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Positions(Vec<Placed>);

/// Where one token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    /// The first of its positions.
    at: i32,
    /// Where the token after it stands, if that is one of text.
    next: i32,
}

/// Bytes of a token's positions in a state.
pub(super) const PLACED_BYTES: usize = 8;

impl Positions {
    /// Where a token of text stands that follows the first `n_past` tokens.
    pub fn next(&self, n_past: usize) -> usize {
        match n_past.checked_sub(1).and_then(|last| self.0.get(last)) {
            Some(last) => last.next as usize,
            None => n_past,
        }
    }

    /// What is added to a token's number for its position, of a token of text after the first `n_past`.
    pub fn shift(&self, n_past: usize) -> i32 {
        self.next(n_past) as i32 - n_past as i32
    }

    /// The first position of a token.
    pub fn at(&self, token: usize) -> usize {
        self.0.get(token).map_or(token, |placed| placed.at as usize)
    }

    /// How many of `n_past` tokens stand before a position.
    pub fn tokens_before(&self, position: usize, n_past: usize) -> usize {
        match self.0.get(..n_past) {
            Some(placed) if !placed.is_empty() => placed.partition_point(|placed| (placed.at as usize) < position),
            _ => position.min(n_past),
        }
    }

    /// `n` tokens of text follow the first `n_past` tokens.
    pub fn append_text(&mut self, n_past: usize, n: usize) {
        if self.0.is_empty() {
            return;
        }
        let first = self.next(n_past) as i32;
        self.0.truncate(n_past);
        self.0.extend((first..first + n as i32).map(|at| Placed { at, next: at + 1 }));
    }

    /// Tokens with these positions, all first ones, then all second ones and so on, follow the first `n_past` tokens.
    pub fn append(&mut self, n_past: usize, n: usize, positions: &[i32]) {
        let before = self.next(n_past) as i32;
        let is_number = |(place, &position): (usize, &i32)| position as usize == n_past + place % n.max(1);
        if self.0.is_empty() && positions.iter().enumerate().take(n).all(is_number) && !has_later(positions, n) {
            return;
        }
        if self.0.is_empty() {
            self.0.extend((0..n_past as i32).map(|at| Placed { at, next: at + 1 }));
        }
        self.0.truncate(n_past);
        let mut next = before;
        for token in 0..n {
            let largest = positions.iter().skip(token).step_by(n).copied().max().unwrap_or(next);
            next = next.max(largest.saturating_add(1));
            self.0.push(Placed { at: positions[token], next });
        }
    }

    /// The first `n` tokens' bytes: none while each is at its number.
    pub fn to_bytes(&self, n: usize) -> Vec<u8> {
        let placed = self.0.get(..n).unwrap_or(&[]);
        placed.iter().flat_map(|Placed { at, next }| [at.to_le_bytes(), next.to_le_bytes()]).flatten().collect()
    }

    /// What [`Positions::to_bytes`] gave; `None` where positions go back.
    pub fn from_bytes(bytes: &[u8]) -> Option<Positions> {
        let number = |bytes: &[u8]| bytes.try_into().map(i32::from_le_bytes).unwrap_or(-1);
        let placed =
            bytes.chunks_exact(PLACED_BYTES).map(|bytes| Placed { at: number(&bytes[..4]), next: number(&bytes[4..]) });
        let placed: Vec<Placed> = placed.collect();
        let follows = |pair: &[Placed]| pair[0].at <= pair[1].at && pair[0].next <= pair[1].next;
        let is_right = placed.iter().all(|placed| (0..placed.next).contains(&placed.at));
        (is_right && placed.windows(2).all(follows)).then_some(Positions(placed))
    }
}

/// Whether a token of `n` has a position after its first one.
fn has_later(positions: &[i32], n: usize) -> bool {
    positions.iter().enumerate().skip(n).any(|(place, &position)| position > positions[place % n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stands_at_its_number() {
        let mut positions = Positions::default();
        positions.append_text(0, 5);
        positions.append(5, 2, &[5, 6]);
        assert_eq!((positions.next(7), positions.at(6), positions.shift(7)), (7, 6, 0));
        assert_eq!(positions.tokens_before(3, 7), 3);
        assert!(positions.to_bytes(7).is_empty());
    }

    /// Three tokens of text, a picture of two rows of three, and text.
    #[test]
    fn a_picture_takes_as_many_positions_as_it_is_wide() {
        let mut positions = Positions::default();
        positions.append_text(0, 3);
        let picture = [3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 3, 4, 5, 3, 4, 5, 0, 0, 0, 0, 0, 0];
        positions.append(3, 6, &picture);
        assert_eq!((positions.next(9), positions.shift(9)), (6, -3));
        positions.append_text(9, 2);
        assert_eq!((positions.at(8), positions.at(9), positions.at(10), positions.next(11)), (3, 6, 7, 8));
        assert_eq!([2, 3, 4, 6, 7, 9].map(|position| positions.tokens_before(position, 11)), [2, 3, 9, 9, 10, 11]);
        // A piece of the picture, taken back and written over.
        assert_eq!(positions.next(5), 5);
        let bytes = positions.to_bytes(11);
        assert_eq!(Positions::from_bytes(&bytes), Some(positions.clone()));
        positions.append_text(3, 1);
        assert_eq!((positions.at(3), positions.next(4)), (3, 4));
        assert_eq!(Positions::from_bytes(&[7, 0, 0, 0, 3, 0, 0, 0]), None);
    }
}
