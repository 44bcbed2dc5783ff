//! What the sources import from each other: lower folders know nothing of what lies above them, and no files import each
//! other in a circle.
//!
//! Imports are read from the sources' tokens: the trees of `use`, and paths that begin with `crate`, `self`, `super`, a
//! module's name or an imported one. Where a module only passes an item on (`pub use`), the file that has the item counts.
//! Code under `#[cfg(test)]` is left out: a test may use whatever helps it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fs,
    path::Path,
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Folders in which no files import each other in a circle, and how many files and imports are found in them at least.
const WITHOUT_CIRCLES: &[(&str, usize, usize)] = &[("src", 110, 300), ("ffi/src", 11, 21)];

/// Folders that import nothing of their crate but what lies in them.
const SELF_CONTAINED: &[&str] = &["src/ggml"];

/// Where crates begin. A file belongs to the longest that fits.
const CRATES: &[&str] = &["src", "src/bin/simlayer-run", "ffi/src"];

/// A path as a file names it.
#[derive(Debug, Clone)]
struct Import {
    /// Without `crate`, `self` and `super` where it began with one of those.
    path: Vec<String>,
    /// Whether `path` begins at the crate. Otherwise it begins with a module of the file, an imported name, or another crate.
    is_absolute: bool,
    /// What a `use` calls it; `None` for a path in other code.
    name: Option<String>,
}

#[derive(Debug)]
struct File {
    /// From the repository's root on.
    path: String,
    /// Its crate, as in [`CRATES`].
    root: &'static str,
    /// Where it stands in its crate.
    module: Vec<String>,
    imports: Vec<Import>,
}

impl File {
    fn new(path: String, source: &str) -> File {
        let roots = CRATES.iter().filter(|root| Path::new(&path).starts_with(root));
        let root = *roots.max_by_key(|root| root.len()).expect("a file of a crate");
        let inside = path[root.len() + 1..].strip_suffix(".rs").expect("a Rust file");
        let mut module: Vec<String> = inside.split('/').map(str::to_owned).collect();
        if ["lib", "main", "mod"].iter().any(|name| module.last().is_some_and(|last| last == name)) {
            module.pop();
        }
        let tokens = source.parse().unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut imports = Vec::new();
        read(tokens, &module, &mut imports);
        File { path, root, module, imports }
    }

    /// What a name stands for that a `use` has brought here.
    fn imported(&self, name: &str) -> Option<&Import> {
        self.imports.iter().find(|import| import.name.as_deref() == Some(name))
    }
}

/// Collects the paths in `tokens`, which stand in `module`.
fn read(tokens: TokenStream, module: &[String], imports: &mut Vec<Import>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut i = 0;
    while i < tokens.len() {
        match &tokens[i] {
            TokenTree::Punct(hash) if hash.as_char() == '#' && tokens.get(i + 1).is_some_and(is_test) => {
                i = end_of_item(&tokens, i + 2);
            }
            // `pub(in path)` imports nothing.
            TokenTree::Ident(word) if *word == "pub" => {
                i += 1 + usize::from(tokens.get(i + 1).is_some_and(|next| is_group(next, Delimiter::Parenthesis)));
            }
            TokenTree::Ident(word)
                if *word == "mod" && tokens.get(i + 2).is_some_and(|body| is_group(body, Delimiter::Brace)) =>
            {
                let inner = [module, &[tokens[i + 1].to_string()]].concat();
                if let TokenTree::Group(body) = &tokens[i + 2] {
                    read(body.stream(), &inner, imports);
                }
                i += 3;
            }
            // Not the `use<'a>` of a type.
            TokenTree::Ident(word) if *word == "use" && !tokens.get(i + 1).is_some_and(|next| is_punct(next, '<')) => {
                let end = i
                    + 1
                    + tokens[i + 1..].iter().position(|token| is_punct(token, ';')).unwrap_or(tokens.len() - i - 1);
                read_use(&tokens[i + 1..end], &[], module, imports);
                i = end;
            }
            TokenTree::Ident(word) => {
                let mut path = vec![word.to_string()];
                i += 1;
                while let [TokenTree::Punct(one), TokenTree::Punct(two), TokenTree::Ident(next), ..] = &tokens[i..]
                    && one.as_char() == ':'
                    && two.as_char() == ':'
                {
                    path.push(next.to_string());
                    i += 3;
                }
                if path.len() > 1 {
                    imports.push(import(path, None, module));
                }
            }
            TokenTree::Group(group) => {
                read(group.stream(), module, imports);
                i += 1;
            }
            _ => i += 1,
        }
    }
}

/// Collects the leaves of a tree after `use`.
fn read_use(tree: &[TokenTree], prefix: &[String], module: &[String], imports: &mut Vec<Import>) {
    let mut path = prefix.to_vec();
    let mut name = None;
    for (i, token) in tree.iter().enumerate() {
        match token {
            TokenTree::Group(branches) => {
                let branches: Vec<TokenTree> = branches.stream().into_iter().collect();
                for branch in branches.split(|token| is_punct(token, ',')).filter(|branch| !branch.is_empty()) {
                    read_use(branch, &path, module, imports);
                }
                return;
            }
            TokenTree::Ident(word) if *word == "as" => {
                name = tree.get(i + 1).map(ToString::to_string);
                break;
            }
            TokenTree::Ident(word) => path.push(word.to_string()),
            TokenTree::Punct(star) if star.as_char() == '*' => path.push("*".to_owned()),
            _ => {}
        }
    }
    if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    name = name.or_else(|| path.last().cloned());
    imports.push(import(path, name, module));
}

/// The path as seen from the crate, where that can be told without looking names up.
fn import(path: Vec<String>, name: Option<String>, module: &[String]) -> Import {
    let mut start = module.to_vec();
    let mut rest = &path[..];
    let mut is_absolute = false;
    while let [first, others @ ..] = rest {
        match first.as_str() {
            "crate" => start.clear(),
            "self" => {}
            "super" => drop(start.pop()),
            _ => break,
        }
        (rest, is_absolute) = (others, true);
    }
    let path = if is_absolute { [&start, rest].concat() } else { path };
    Import { path, is_absolute, name }
}

/// Whether this is the `[cfg(test)]` of an attribute, or one that asks for more than a test.
fn is_test(attribute: &TokenTree) -> bool {
    let text: String = attribute.to_string().split_whitespace().collect();
    text == "[cfg(test)]" || text.starts_with("[cfg(all(test,")
}

/// Behind the item that begins at `start`, or at the attributes and words before it.
fn end_of_item(tokens: &[TokenTree], start: usize) -> usize {
    let is_use = tokens[start..].iter().find_map(|token| match token {
        TokenTree::Ident(word) if *word != "pub" => Some(*word == "use"),
        _ => None,
    });
    let ends = |token: &TokenTree| {
        is_punct(token, ';') || is_use != Some(true) && (is_group(token, Delimiter::Brace) || is_punct(token, ','))
    };
    tokens[start..].iter().position(ends).map_or(tokens.len(), |length| start + length + 1)
}

fn is_punct(token: &TokenTree, char: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == char)
}

fn is_group(token: &TokenTree, delimiter: Delimiter) -> bool {
    matches!(token, TokenTree::Group(group) if group.delimiter() == delimiter)
}

/// Files, and which each of them imports.
struct Tree {
    files: Vec<File>,
    by_module: HashMap<(&'static str, Vec<String>), usize>,
}

impl Tree {
    fn new(files: Vec<File>) -> Tree {
        let by_module = files.iter().enumerate().map(|(i, file)| ((file.root, file.module.clone()), i)).collect();
        Tree { files, by_module }
    }

    /// All Rust files of [`CRATES`].
    fn of_repository() -> Tree {
        fn collect(root: &Path, folder: &Path, files: &mut Vec<File>) {
            for entry in fs::read_dir(root.join(folder)).expect("a folder") {
                let entry = entry.expect("an entry");
                let path = folder.join(entry.file_name());
                if entry.file_type().expect("a type").is_dir() {
                    collect(root, &path, files);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let source = fs::read_to_string(entry.path()).expect("a source");
                    files.push(File::new(path.to_str().expect("UTF-8").to_owned(), &source));
                }
            }
        }
        let (root, mut files) = (Path::new(env!("CARGO_MANIFEST_DIR")), Vec::new());
        for folder in ["src", "ffi/src"] {
            collect(root, Path::new(folder), &mut files);
        }
        Tree::new(files)
    }

    /// The files that an import of `file` leads to: that of the module that it names, and that of the item, if it is another.
    /// None where it leads out of the crate, and no item's where a module itself is imported.
    fn targets(&self, file: &File, import: &Import) -> Vec<usize> {
        let Some(mut path) = self.absolute(file, import, 0) else { return Vec::new() };
        let mut targets = Vec::new();
        // A chain of re-exports is not as long as this.
        for _ in 0..16 {
            let Some((holder, depth)) = self.holder(file.root, &path) else { break };
            let Some(name) = path.get(depth) else { break };
            targets.push(holder);
            let next = self.files[holder].imported(name).filter(|_| self.files[holder].path != file.path);
            let Some(next) = next.and_then(|next| self.absolute(&self.files[holder], next, 0)) else { break };
            path = [&next, &path[depth + 1..]].concat();
        }
        targets
    }

    /// The import's path from the crate on; `None` where it is of another crate.
    fn absolute(&self, file: &File, import: &Import, depth: usize) -> Option<Vec<String>> {
        if import.is_absolute {
            return Some(import.path.clone());
        }
        let (first, rest) = import.path.split_first()?;
        let child = [&file.module[..], std::slice::from_ref(first)].concat();
        if self.by_module.contains_key(&(file.root, child.clone())) {
            return Some([&child, rest].concat());
        }
        // A name may be imported as itself: of another crate.
        let imported = file.imported(first).filter(|other| other.path != import.path && depth < 8)?;
        Some([&self.absolute(file, imported, depth + 1)?, rest].concat())
    }

    /// The file of the innermost module on a path, and how many of the path's names lead to it.
    fn holder(&self, root: &'static str, path: &[String]) -> Option<(usize, usize)> {
        (0..=path.len()).rev().find_map(|n| Some((*self.by_module.get(&(root, path[..n].to_vec()))?, n)))
    }

    /// Which files the files in a folder import the items of.
    fn edges(&self, folder: &str) -> BTreeMap<usize, BTreeSet<usize>> {
        let inside = (0..self.files.len()).filter(|&i| Path::new(&self.files[i].path).starts_with(folder));
        inside
            .map(|i| {
                let file = &self.files[i];
                let items = file.imports.iter().filter_map(|import| self.targets(file, import).pop());
                (i, items.filter(|&target| target != i).collect())
            })
            .collect()
    }

    /// Each circle once, the shortest through each file: `a → b → a`.
    fn circles(&self, folder: &str) -> Vec<String> {
        let edges = self.edges(folder);
        let mut found = BTreeMap::new();
        for &start in edges.keys() {
            let mut before = HashMap::new();
            let mut queue = VecDeque::from([start]);
            while let Some(at) = queue.pop_front() {
                for &next in edges.get(&at).into_iter().flatten() {
                    if before.contains_key(&next) {
                        continue;
                    }
                    before.insert(next, at);
                    queue.push_back(next);
                }
            }
            if !before.contains_key(&start) {
                continue;
            }
            let mut circle = vec![start];
            let mut at = before[&start];
            while at != start {
                circle.push(at);
                at = before[&at];
            }
            circle.push(start);
            let names: Vec<&str> = circle.iter().rev().map(|&i| &*self.files[i].path).collect();
            found.entry(circle.iter().copied().collect::<BTreeSet<_>>()).or_insert(names.join(" → "));
        }
        found.into_values().collect()
    }

    /// What files in a folder import of their crate from elsewhere.
    fn strays(&self, folder: &str) -> Vec<String> {
        let is_inside = |path: &str| Path::new(path).starts_with(folder);
        let mut strays = Vec::new();
        for file in self.files.iter().filter(|file| is_inside(&file.path)) {
            for import in &file.imports {
                let outside = self.targets(file, import).into_iter().find(|&i| !is_inside(&self.files[i].path));
                if let Some(outside) = outside {
                    let (path, of) = (import.path.join("::"), &self.files[outside].path);
                    strays.push(format!("{}: {path} is of {of}", file.path));
                }
            }
        }
        strays
    }
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let tree = Tree::of_repository();
    for &(folder, n_files, n_imports) in WITHOUT_CIRCLES {
        let edges = tree.edges(folder);
        let found = (edges.len(), edges.values().map(BTreeSet::len).sum::<usize>());
        assert!(found.0 >= n_files && found.1 >= n_imports, "{folder} was not read: {found:?}");
        let circles = tree.circles(folder);
        assert!(circles.is_empty(), "circles in {folder}:\n{}", circles.join("\n"));
    }
}

#[test]
fn lower_folders_import_nothing_from_above() {
    let tree = Tree::of_repository();
    for folder in SELF_CONTAINED {
        let strays = tree.strays(folder);
        assert!(strays.is_empty(), "{folder} knows what lies above it:\n{}", strays.join("\n"));
    }
}

/// The rules themselves, on small trees.
mod rules {
    use super::*;

    fn tree(sources: &[(&str, &str)]) -> Tree {
        Tree::new(sources.iter().map(|(path, source)| File::new((*path).to_owned(), source)).collect())
    }

    #[test]
    fn circles_are_found_through_re_exports_braces_and_plain_paths() {
        let roots =
            [("src/lib.rs", "mod a;"), ("src/a/mod.rs", "mod b; mod c; pub use b::{B, deep::D as E}; use c::C;")];
        for (b, c) in [
            ("use super::C;", "use crate::a::B;"),
            ("use super::{super::a::{c::{self, C}}}; type T = C;", "type T = super::E;"),
            ("use super::c; fn f() { c::g() }", "fn f() { deep!(crate::a::b::h()) }"),
            ("mod inner { use super::super::c::C; }", "use crate::a::{b as other}; fn f() { other::h() }"),
        ] {
            let found = tree(&[roots[0], roots[1], ("src/a/b.rs", b), ("src/a/c.rs", c)]).circles("src/a");
            assert_eq!(found, ["src/a/b.rs → src/a/c.rs → src/a/b.rs"], "{b} {c}");
        }
    }

    #[test]
    fn what_is_no_import_makes_no_circle() {
        let root = ("src/a/mod.rs", "mod b; mod c; pub use b::B; pub use c::C;");
        for b in [
            "#[cfg(test)] mod tests { use super::super::C; }",
            "#[cfg(test)] use super::{C}; fn f() {}",
            "//! super::C\n/// [`super::C`]\nconst C: &str = \"super::C\";",
            "pub(in crate::a) struct S; use std::{c::C}; use super::c;",
            "impl B { fn f(self) { self.c.C() } }",
        ] {
            let found = tree(&[root, ("src/a/b.rs", b), ("src/a/c.rs", "use super::b::B;")]).circles("src/a");
            assert!(found.is_empty(), "{b}: {found:?}");
        }
    }

    /// Although what is passed on comes from the folder itself.
    #[test]
    fn imports_from_above_are_found() {
        let above = [("src/lib.rs", "mod a; mod up; pub use a::A;"), ("src/up.rs", "pub use crate::a::A;")];
        for (source, n) in [
            ("use crate::up::A;", 1),
            ("use crate::A;", 1),
            ("fn f() { super::super::up::g() }", 1),
            ("use crate::{a::{A, c::C}, up::{x, y}};", 2),
            ("use super::A; use crate::a::c::C; use up::A as B;", 0),
        ] {
            let inside = [("src/a/mod.rs", "mod b; mod c; pub struct A;"), ("src/a/b.rs", source), ("src/a/c.rs", "")];
            let found = tree(&[above[0], above[1], inside[0], inside[1], inside[2]]).strays("src/a");
            assert_eq!(found.len(), n, "{source}: {found:?}");
        }
    }
}
