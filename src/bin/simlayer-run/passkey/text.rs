//! Made-up text with secret numbers in it, as RULER's single- and multi-key needles are: the same for the same seed.

use simlayer::{AddBos, Error, Special, Token, Vocab, vocab::VocabError};

const ADJECTIVES: [&str; 24] = [
    "amber", "brass", "cedar", "crimson", "dusty", "early", "foggy", "gentle", "hollow", "ivory", "jagged", "lonely",
    "marble", "narrow", "orange", "patient", "quiet", "russet", "silver", "tangled", "upper", "velvet", "winter",
    "young",
];
const ANIMALS: [&str; 24] = [
    "badger", "bison", "crane", "donkey", "eagle", "ferret", "goose", "hare", "heron", "ibis", "jackal", "lizard",
    "magpie", "newt", "otter", "panther", "quail", "raven", "seal", "swan", "tiger", "viper", "walrus", "zebra",
];
const PEOPLE: [&str; 16] = [
    "The baker",
    "The ferryman",
    "My uncle",
    "A student",
    "The mayor",
    "The gardener",
    "An old sailor",
    "The teacher",
    "The postman",
    "Her sister",
    "The painter",
    "A traveller",
    "The miller",
    "The doctor",
    "Our neighbour",
    "The clerk",
];
const ACTS: [&str; 20] = [
    "walked to the market",
    "mended the wooden gate",
    "wrote a long letter",
    "watched the boats come in",
    "sold three baskets of apples",
    "slept until noon",
    "counted the lamps on the bridge",
    "lost a leather glove",
    "swept the stairs of the mill",
    "bought bread and salt",
    "read the newspaper aloud",
    "planted beans in the garden",
    "painted the door green",
    "waited for the evening train",
    "carried water from the well",
    "played cards with a friend",
    "looked for the missing key",
    "cleaned the kitchen windows",
    "told a story about the sea",
    "drank tea in the shade",
];
const TIMES: [&str; 16] = [
    "on Monday morning",
    "before the rain began",
    "after the church bells rang",
    "in the first days of autumn",
    "when nobody was looking",
    "late in the afternoon",
    "while the children slept",
    "on the way home",
    "as the fog was lifting",
    "during the long holiday",
    "without saying a word",
    "for the second time that week",
    "because the road was closed",
    "although it was cold",
    "just as the shop opened",
    "with great care",
];

/// A small generator of numbers (SplitMix64): the same on every machine.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }
}

/// A secret number, where it is hidden, and how it is asked for.
#[derive(Debug, Clone)]
pub struct Needle {
    /// Index of its depth.
    pub depth: usize,
    key: String,
    number: String,
}

impl Needle {
    fn sentence(&self) -> String {
        format!(" The secret number of the {} is {}.", self.key, self.number)
    }

    /// The tokens of the question and of its answer.
    pub fn question(&self, vocab: &Vocab) -> Result<(Vec<Token>, Vec<Token>), VocabError> {
        let key = &self.key;
        let question =
            format!("\n\nQuestion: What is the secret number of the {key}?\nAnswer: The secret number of the {key} is");
        let asked = vocab.tokenize(&question, AddBos::No, Special::Text)?;
        let answered = vocab.tokenize(&format!("{question} {}", self.number), AddBos::No, Special::Text)?;
        let shared = asked.iter().zip(&answered).take_while(|(a, b)| a == b).count();
        Ok((answered[..shared].to_vec(), answered[shared..].to_vec()))
    }
}

/// A text with needles in it.
#[derive(Debug)]
pub struct Haystack {
    pub tokens: Vec<Token>,
    pub needles: Vec<Needle>,
}

/// Makes a text of at most `length` tokens, and hardly less, with `per_depth` needles at each of `depths` (0 to 1).
///
/// # Errors
/// When the needles alone are longer than the text.
pub fn haystack(
    vocab: &Vocab,
    random: &mut Random,
    length: usize,
    depths: &[f64],
    per_depth: usize,
) -> Result<Haystack, TextError> {
    let mut keys: Vec<(usize, usize)> =
        (0..ADJECTIVES.len()).flat_map(|a| (0..ANIMALS.len()).map(move |b| (a, b))).collect();
    let mut needles = Vec::new();
    for depth in 0..depths.len() {
        for _ in 0..per_depth {
            let (adjective, animal) = keys.swap_remove(random.below(keys.len()));
            // Other numbers must not be guessed from a part of this animal's name.
            keys.retain(|&(a, b)| a != adjective || b != animal);
            let key = format!("{} {}", ADJECTIVES[adjective], ANIMALS[animal]);
            let number = (1_000_000 + random.below(9_000_000)).to_string();
            needles.push(Needle { depth, key, number });
        }
    }
    let head = "Here are notes from a small town. Some of them tell a secret number, which you will be asked for.\n\n";
    let mut tokens = vocab.tokenize(head, AddBos::Yes, Special::Text)?;
    let hidden: Vec<Vec<Token>> = needles
        .iter()
        .map(|needle| vocab.tokenize(&needle.sentence(), AddBos::No, Special::Text))
        .collect::<Result<_, _>>()?;
    let taken = tokens.len() + hidden.iter().map(Vec::len).sum::<usize>();
    let Some(room) = length.checked_sub(taken).filter(|&room| room > 0) else {
        return Err(TextError::Short { length, taken, needles: needles.len() });
    };

    let mut filler: Vec<Vec<Token>> = Vec::new();
    let mut filled = 0;
    loop {
        let sentence = format!(" {} {} {}.", random.pick(&PEOPLE), random.pick(&ACTS), random.pick(&TIMES));
        let sentence = vocab.tokenize(&sentence, AddBos::No, Special::Text)?;
        if filled + sentence.len() > room {
            break;
        }
        filled += sentence.len();
        filler.push(sentence);
    }

    // Needles of one depth stand in neighbouring gaps between sentences.
    let mut gaps: Vec<Vec<usize>> = vec![Vec::new(); filler.len() + 1];
    for (i, needle) in needles.iter().enumerate() {
        let nth = i % per_depth;
        let gap = depths[needle.depth] * filler.len() as f64;
        let shift = nth as f64 - (per_depth - 1) as f64 * depths[needle.depth];
        let gap = (gap + shift).round().clamp(0.0, filler.len() as f64) as usize;
        gaps[gap].push(i);
    }
    for (gap, inside) in gaps.iter().enumerate() {
        for &needle in inside {
            tokens.extend(&hidden[needle]);
        }
        if let Some(sentence) = filler.get(gap) {
            tokens.extend(sentence);
        }
    }
    Ok(Haystack { tokens, needles })
}

#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{needles} needles take {taken} tokens, which a text of {length} does not hold: give longer --lengths")]
    Short { length: usize, taken: usize, needles: usize },
    #[error(transparent)]
    Vocab(#[from] VocabError),
    #[error(transparent)]
    Engine(#[from] Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_are_the_same_everywhere() {
        let mut random = Random::new(1);
        let numbers: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(numbers, [0x910a_2dec_8902_5cc1, 0xbeeb_8da1_658e_ec67, 0xf893_a2ee_fb32_555e]);
    }
}
