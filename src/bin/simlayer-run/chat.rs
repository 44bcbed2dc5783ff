//! A conversation in the terminal, or line by line from a pipe.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    path::Path,
};

use rustyline::{Config, Editor, error::ReadlineError, history::MemHistory};
use simlayer::{
    AddBos, Model, Sampler, SamplerParams, Session, Special, Token,
    chat::{ChatTemplate, Message},
};

use crate::{
    args::ChatArgs,
    failure::Failure,
    generate, interrupt,
    options::{self, Run},
    report,
    stream::{self, Answer, Stop, Timings},
};

const HELP: &str = "/clear  forget the conversation
/regen  give the last answer anew
/exit   leave (or Ctrl-D)
Ctrl-C stops an answer.";

pub fn run(args: ChatArgs) -> Result<(), Failure> {
    let limit = generate::limit(args.n_predict)?;
    let system = match (args.system, args.system_prompt_file) {
        (Some(text), _) => Some(text),
        (None, Some(path)) => Some(options::utf8(options::text(&path)?, &path)?),
        (None, None) => None,
    };
    let mut run = Run::settle(args.common)?;
    run.session.keep_prompt_end = true;
    let builtin = args.chat_template.as_deref().map(ChatTemplate::builtin).transpose().map_err(|error| {
        Failure::usage(format!("--chat-template: {error} (there are {})", ChatTemplate::builtin_names().join(", ")))
    })?;
    let from_file = args.chat_template_file.as_deref().map(template_file).transpose()?;
    let (model, _) = run.load()?;
    let template = match builtin {
        Some(template) => template,
        None => {
            let text = match &from_file {
                Some(text) => Some(&**text),
                None => model.chat_template()?,
            };
            let template = ChatTemplate::new(text, model.vocab());
            if template.is_builtin() {
                let which = if text.is_some() { "the chat template is empty" } else { "the file has no chat template" };
                eprintln!("{which}: messages are written as ChatML");
            }
            template
        }
    };
    let session = run.session(&model)?;
    let params = options::sampling(args.sampling, session.n_ctx())?;
    let mut chat = Chat {
        template,
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
    while let Some(line) = interrupt::while_waiting(|| input.next())? {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            "/help" => eprintln!("{HELP}"),
            "/clear" => chat.clear(),
            command if command.starts_with('/') && command != "/regen" && interactive => {
                eprintln!("{command} is no command; /help lists them");
            }
            line => {
                match if line == "/regen" { chat.regenerate() } else { chat.say(line) } {
                    // In a conversation a failed answer is not the end; in a script it is.
                    Err(Failure::Run(message)) if interactive => eprintln!("error: {message}"),
                    Err(Failure::Interrupted) if interactive => {}
                    result => result?,
                }
                // In a script it ends the program, also when it came as the answer was complete.
                if interactive {
                    interrupt::reset();
                }
            }
        }
    }
    if chat.answers > 0 {
        report::print(&chat.total, &chat.session.kv());
    }
    Ok(())
}

fn template_file(path: &Path) -> Result<String, Failure> {
    let bytes = options::read_file(path)?;
    String::from_utf8(bytes).map_err(|_| Failure::run(format!("{}: a chat template must be UTF-8", path.display())))
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

struct Chat {
    model: Model,
    session: Session,
    template: ChatTemplate,
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
        let prompt = self.template.render(&messages, true)?;
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
        let result = stream::answer(&self.model, &mut self.session, &mut sampler, &unread, self.limit, &[], |text| {
            out.write_all(text.as_bytes())?;
            out.flush()
        });
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
