//! A conversation in the terminal, or line by line from a pipe.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Write},
    path::Path,
};

use indicatif::HumanBytes;
use rustyline::{Config, Editor, error::ReadlineError, history::MemHistory};
use serde::{Deserialize, Serialize};
use simlayer::{
    AddBos, Model, Sampler, SamplerParams, SeqId, Session, Special, Token,
    chat::{ChatTemplate, Message, RenderOptions},
};

use crate::{
    args::{ChatArgs, PromptArgs},
    failure::Failure,
    generate, interrupt,
    options::{self, Run},
    report,
    stream::{self, Answer, Stop, Timings, Until},
    template::NamedTemplate,
};

const HELP: &str = "/clear      forget the conversation
/regen      give the last answer anew
/undo       take the last question and its answer back
/read FILE  say what is in a file
/save FILE  keep the conversation, and what was read of it
/load FILE  go on with a conversation that was kept
/exit       leave (or Ctrl-D)
Ctrl-C stops an answer.";

pub fn run(args: ChatArgs) -> Result<(), Failure> {
    let limit = generate::limit(args.n_predict)?;
    let system = match (args.system, args.system_prompt_file) {
        (Some(text), _) => Some(text),
        (None, Some(path)) => Some(options::utf8(options::text(&path)?, &path)?),
        (None, None) => None,
    };
    let first = match &args.first {
        PromptArgs { prompt: None, file: None, binary_file: None, .. } => None,
        _ => Some(String::from_utf8_lossy(&options::prompt(args.first)?).into_owned()),
    };
    let mut run = Run::settle(args.common)?;
    run.session.keep_prompt_end = true;
    let named = NamedTemplate::read(&args.template)?;
    let (model, _) = run.load()?;
    let (template, _) = named.for_model(&model)?;
    let session = run.session(&model)?;
    let params = options::sampling(args.sampling, model.sampler_params(), session.n_ctx())?;
    let mut chat = Chat {
        template,
        variables: args.chat_template_kwargs.map(|object| object.0).unwrap_or_default(),
        // The seed of the first answer; the others follow from it.
        seed: Sampler::new(model.vocab(), &params)?.seed(),
        system: system.map(|text| Message::new("system", text)),
        messages: Vec::new(),
        context: Context::default(),
        total: Timings::default(),
        answers: 0,
        model,
        session,
        params,
        limit,
    };
    let interactive = io::stdin().is_terminal();
    let mut input = if interactive {
        eprintln!("{HELP}\n");
        Input::Terminal(Box::new(Editor::with_history(Config::default(), MemHistory::new()).map_err(Failure::run)?))
    } else {
        Input::Pipe
    };
    let mut first = first;
    loop {
        let (line, is_message) = match first.take() {
            Some(text) => (text, true),
            None => match interrupt::while_waiting(|| input.next())? {
                Some(line) => (line, false),
                None => break,
            },
        };
        let result = match command(&line).filter(|_| !is_message) {
            None if line.trim().is_empty() => continue,
            None if is_message => chat.say(&line),
            None => chat.say(line.trim()),
            Some(("/exit" | "/quit", "")) => break,
            Some(("/help", "")) => {
                eprintln!("{HELP}");
                continue;
            }
            Some(("/clear", "")) => {
                chat.clear();
                continue;
            }
            Some(("/undo", "")) => {
                chat.undo();
                continue;
            }
            Some(("/regen", "")) => chat.regenerate(),
            Some(("/read", file)) if !file.is_empty() => {
                let file = Path::new(file);
                options::text(file).and_then(|bytes| options::utf8(bytes, file)).and_then(|text| chat.say(&text))
            }
            Some(("/save", file)) if !file.is_empty() => chat.save(Path::new(file)),
            Some(("/load", file)) if !file.is_empty() => chat.load(Path::new(file)),
            Some((command, _)) if interactive => {
                eprintln!("{command} is no command, or lacks a FILE; /help lists them");
                continue;
            }
            Some(_) => chat.say(line.trim()),
        };
        match result {
            // In a conversation a failed answer is not the end; in a script it is.
            Err(Failure::Run(message)) if interactive => eprintln!("error: {message}"),
            Err(Failure::Interrupted) if interactive => {}
            result => result?,
        }
        // In a script it ends the program, also when it came as the answer was complete.
        if interactive {
            interrupt::reset();
            chat.print_fill();
        }
        if args.single_turn && chat.answers > 0 {
            break;
        }
    }
    if chat.answers > 0 {
        report::print(&chat.total, &chat.session.kv());
    }
    Ok(())
}

/// A line's command and what follows it, where it is one.
fn command(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    line.starts_with('/').then(|| line.split_once(' ').map_or((line, ""), |(command, rest)| (command, rest.trim())))
}

enum Input {
    Terminal(Box<Editor<(), MemHistory>>),
    Pipe,
}

impl Input {
    /// The next line; `None` at the end.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        match self {
            Input::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        editor.add_history_entry(line.as_str()).map_err(Failure::run)?;
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => eprintln!("Ctrl-D or /exit leaves"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(Failure::run(error)),
                }
            },
            Input::Pipe => {
                let mut line = Vec::new();
                let n = io::stdin().lock().read_until(b'\n', &mut line)?;
                Ok((n > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
            }
        }
    }
}

/// What the session has read, as tokens and as the text they stand for.
#[derive(Default)]
struct Context {
    tokens: Vec<Token>,
    text: String,
}

/// What is kept of a conversation besides the session's state.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Who said what.
    messages: Vec<(String, String)>,
    text: String,
}

struct Chat {
    model: Model,
    session: Session,
    template: ChatTemplate,
    /// Of the template, besides the messages.
    variables: serde_json::Map<String, serde_json::Value>,
    params: SamplerParams,
    seed: u32,
    limit: Option<u64>,
    system: Option<Message>,
    messages: Vec<Message>,
    context: Context,
    total: Timings,
    answers: u32,
}

impl Chat {
    fn clear(&mut self) {
        self.messages.clear();
        self.context = Context::default();
        self.session.clear();
    }

    /// Takes the last question back. What was read of it goes when the next one is read.
    fn undo(&mut self) {
        match self.messages.iter().rposition(|message| message.role == "user") {
            Some(last) => self.messages.truncate(last),
            None => eprintln!("there is nothing to take back"),
        }
    }

    /// How full the context is, and what it takes.
    fn print_fill(&self) {
        let (n_past, n_ctx, kv) = (self.session.n_past(), self.session.n_ctx(), self.session.kv());
        let percent = 100 * n_past / n_ctx.max(1);
        eprintln!(
            "[{n_past} of {n_ctx} tokens ({percent} %), cache {}, {} of {} layers lazy, {}]",
            HumanBytes(kv.allocated_bytes as u64),
            kv.lazy_layers,
            kv.lazy_layers + kv.active_layers,
            report::compression(kv.compression),
        );
    }

    /// Writes the conversation as one line of JSON, and behind it the session's state, so that nothing is read anew.
    fn save(&self, file: &Path) -> Result<(), Failure> {
        let said = |message: &Message| (message.role.clone(), message.content.clone());
        let kept = Kept { messages: self.messages.iter().map(said).collect(), text: self.context.text.clone() };
        let write = || -> io::Result<()> {
            let mut to = io::BufWriter::new(fs::File::create(file)?);
            serde_json::to_writer(&mut to, &kept)?;
            to.write_all(b"\n")?;
            self.session.save_seq(SeqId::default(), &mut to)?;
            to.flush()
        };
        write().map_err(|error| Failure::run(format!("{}: {error}", file.display())))
    }

    /// Reads what [`Chat::save`] wrote. Where it is of another model, or damaged, nothing changes.
    fn load(&mut self, file: &Path) -> Result<(), Failure> {
        let wrong = |why: &dyn std::fmt::Display| Failure::run(format!("{}: {why}", file.display()));
        let bytes = fs::read(file).map_err(|error| wrong(&error))?;
        let end = bytes.iter().position(|&byte| byte == b'\n').ok_or_else(|| wrong(&"no conversation of chat's"))?;
        let kept: Kept = serde_json::from_slice(&bytes[..end]).map_err(|error| wrong(&error))?;
        let mut sequence = self.session.sequence(SeqId::default());
        sequence.load(&bytes[end + 1..]).map_err(|error| wrong(&error))?;
        self.context = Context { tokens: sequence.tokens().to_vec(), text: kept.text };
        self.messages = kept.messages.into_iter().map(|(role, text)| Message::new(&role, text)).collect();
        eprintln!("{} messages, {} tokens", self.messages.len(), self.context.tokens.len());
        Ok(())
    }

    fn say(&mut self, text: &str) -> Result<(), Failure> {
        self.messages.push(Message::new("user", text));
        let result = self.answer();
        if result.is_err() {
            self.messages.pop();
        }
        result
    }

    fn regenerate(&mut self) -> Result<(), Failure> {
        if self.messages.pop_if(|message| message.role == "assistant").is_none() {
            return Err(Failure::run("there is no answer yet"));
        }
        self.answer()
    }

    /// Answers the last message.
    fn answer(&mut self) -> Result<(), Failure> {
        let messages: Vec<_> = self.system.iter().chain(&self.messages).cloned().collect();
        let mut options = RenderOptions::default();
        (options.add_generation_prompt, options.variables) = (true, self.variables.clone());
        let prompt = self.template.render_with(&messages, &options)?;
        let unread = self.reuse(&prompt)?;
        let n_ctx = self.session.n_ctx();
        let needed = self.context.tokens.len() + unread.len();
        if needed > n_ctx {
            return Err(Failure::run(format!(
                "the conversation has {needed} tokens, but the context holds only {n_ctx} (n_ctx): use /clear, or give a larger -c"
            )));
        }
        let params = SamplerParams { seed: Some(self.seed.wrapping_add(self.answers)), ..self.params.clone() };
        let mut sampler = Sampler::new(self.model.vocab(), &params)?;
        for &token in self.context.tokens.iter().chain(&unread) {
            sampler.accept(token)?;
        }

        let mut out = interrupt::stdout();
        let result = stream::answer(
            &self.model,
            &mut self.session,
            &mut sampler,
            &unread,
            &Until { limit: self.limit, stops: &[] },
            |_| Ok(()),
            |text| {
                out.write_all(text.as_bytes())?;
                out.flush()
            },
        );
        let answer = match result {
            Ok(answer) => answer,
            Err(failure) => {
                self.forget_context();
                return Err(failure);
            }
        };
        writeln!(out)?;
        out.flush()?;
        self.remember(&prompt, &unread, &answer);
        match answer.stop {
            Stop::Context => eprintln!("the context of {n_ctx} tokens is full: use /clear, or give a larger -c"),
            Stop::Interrupted if answer.tokens.is_empty() => return Err(Failure::Interrupted),
            _ => {}
        }
        self.messages.push(Message::new("assistant", answer.text));
        if answer.stop == Stop::Interrupted && !io::stdin().is_terminal() {
            return Err(Failure::Interrupted);
        }
        Ok(())
    }

    /// Prepares the session for `prompt` and returns the tokens that it has still to read.
    fn reuse(&mut self, prompt: &str) -> Result<Vec<Token>, Failure> {
        let vocab = self.model.vocab();
        let tokens = self.template.tokenize(vocab, prompt)?;
        let known = &self.context.tokens;
        let common = known.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        if common == known.len() && common < tokens.len() {
            return Ok(tokens[common..].to_vec());
        }
        // The model may have spelled its answer with other tokens than the tokenizer would. As long as the text is the
        // same there is nothing to take back.
        if let Some(new) = prompt.strip_prefix(&self.context.text).filter(|new| !new.is_empty() && !known.is_empty()) {
            return Ok(vocab.tokenize(new, AddBos::No, Special::Parse)?);
        }
        // Take back what differs. The last token is read again in any case: its logits are needed.
        let keep = common.min(tokens.len().saturating_sub(1));
        if self.session.truncate(keep) {
            self.context.tokens.truncate(keep);
            return Ok(tokens[keep..].to_vec());
        }
        // A lazy layer has dropped what would be needed now.
        self.forget_context();
        Ok(tokens)
    }

    fn forget_context(&mut self) {
        self.session.clear();
        self.context = Context::default();
    }

    /// Notes what the session has read by now.
    fn remember(&mut self, prompt: &str, read: &[Token], answer: &Answer) {
        if answer.timings.prefilled == 0 {
            // Interrupted in the prompt.
            return self.forget_context();
        }
        // The last token of an answer is not read unless another one follows.
        let decoded = &answer.tokens[..answer.timings.decoded.min(answer.tokens.len())];
        self.context.tokens.extend_from_slice(read);
        self.context.tokens.extend_from_slice(decoded);
        let vocab = self.model.vocab();
        let bytes: Vec<u8> = decoded.iter().flat_map(|&token| vocab.piece(token, true)).collect();
        // Text that ends within a character cannot be continued as text; nothing will match it then.
        self.context.text = match String::from_utf8(bytes) {
            Ok(text) => format!("{prompt}{text}"),
            Err(_) => "\0".to_owned(),
        };
        self.answers += 1;
        self.total.prefill += answer.timings.prefill;
        self.total.prefilled += answer.timings.prefilled;
        self.total.decode += answer.timings.decode;
        self.total.decoded += answer.timings.decoded;
    }
}
