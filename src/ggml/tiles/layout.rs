//! Where what is in a tile lies.

/// Tokens of a tile: rows that attention works on at once.
pub(crate) const TILE: usize = crate::ggml::ATTENTION_BLOCK;

/// Elements whose codes lie together.
pub(in crate::ggml) const BLOCK: usize = 32;

/// How many bits a code has, and how many elements a token's key or value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub bits: usize,
    pub size: usize,
}

impl Layout {
    /// The layout of tiles whose rows have so many bytes a head.
    pub fn of_row(bits: usize, bytes: usize) -> Layout {
        // Twice a block's codes, and its channels' scales and means; the token's scale.
        let of_block = 2 * BLOCK / 8 * bits + 2 * 3 * BLOCK / TILE;
        Layout { bits, size: 2 * bytes.saturating_sub(size_of::<u16>()) / of_block * BLOCK }
    }

    /// Bytes of a token's codes.
    pub const fn code_bytes(self) -> usize {
        self.size / 8 * self.bits
    }

    /// Where the tokens' scales begin, an f16 each; before them are the codes, token by token.
    pub const fn tokens(self) -> usize {
        TILE * self.code_bytes()
    }

    /// Where the channels' scales begin, a byte each: see [`channel`].
    pub const fn channels(self) -> usize {
        self.tokens() + TILE * size_of::<u16>()
    }

    /// Where the channels' means begin, two signed bytes each, in units of [`MEAN_UNIT`] of the channel's scale.
    pub const fn means(self) -> usize {
        self.channels() + self.size
    }

    /// Bytes of a tile: a whole number for each row.
    pub const fn bytes(self) -> usize {
        (self.means() + self.size * size_of::<i16>()).next_multiple_of(TILE)
    }

    /// What is subtracted from codes.
    pub const fn middle(self) -> f32 {
        ((1 << self.bits) - 1) as f32 / 2.0
    }
}

/// Part of a channel's scale that 1 of its mean's number stands for: means reach 512 times the scale, for keys' biases can be
/// hundreds of times what differs between tokens.
pub(super) const MEAN_UNIT: f32 = 1.0 / 64.0;

/// Steps of a channel's scale in a factor of two.
pub(super) const STEPS: i32 = 8;

/// A channel's scale: rounding it costs nothing, for codes are made with what it was rounded to.
pub(super) const fn channel(byte: u8) -> f32 {
    // 2^(k/8) for k below 8.
    const ROOTS: [f32; STEPS as usize] =
        [1.0, 1.090_507_7, 1.189_207_1, 1.296_839_6, std::f32::consts::SQRT_2, 1.542_210_8, 1.681_792_9, 1.834_008_1];
    let power = byte as i32 - 128;
    let exponent = power.div_euclid(STEPS);
    f32::from_bits(((exponent + 127) as u32) << 23) * ROOTS[power.rem_euclid(STEPS) as usize]
}

/// [`channel`] of every byte.
pub(super) static CHANNEL: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = channel(byte as u8);
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_whole_bytes_say_what_they_are_of() {
        for (bits, blocks) in (2..=4).flat_map(|bits| (1..=16).map(move |blocks| (bits, blocks))) {
            let layout = Layout { bits, size: blocks * BLOCK };
            assert_eq!(layout.bytes() % TILE, 0, "{layout:?}");
            assert_eq!(Layout::of_row(bits, layout.bytes() / TILE), layout);
        }
    }
}
