//! Made-up text with secret numbers in it, as RULER's single- and multi-key needles are: the same for the same seed.
//! [`super::tasks`] has texts of other kinds.

use simlayer::{AddBos, Special, Token, Vocab, chat::ChatError, model, vocab::VocabError};

pub const ADJECTIVES: [&str; 24] = [
    "amber", "brass", "cedar", "crimson", "dusty", "early", "foggy", "gentle", "hollow", "ivory", "jagged", "lonely",
    "marble", "narrow", "orange", "patient", "quiet", "russet", "silver", "tangled", "upper", "velvet", "winter",
    "young",
];
pub const ANIMALS: [&str; 24] = [
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

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, words: &[T]) -> T {
        words[self.below(words.len())]
    }
}

/// A text that is read, and what is asked of it.
#[derive(Debug)]
pub struct Text {
    pub prompt: Vec<Token>,
    pub asks: Vec<Ask>,
}

/// A question, and what it is answered with.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Index of the depth at which the answer is hidden.
    pub depth: usize,
    /// What is read after the prompt, the beginning of the answer's sentence included; nothing where it is in the prompt.
    pub question: Vec<Token>,
    pub answer: Vec<Token>,
}

impl Text {
    /// One text for each question, which has it in its prompt.
    pub fn asked_at_once(self) -> Vec<Text> {
        let Text { prompt, asks } = self;
        let with = |ask: Ask| Text {
            prompt: [&prompt[..], &ask.question].concat(),
            asks: vec![Ask { question: Vec::new(), ..ask }],
        };
        asks.into_iter().map(with).collect()
    }
}

/// A secret number, where it is hidden, and how it is asked for.
#[derive(Debug, Clone)]
struct Needle {
    /// Index of its depth.
    depth: usize,
    key: String,
    number: String,
}

impl Needle {
    fn sentence(&self) -> String {
        format!(" The secret number of the {} is {}.", self.key, self.number)
    }

    /// The tokens of the question and of its answer.
    fn ask(&self, vocab: &Vocab) -> Result<Ask, VocabError> {
        let key = &self.key;
        let question =
            format!("\n\nQuestion: What is the secret number of the {key}?\nAnswer: The secret number of the {key} is");
        let asked = vocab.tokenize(&question, AddBos::No, Special::Text)?;
        let answered = vocab.tokenize(&format!("{question} {}", self.number), AddBos::No, Special::Text)?;
        let shared = n_shared(&asked, &answered);
        Ok(Ask { depth: self.depth, question: answered[..shared].to_vec(), answer: answered[shared..].to_vec() })
    }
}

/// How many tokens both begin with.
pub fn n_shared(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Makes a text of at most `length` tokens, and hardly less, with `per_depth` needles at each of `depths` (0 to 1),
/// of which the first `asked` are asked for.
///
/// # Errors
/// When the needles alone are longer than the text.
pub fn needles(
    vocab: &Vocab,
    random: &mut Random,
    length: usize,
    depths: &[f64],
    (per_depth, asked): (usize, usize),
) -> Result<Text, TextError> {
    let mut keys = keys();
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
        let sentence = format!(" {}", sentence(random));
        let sentence = vocab.tokenize(&sentence, AddBos::No, Special::Text)?;
        if filled + sentence.len() > room {
            break;
        }
        filled += sentence.len();
        filler.push(sentence);
    }

    let mut gaps: Vec<Vec<usize>> = vec![Vec::new(); filler.len() + 1];
    for (i, needle) in needles.iter().enumerate() {
        gaps[gap(depths[needle.depth], i % per_depth, per_depth, filler.len())].push(i);
    }
    for (gap, inside) in gaps.iter().enumerate() {
        for &needle in inside {
            tokens.extend(&hidden[needle]);
        }
        if let Some(sentence) = filler.get(gap) {
            tokens.extend(sentence);
        }
    }
    let is_asked = |(i, _): &(usize, &Needle)| i % per_depth < asked;
    let asked = needles.iter().enumerate().filter(is_asked);
    let asks = asked.map(|(_, needle)| needle.ask(vocab)).collect::<Result<_, _>>()?;
    Ok(Text { prompt: tokens, asks })
}

/// Pairs of an adjective and an animal.
pub fn keys() -> Vec<(usize, usize)> {
    (0..ADJECTIVES.len()).flat_map(|a| (0..ANIMALS.len()).map(move |b| (a, b))).collect()
}

/// A sentence that tells nothing of importance.
pub fn sentence(random: &mut Random) -> String {
    format!("{} {} {}.", random.pick(&PEOPLE), random.pick(&ACTS), random.pick(&TIMES))
}

/// The gap between `n` pieces of filler, from 0 to `n`, for the `nth` of `per_depth` facts at one depth: they stand in
/// neighbouring ones.
pub fn gap(depth: f64, nth: usize, per_depth: usize, n: usize) -> usize {
    let shift = nth as f64 - (per_depth - 1) as f64 * depth;
    (depth * n as f64 + shift).round().clamp(0.0, n as f64) as usize
}

#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{needles} needles take {taken} tokens, which a text of {length} does not hold: give longer --lengths")]
    Short { length: usize, taken: usize, needles: usize },
    #[error("the model's chat template does not write the question \"{0}\" as it is")]
    Question(String),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Vocab(#[from] VocabError),
    #[error(transparent)]
    Model(#[from] model::Error),
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
