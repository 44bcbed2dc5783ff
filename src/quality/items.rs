//! Made-up notes with facts in them that are asked for at their end, thousands of tokens later: what a layer that reaches
//! far is needed for.
//!
//! Keys with codes, variables that are followed through code, definitions that are used again, and facts from turns of a
//! conversation, among notes of the same kinds. The same seed gives the same notes.

use std::ops::Range;

use crate::vocab::{AddBos, Special, Token, Vocab, VocabError};

const THINGS: [&str; 28] = [
    "anchor",
    "basin",
    "beacon",
    "bellows",
    "boiler",
    "bridge",
    "canal",
    "chimney",
    "compass",
    "crane",
    "dynamo",
    "engine",
    "furnace",
    "gallery",
    "harbour",
    "kiln",
    "lantern",
    "mill",
    "pump",
    "quarry",
    "reservoir",
    "signal",
    "sluice",
    "tower",
    "tunnel",
    "turbine",
    "vault",
    "winch",
];
const KINDS: [&str; 20] = [
    "copper", "eastern", "granite", "green", "hidden", "iron", "lower", "northern", "oak", "old", "painted", "red",
    "round", "second", "southern", "steel", "timber", "upper", "western", "white",
];
const PETS: [&str; 12] = [
    "aunt",
    "boat",
    "cat",
    "colleague",
    "dentist",
    "dog",
    "horse",
    "landlord",
    "nephew",
    "parrot",
    "street",
    "village",
];
const NAMES: [&str; 16] = [
    "Abelard",
    "Bronwen",
    "Cassius",
    "Delphine",
    "Eskil",
    "Fenella",
    "Gaspard",
    "Hedwig",
    "Ignatius",
    "Jorunn",
    "Lazarus",
    "Mirabel",
    "Octavia",
    "Peregrine",
    "Rosalind",
    "Thaddeus",
];
const VERBS: [&str; 14] = [
    "was inspected",
    "was closed for repairs",
    "needed new bolts",
    "passed its test",
    "leaked a little",
    "stood idle",
    "was painted",
    "ran all night",
    "had to be drained",
    "was measured again",
    "was shown to visitors",
    "lost a cover",
    "was greased",
    "made an odd noise",
];
const WHEN: [&str; 12] = [
    "on Tuesday",
    "before the frost",
    "after the inspection",
    "at the end of the month",
    "during the night shift",
    "as the manager had asked",
    "for the third time this year",
    "without any delay",
    "in spite of the rain",
    "while the crew was at lunch",
    "in the week of the fair",
    "until the parts arrived",
];
const FUNCTIONS: [&str; 12] = [
    "average", "balance", "clamp", "convert", "estimate", "level", "limit", "mix", "offset", "range", "scale", "weigh",
];
const REMARKS: [&str; 8] = [
    "Could you shorten the second paragraph?",
    "Please check the spelling of the report.",
    "How many pages are left?",
    "Which day suits you for the meeting?",
    "Is the table in the right order?",
    "Can you make the title shorter?",
    "What do we still need for the trip?",
    "Should the list be sorted by price?",
];
const REPLIES: [&str; 8] = [
    "Yes, I have done that.",
    "It is done; two words were changed.",
    "There are four left.",
    "Any day after Wednesday.",
    "It is, as far as I can see.",
    "I have tried, and it is now five words.",
    "Only the tickets.",
    "By price would be best.",
];

/// A small generator of numbers (SplitMix64): the same on every machine.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }

    /// Takes a word out, so that no two items have the same.
    fn take<'a>(&mut self, words: &mut Vec<&'a str>) -> &'a str {
        words.swap_remove(self.below(words.len()))
    }
}

/// What is said in the notes, in one place or several, and how it is asked for.
#[derive(Debug)]
struct Item {
    notes: Vec<String>,
    question: String,
    answer: String,
}

/// One item of each kind, and again, as many as `n`.
fn items(random: &mut Random, n: usize) -> Vec<Item> {
    let (mut things, mut pets) = (THINGS.to_vec(), PETS.to_vec());
    let (mut names, mut functions) = (NAMES.to_vec(), FUNCTIONS.to_vec());
    let n = n.min(4 * pets.len()).min(2 * things.len());
    let items = (0..n).map(|i| match i % 4 {
        0 => {
            let (kind, thing) = (random.pick(&KINDS), random.take(&mut things));
            let code = 10_000 + random.below(90_000);
            Item {
                notes: vec![format!("Note: the lock of the {kind} {thing} opens with the code {code}.\n")],
                question: format!("\nQuestion: Which code opens the lock of the {kind} {thing}?\nAnswer: The code is"),
                answer: format!(" {code}"),
            }
        }
        1 => {
            let (thing, function) = (random.take(&mut things), random.pick(&FUNCTIONS));
            let value = 1_000 + random.below(9_000);
            let copy = format!("{function}_of_{}", random.pick(&KINDS));
            Item {
                notes: vec![
                    format!("{thing}_{function} = {value}\n"),
                    format!("{copy}_{thing} = {thing}_{function}\n"),
                ],
                question: format!("\nassert {copy}_{thing} =="),
                answer: format!(" {value}"),
            }
        }
        2 => {
            let (function, thing) = (random.take(&mut functions), random.pick(&THINGS));
            let (factor, shift) = (2 + random.below(97), 2 + random.below(97));
            let (a, b) = (random.pick(&KINDS), random.pick(&THINGS));
            let body = format!("{a}, {b}):\n    return {a} * {factor} + {b} - {shift}");
            Item {
                notes: vec![format!("\ndef {function}_{thing}({body}\n\n")],
                question: format!("\n\ndef {function}_{thing}("),
                answer: format!("{body}\n"),
            }
        }
        _ => {
            let (pet, name) = (random.take(&mut pets), random.take(&mut names));
            Item {
                notes: vec![format!(
                    "User: By the way, the name of my {pet} is {name}.\nAssistant: Thank you for telling me.\n"
                )],
                question: format!("\nUser: What was the name of my {pet}?\nAssistant: The name of your {pet} is"),
                answer: format!(" {name}"),
            }
        }
    });
    items.collect()
}

/// Some lines of one kind, about nothing that is asked for.
fn filler(random: &mut Random) -> String {
    let kind = random.below(4);
    let lines = (0..3 + random.below(5)).map(|_| {
        let (a, b, thing) = (random.pick(&KINDS), random.pick(&FUNCTIONS), random.pick(&THINGS));
        match kind {
            0 => format!("The {a} {thing} {} {}.\n", random.pick(&VERBS), random.pick(&WHEN)),
            1 => {
                let (hour, minute) = (random.below(24), random.below(60));
                format!("{hour:02}:{minute:02} {thing}: {b} {} of {}, {a}\n", random.below(500), random.below(500))
            }
            2 => format!("{thing}.{b}({}, {a}={})\n", random.below(100), random.below(100)),
            _ => format!("User: {}\nAssistant: {}\n", random.pick(&REMARKS), random.pick(&REPLIES)),
        }
    });
    lines.collect()
}

/// Notes, and what is asked about them afterwards.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    pub tokens: Vec<Token>,
    /// Questions and their answers, one after the other.
    pub questions: Vec<Token>,
    /// Where the answers are in `questions`.
    pub answers: Vec<Range<usize>>,
}

/// Makes notes of exactly `length` tokens and asks at most `n` questions about them: fewer where they would be more than a
/// third of the notes.
///
/// # Errors
/// When the vocabulary cannot tokenise them.
pub fn notes(vocab: &Vocab, seed: u64, length: usize, n: usize) -> Result<Notes, VocabError> {
    let mut random = Random(seed);
    let tokenize = |text: &str| vocab.tokenize(text, AddBos::No, Special::Text);
    let mut said: Vec<Vec<Vec<Token>>> = Vec::new();
    let mut asked = Notes::default();
    let mut taken = 0;
    for item in items(&mut random, n) {
        let notes = item.notes.iter().map(|note| tokenize(note)).collect::<Result<Vec<_>, _>>()?;
        let size: usize = notes.iter().map(Vec::len).sum();
        if 3 * (taken + size) > length {
            continue;
        }
        taken += size;
        said.push(notes);
        // Tokens that the question shares with question and answer: a token may reach over their border.
        let whole = tokenize(&format!("{}{}", item.question, item.answer))?;
        let question = tokenize(&item.question)?;
        let shared = question.iter().zip(&whole).take_while(|(a, b)| a == b).count();
        let start = asked.questions.len();
        asked.questions.extend(&whole);
        asked.answers.push(start + shared..asked.questions.len());
    }

    let mut fillers = Vec::new();
    let mut filled = taken;
    while filled < length {
        let filler = tokenize(&filler(&mut random))?;
        filled += filler.len();
        fillers.push(filler);
    }
    // What belongs to one item keeps its order: each has places of its own, the earlier for what comes first.
    let mut gaps: Vec<Vec<Vec<Token>>> = vec![Vec::new(); fillers.len() + 1];
    for notes in said {
        let mut places: Vec<usize> = notes.iter().map(|_| random.below(gaps.len())).collect();
        places.sort_unstable();
        for (place, note) in places.into_iter().zip(notes) {
            gaps[place].push(note);
        }
    }
    // The end is cut off at a filler's cost: the last gap comes before the last filler.
    if let Some(last) = gaps.pop() {
        match gaps.last_mut() {
            Some(before) => before.extend(last),
            None => gaps.push(last),
        }
    }
    let mut fillers = fillers.into_iter();
    for notes in gaps {
        notes.into_iter().for_each(|note| asked.tokens.extend(note));
        asked.tokens.extend(fillers.next().unwrap_or_default());
    }
    asked.tokens.truncate(length);
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_told_once_and_asked_for() {
        let items = items(&mut Random(7), 24);
        assert_eq!(items.len(), 24);
        for (i, item) in items.iter().enumerate() {
            // What is asked for is in this item's notes, and in nobody else's.
            assert!(item.notes[0].contains(item.answer.trim()), "{item:?}");
            let others = items.iter().enumerate().filter(|(other, _)| *other != i);
            for (_, other) in others {
                let question = item.question.trim();
                assert_ne!(question, other.question.trim());
                assert!(other.notes.iter().all(|note| !note.contains(item.answer.trim())), "{item:?}, {other:?}");
            }
        }
        assert!(items.iter().filter(|item| item.notes.len() == 2).count() == 6);
        assert!(super::items(&mut Random(7), 1_000).len() < 60, "as many as there are words for");
    }

    #[test]
    fn the_same_seed_gives_the_same() {
        let text = |seed| format!("{:?} {}", items(&mut Random(seed), 9), filler(&mut Random(seed)));
        assert_eq!(text(3), text(3));
        assert_ne!(text(3), text(4));
    }
}
