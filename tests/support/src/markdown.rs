//! The commands that documentation tells its readers to type.

/// Commands of a Markdown text's blocks of shell, each as its words, with the line where it begins. Comments, variables before
/// a command, and where its output goes are not part of it.
pub fn commands(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut is_shell = None;
    let mut begun: Option<(usize, String)> = None;
    for (number, line) in text.lines().enumerate() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            is_shell = match is_shell {
                None => Some(matches!(language.trim(), "sh" | "")),
                Some(_) => None,
            };
            continue;
        }
        if is_shell != Some(true) {
            continue;
        }
        let (from, mut whole) = begun.take().unwrap_or((number + 1, String::new()));
        match line.trim_end().strip_suffix('\\') {
            Some(part) => {
                whole.push_str(part);
                begun = Some((from, whole));
            }
            None => {
                whole.push_str(line);
                found.extend(split(&whole).into_iter().map(|words| (from, words)));
            }
        }
    }
    found
}

/// The commands of one line.
fn split(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut redirected = false;
    let mut chars = line.chars().peekable();
    let end = |word: &mut Option<String>, commands: &mut Vec<Vec<String>>, redirected: &mut bool| {
        let Some(word) = word.take() else { return };
        if std::mem::take(redirected) {
            return;
        }
        let command = commands.last_mut().expect("there is always one");
        let is_variable = word.split_once('=').is_some_and(|(name, _)| {
            !name.is_empty()
                && name.chars().all(|char| char.is_ascii_uppercase() || char == '_' || char.is_ascii_digit())
        });
        if !(command.is_empty() && is_variable) {
            command.push(word);
        }
    };
    while let Some(char) = chars.next() {
        match char {
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                word.extend(chars.by_ref().take_while(|&other| other != char));
            }
            '#' if word.is_none() => break,
            ' ' | '\t' => end(&mut word, &mut commands, &mut redirected),
            '|' | ';' | '&' => {
                end(&mut word, &mut commands, &mut redirected);
                commands.push(Vec::new());
            }
            '>' | '<' => {
                // Of `2>` the number is no word.
                if word.as_deref() == Some("2") {
                    word = None;
                }
                end(&mut word, &mut commands, &mut redirected);
                redirected = true;
            }
            _ => word.get_or_insert_default().push(char),
        }
    }
    end(&mut word, &mut commands, &mut redirected);
    commands.retain(|command| !command.is_empty());
    commands
}

/// Every Markdown file of the repository that its users read, with its text.
pub fn documents(root: &std::path::Path) -> Vec<(String, String)> {
    let docs = std::fs::read_dir(root.join("docs")).expect("there is a folder docs");
    let mut files: Vec<_> = docs.map(|entry| entry.expect("it can be listed").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.extend(["README.md", "CONTRIBUTING.md"].map(|name| root.join(name)));
    files.sort();
    let read = |file: std::path::PathBuf| {
        let text = std::fs::read_to_string(&file).expect("it is text");
        (file.strip_prefix(root).unwrap_or(&file).display().to_string(), text)
    };
    files.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found() {
        let text = "Say `nothing`.\n```sh\nA=1 B_2=\"x y\" run -p \"The sea is\" --t 2 > out.txt 2> log   # comment\n\
                    head -c 5 story | run -f - \\\n  --plot 'a b.svg' & run 2\n# nothing\n```\n```rust\nlet no = 1;\n```\n";
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            commands(text),
            [
                (3, words(&["run", "-p", "The sea is", "--t", "2"])),
                (4, words(&["head", "-c", "5", "story"])),
                (4, words(&["run", "-f", "-", "--plot", "a b.svg"])),
                (4, words(&["run", "2"])),
            ]
        );
    }
}
