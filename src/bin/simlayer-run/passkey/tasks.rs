//! Made-up texts that ask for more than a number: variables followed through code, made-up words, facts that were told
//! in a conversation. They are written in the model's chat template, where it has one.

use simlayer::{
    AddBos, Model, Special, Token,
    chat::{ChatTemplate, Message},
};

use super::text::{ADJECTIVES, ANIMALS, Ask, Random, Text, TextError, gap, keys, n_shared, sentence};
use crate::args::Variant;

const ONSETS: [&str; 16] = ["b", "br", "d", "dr", "f", "fl", "g", "gr", "k", "l", "m", "n", "pl", "sn", "tr", "v"];
const MIDDLES: [&str; 12] = ["abb", "affl", "anz", "elm", "erv", "idd", "imbl", "ond", "orr", "ubb", "ulk", "unt"];
const ENDINGS: [&str; 8] = ["ack", "ard", "een", "er", "ick", "in", "ock", "um"];
const COLOURS: [&str; 12] =
    ["black", "blue", "brown", "golden", "green", "grey", "pink", "purple", "red", "silver", "white", "yellow"];
const THINGS: [&str; 16] = [
    "basket", "blanket", "boat", "bottle", "drum", "hammer", "hat", "kettle", "ladder", "lantern", "mirror", "rope",
    "shovel", "table", "violin", "whistle",
];
const NAMES: [&str; 32] = [
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karen", "Leo", "Maria",
    "Nadia", "Oscar", "Petra", "Quentin", "Rosa", "Simon", "Tina", "Ursula", "Victor", "Wanda", "Xavier", "Yusuf",
    "Zoe", "Bruno", "Diana", "Edgar", "Fiona", "Gustav", "Helga",
];
const CITIES: [&str; 32] = [
    "Athens",
    "Berlin",
    "Cairo",
    "Dublin",
    "Edinburgh",
    "Florence",
    "Geneva",
    "Havana",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lisbon",
    "Madrid",
    "Nairobi",
    "Oslo",
    "Paris",
    "Quito",
    "Rome",
    "Stockholm",
    "Tokyo",
    "Utrecht",
    "Vienna",
    "Warsaw",
    "Zurich",
    "Boston",
    "Chicago",
    "Delhi",
    "Hamburg",
    "London",
    "Lyon",
    "Munich",
    "Prague",
];
const REPLIES: [&str; 8] = [
    "I see. Please go on.",
    "Thank you for telling me. What happened next?",
    "That sounds like an ordinary day.",
    "All right, I am listening.",
    "How interesting. Is there more?",
    "I understand. Tell me the rest.",
    "That must have taken a while.",
    "Good to know. And then?",
];

/// A piece of the text: in a conversation what the user says and the answer to it, else a line or a sentence.
#[derive(Debug, Clone)]
struct Piece {
    text: String,
    reply: &'static str,
}

fn piece(text: String) -> Piece {
    Piece { text, reply: "" }
}

/// What is hidden, and how it is asked for.
#[derive(Debug)]
struct Fact {
    /// Index of its depth.
    depth: usize,
    told: Piece,
    /// What comes some pieces after it.
    followed: Option<Piece>,
    /// What is said near the end.
    used: Option<Piece>,
    question: String,
    /// How the answer's sentence begins.
    lead: String,
    answer: String,
}

/// Pieces of filler between what is told and what follows from it.
const BETWEEN: usize = 2;
/// Pieces of filler behind the first of those that come near the end.
const BEFORE_END: usize = 12;

/// Draws things, each once; when all were drawn, from the beginning.
struct Drawn<T> {
    all: Vec<T>,
    left: Vec<T>,
}

impl<T: Clone> Drawn<T> {
    fn new(all: Vec<T>) -> Drawn<T> {
        Drawn { left: all.clone(), all }
    }

    fn next(&mut self, random: &mut Random) -> T {
        if self.left.is_empty() {
            self.left.clone_from(&self.all);
        }
        self.left.swap_remove(random.below(self.left.len()))
    }
}

/// Makes a text of at most `length` tokens with a question, and hardly less, with `per_depth` facts at each of `depths` (0
/// to 1), of which the first `asked` are asked for.
///
/// # Errors
/// When the facts alone are longer than the text, or the chat template cannot write it.
pub fn text(
    model: &Model,
    variant: Variant,
    random: &mut Random,
    length: usize,
    depths: &[f64],
    (per_depth, asked): (usize, usize),
) -> Result<Text, TextError> {
    let order: Vec<usize> = (0..depths.len()).flat_map(|depth| vec![depth; per_depth]).collect();
    // No piece of filler has fewer tokens than this.
    let n_filler = length / 4 + 1;
    let (facts, filler) = match variant {
        Variant::Variables => variables(random, &order, n_filler),
        Variant::Definition => definitions(random, &order, n_filler),
        _ => turns(random, &order, n_filler),
    };
    let writer = Writer::new(model, variant)?;
    let body = |n: usize| arrange(&facts, &filler[..n], depths, per_depth);
    let whole =
        |n: usize, fact: &Fact| writer.tokens(&writer.render(&body(n), &fact.question)?, &fact.lead, &fact.answer);

    // As much filler as there is room for.
    let longest = facts.iter().max_by_key(|fact| fact.question.len() + fact.lead.len() + fact.answer.len());
    let Some(longest) = longest else { return Err(TextError::Short { length, taken: 0, needles: 0 }) };
    let taken = whole(0, longest)?.len();
    if taken > length {
        return Err(TextError::Short { length, taken, needles: facts.len() });
    }
    let (mut fits, mut too_much) = (0, n_filler + 1);
    while too_much - fits > 1 {
        let middle = (fits + too_much) / 2;
        if whole(middle, longest)?.len() <= length { fits = middle } else { too_much = middle }
    }

    let mut asked_at = vec![0; depths.len()];
    let mut rendered = Vec::new();
    let body = body(fits);
    for fact in &facts {
        if asked_at[fact.depth] < asked {
            asked_at[fact.depth] += 1;
            rendered.push((fact, writer.render(&body, &fact.question)?));
        }
    }
    let mut prompt: Option<Vec<Token>> = None;
    let mut answered = Vec::new();
    for (fact, text) in &rendered {
        let at = text.rfind(&fact.question).ok_or_else(|| TextError::Question(fact.question.clone()))?;
        let all = writer.tokens(text, &fact.lead, &fact.answer)?;
        let before = writer.tokens(&text[..at], "", "")?;
        let known = prompt.get_or_insert(before);
        // What the question's beginning does not change.
        known.truncate(n_shared(known, &all));
        let asked = n_shared(&writer.tokens(text, &fact.lead, "")?, &all);
        answered.push((fact.depth, all, asked));
    }
    let prompt = prompt.unwrap_or_default();
    let asks = answered.into_iter().map(|(depth, all, asked)| Ask {
        depth,
        question: all[prompt.len()..asked].to_vec(),
        answer: all[asked..].to_vec(),
    });
    Ok(Text { asks: asks.collect(), prompt })
}

/// Chains of assignments among others: the number is behind another name.
fn variables(random: &mut Random, order: &[usize], n_filler: usize) -> (Vec<Fact>, Vec<Piece>) {
    let name = |(a, b): (usize, usize)| format!("{}_{}", ADJECTIVES[a], ANIMALS[b]);
    let mut names = Drawn::new(keys());
    let mut numbers = Drawn::new((1_000..10_000).collect::<Vec<_>>());
    let fact = |&depth: &usize| {
        let (first, second) = (name(names.next(random)), name(names.next(random)));
        let number = numbers.next(random);
        Fact {
            depth,
            told: piece(format!("{first} = {number}\n")),
            followed: Some(piece(format!("{second} = {first}\n"))),
            used: None,
            question: format!(
                "What is the value of {second}? Follow it to its number, as in: b = a, a = 5. Now the same for {second}."
            ),
            // Small models follow a chain only if they may write it down.
            lead: format!("{second} ="),
            answer: format!(" {first}, {first} = {number}"),
        }
    };
    let facts: Vec<Fact> = order.iter().map(fact).collect();
    // Their names and numbers are not given to others.
    names.all.clone_from(&names.left);
    let others = numbers.left;
    let filler = (0..n_filler).map(|_| {
        let line = match random.below(4) {
            0 => format!("{} = {}\n", name(names.next(random)), random.pick(&others)),
            1 => format!("counter += {}\n", 1 + random.below(99)),
            2 => format!("seen[{}] = {}\n", random.below(1_000), random.pick(&others)),
            _ => format!("log(\"{}\")\n", sentence(random)),
        };
        piece(line)
    });
    let filler = filler.collect();
    (facts, filler)
}

/// Made-up words: what they mean is said once, and they are used near the end.
fn definitions(random: &mut Random, order: &[usize], n_filler: usize) -> (Vec<Fact>, Vec<Piece>) {
    let all = |n: usize, m: usize| (0..n).flat_map(move |a| (0..m).map(move |b| (a, b))).collect::<Vec<_>>();
    // Each word has a beginning of its own as long as there are some, so that no other is taken for it.
    let mut beginnings = Drawn::new(all(ONSETS.len(), MIDDLES.len()));
    let mut meanings = Drawn::new(all(COLOURS.len(), THINGS.len()));
    let fact = |&depth: &usize| {
        let (onset, middle) = beginnings.next(random);
        let word = format!("{}{}{}", ONSETS[onset], MIDDLES[middle], random.pick(&ENDINGS));
        let (colour, thing) = meanings.next(random);
        Fact {
            depth,
            told: piece(format!(" In this town a {word} is a {} {}.", COLOURS[colour], THINGS[thing])),
            followed: None,
            used: Some(piece(format!(" Somebody left a {word} at the station."))),
            question: format!("What is a {word} in this town?"),
            lead: format!("In this town a {word} is a"),
            answer: format!(" {} {}", COLOURS[colour], THINGS[thing]),
        }
    };
    let facts = order.iter().map(fact).collect();
    (facts, (0..n_filler).map(|_| piece(format!(" {}", sentence(random)))).collect())
}

/// A conversation in which the user says where friends live, among much else.
fn turns(random: &mut Random, order: &[usize], n_filler: usize) -> (Vec<Fact>, Vec<Piece>) {
    let mut names = Drawn::new(NAMES.to_vec());
    let mut cities = Drawn::new(CITIES.to_vec());
    let fact = |&depth: &usize| {
        let (name, city) = (names.next(random), cities.next(random));
        let text = format!("Please remember this: my friend {name} lives in {city}.");
        Fact {
            depth,
            told: Piece { text, reply: "I will remember that." },
            followed: None,
            used: None,
            question: format!("Where does my friend {name} live?"),
            lead: format!("Your friend {name} lives in"),
            answer: format!(" {city}"),
        }
    };
    let facts = order.iter().map(fact).collect();
    let filler = (0..n_filler).map(|_| {
        let text = format!("{} {}", sentence(random), sentence(random));
        Piece { text, reply: random.pick(&REPLIES) }
    });
    (facts, filler.collect())
}

/// The facts at their depths between the filler.
fn arrange(facts: &[Fact], filler: &[Piece], depths: &[f64], per_depth: usize) -> Vec<Piece> {
    let n = filler.len();
    let mut gaps: Vec<Vec<&Piece>> = vec![Vec::new(); n + 1];
    for (i, fact) in facts.iter().enumerate() {
        let at = gap(depths[fact.depth], i % per_depth, per_depth, n);
        gaps[at].push(&fact.told);
        if let Some(followed) = &fact.followed {
            gaps[(at + BETWEEN).min(n)].push(followed);
        }
        if let Some(used) = &fact.used {
            gaps[(n.saturating_sub(BEFORE_END) + i % BEFORE_END).clamp(at, n)].push(used);
        }
    }
    let mut pieces = Vec::new();
    for (at, inside) in gaps.into_iter().enumerate() {
        pieces.extend(inside.into_iter().cloned());
        pieces.extend(filler.get(at).cloned());
    }
    pieces
}

/// Writes texts as the model expects them.
struct Writer<'a> {
    model: &'a Model,
    variant: Variant,
    /// `None` for models that have none: their texts are plain.
    template: Option<ChatTemplate>,
}

impl Writer<'_> {
    fn new(model: &Model, variant: Variant) -> Result<Writer<'_>, TextError> {
        let text = model.chat_template()?.filter(|text| !text.is_empty());
        let template = text.map(|text| ChatTemplate::new(Some(text), model.vocab()));
        Ok(Writer { model, variant, template })
    }

    /// All up to where the answer begins.
    fn render(&self, pieces: &[Piece], question: &str) -> Result<String, TextError> {
        let body = || pieces.iter().map(|piece| piece.text.as_str()).collect::<String>();
        let messages = match self.variant {
            Variant::Variables => {
                let head = "Read this program. You will be asked for the value of one of its variables.";
                let text = format!("{head}\n\n```python\ncounter = 0\nseen = {{}}\n{}```\n\n{question}", body());
                vec![Message::new("user", text)]
            }
            Variant::Definition => {
                let head = "Here are notes from a small town. Some of them explain words that are used only there.";
                vec![Message::new("user", format!("{head}\n\n{}\n\n{question}", body().trim_start()))]
            }
            _ => {
                let said = pieces.iter().flat_map(|piece| {
                    [Message::new("user", piece.text.as_str()), Message::new("assistant", piece.reply)]
                });
                said.chain([Message::new("user", question)]).collect()
            }
        };
        if let Some(template) = &self.template {
            return Ok(template.render(&messages, true)?);
        }
        Ok(match &messages[..] {
            [one] => format!("{}\nAnswer: ", one.content),
            many => {
                let line = |message: &Message| match &*message.role {
                    "user" => format!("User: {}\n", message.content),
                    _ => format!("Assistant: {}\n", message.content),
                };
                many.iter().map(line).chain(["Assistant: ".to_owned()]).collect()
            }
        })
    }

    fn tokens(&self, text: &str, lead: &str, answer: &str) -> Result<Vec<Token>, TextError> {
        let text = format!("{text}{lead}{answer}");
        let vocab = self.model.vocab();
        match &self.template {
            Some(template) => Ok(template.tokenize(vocab, &text)?),
            None => Ok(vocab.tokenize(&text, AddBos::Yes, Special::Text)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use simlayer::ModelParams;
    use simlayer_testkit::{RandomModel, Vocabulary, smollm2_path};

    use super::*;

    const TASKS: [Variant; 3] = [Variant::Variables, Variant::Definition, Variant::Turns];
    const DEPTHS: [f64; 3] = [0.0, 0.5, 1.0];

    fn load(path: &std::path::Path) -> Model {
        Model::load(path, &ModelParams::default()).unwrap()
    }

    fn make(model: &Model, variant: Variant, seed: u64, length: usize) -> Text {
        text(model, variant, &mut Random::new(seed), length, &DEPTHS, (4, 3)).unwrap()
    }

    fn shown(model: &Model, tokens: &[Token]) -> String {
        model.vocab().detokenize(tokens, true).unwrap()
    }

    /// On a model with a chat template, and on one without.
    fn each(check: impl Fn(&Model, Variant)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plain.gguf");
        RandomModel { vocabulary: Vocabulary::Bpe, ..RandomModel::default() }.write(&path);
        for model in [load(&smollm2_path()), load(&path)] {
            TASKS.iter().for_each(|&variant| check(&model, variant));
        }
    }

    #[test]
    fn a_text_is_its_seeds() {
        each(|model, variant| {
            let tokens = |seed| {
                let text = make(model, variant, seed, 2_500);
                let asks: Vec<_> = text.asks.into_iter().map(|ask| (ask.question, ask.answer)).collect();
                (text.prompt, asks)
            };
            assert_eq!(tokens(1), tokens(1), "{variant:?}");
            assert_ne!(tokens(1), tokens(2), "{variant:?}");
        });
    }

    #[test]
    fn a_text_is_as_long_as_asked_for() {
        each(|model, variant| {
            // The longest piece of filler, in this model's tokens.
            let most = if model.chat_template().unwrap().is_some() { 70 } else { 250 };
            for length in [2_500, 6_000] {
                let text = make(model, variant, 3, length);
                let whole = text.asks.iter().map(|ask| text.prompt.len() + ask.question.len() + ask.answer.len());
                let longest = whole.max().unwrap();
                assert!((length - most..=length).contains(&longest), "{variant:?}: {longest} of {length}");
            }
            let short = text(model, variant, &mut Random::new(3), 100, &DEPTHS, (4, 3));
            assert!(matches!(short, Err(TextError::Short { .. })), "{variant:?}: {short:?}");
        });
    }

    #[test]
    fn answers_are_in_the_text_once() {
        each(|model, variant| {
            let text = make(model, variant, 5, 4_000);
            assert_eq!(text.asks.iter().map(|ask| ask.depth).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
            let prompt = shown(model, &text.prompt);
            let mut places: Vec<Vec<f64>> = vec![Vec::new(); 3];
            for ask in &text.asks {
                let mut answer = shown(model, &ask.answer);
                if variant == Variant::Variables {
                    // The step to the other name stands elsewhere.
                    let (step, number) = answer.split_once(" = ").unwrap();
                    let (first, again) = step.split_once(',').unwrap();
                    assert_eq!(first.trim(), again.trim());
                    assert!(prompt.contains(&format!("= {}\n", first.trim())), "{step}");
                    answer = number.to_owned();
                }
                let answer = answer.trim();
                assert!(answer.len() >= 4, "{answer}");
                let found: Vec<usize> = prompt.match_indices(answer).map(|(at, _)| at).collect();
                assert_eq!(found.len(), 1, "{variant:?}: {answer} in {prompt}");
                places[ask.depth].push(found[0] as f64 / prompt.len() as f64);
                let question = shown(model, &ask.question);
                assert!(!question.contains(answer), "{variant:?}: {question}");
                assert!(question.contains('?'), "{variant:?}: {question}");
            }
            let near = |depth: usize, from: f64, to: f64| {
                let places = &places[depth];
                assert!(places.iter().all(|place| (from..to).contains(place)), "{variant:?}, {depth}: {places:?}");
            };
            near(0, 0.0, 0.2);
            near(1, 0.35, 0.65);
            near(2, 0.8, 1.0);
        });
    }

    #[test]
    fn a_question_in_the_prompt_is_the_same_text() {
        each(|model, variant| {
            let apart = make(model, variant, 7, 2_500);
            let asks = apart.asks.clone();
            let whole: Vec<Vec<Token>> = asks.iter().map(|ask| [&apart.prompt[..], &ask.question].concat()).collect();
            let texts = apart.asked_at_once();
            assert_eq!(texts.len(), asks.len());
            for ((text, ask), whole) in texts.iter().zip(&asks).zip(whole) {
                assert_eq!(text.prompt, whole);
                assert!(text.asks[0].question.is_empty());
                assert_eq!((text.asks.len(), &text.asks[0].answer), (1, &ask.answer));
            }
        });
    }

    #[test]
    fn a_chat_template_is_used() {
        let model = load(&smollm2_path());
        let text = make(&model, Variant::Turns, 9, 2_500);
        let prompt = shown(&model, &text.prompt);
        let turns = prompt.matches("<|im_start|>user").count();
        assert!(turns > 20 && turns == prompt.matches("<|im_start|>assistant").count() + 1, "{prompt}");
        let question = shown(&model, &text.asks[0].question);
        assert!(question.contains("<|im_start|>assistant\nYour friend"), "{question}");
    }
}
