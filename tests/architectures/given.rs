//! Rows of embeddings in place of tokens, as what sees pictures for a model gives them.

use simlayer::{BatchEntry, Embeddings, Outputs, Session, SessionParams, Token, ggml::Type};
use simlayer_testkit::{Given, RandomDecoder, Rng, Shape, gguf::Meta, metrics::mean_kl};

use super::{
    check::{MAX_KL, Written, in_one_thread, upstream, write},
    common::{lazy_f16, plain, session},
    dense::{random_qwen2vl, random_qwen3vl},
    random_gemma3, random_granite,
    shared::{gemma4_small, random_gemma3n, random_gemma4},
};

/// Tokens before the picture, and behind it.
const N_BEFORE: usize = 50;
const N_AFTER: usize = 40;
/// Its rows and columns.
const GRID: [usize; 2] = [4, 7];
const N_ROWS: usize = GRID[0] * GRID[1];

/// A text with a picture in it.
struct Page {
    written: Written,
    rows: Vec<f32>,
    /// For upstream, which wants them of all models.
    positions: Vec<i32>,
    per_token: usize,
    see_each_other: bool,
}

impl Page {
    fn new(random: &RandomDecoder, see_each_other: bool) -> Page {
        let written = write(random, N_BEFORE + N_AFTER);
        let hparams = written.model.hparams();
        let mut rng = Rng::new(11);
        let rows = (0..N_ROWS * hparams.n_embd_input()).map(|_| rng.normal()).collect();
        let per_token = hparams.rope.kind.positions_per_token();
        let number = |dimension: usize, cell: usize| match dimension {
            0 => N_BEFORE,
            1 => N_BEFORE + cell / GRID[1],
            2 => N_BEFORE + cell % GRID[1],
            _ => 0,
        };
        let positions: Vec<i32> = match per_token {
            1 => (N_BEFORE..N_BEFORE + N_ROWS).map(|position| position as i32).collect(),
            _ => (0..per_token).flat_map(|d| (0..N_ROWS).map(move |cell| number(d, cell) as i32)).collect(),
        };
        Page { written, rows, positions, per_token, see_each_other }
    }

    fn before(&self) -> &[Token] {
        &self.written.tokens[..N_BEFORE]
    }

    fn after(&self) -> &[Token] {
        &self.written.tokens[N_BEFORE..]
    }

    /// Where the text behind the picture begins.
    fn next(&self) -> usize {
        N_BEFORE + if self.per_token > 1 { GRID[0].max(GRID[1]) } else { N_ROWS }
    }

    fn embeddings(&self) -> Embeddings<'_> {
        let positions = if self.per_token > 1 { &self.positions[..] } else { &[] };
        Embeddings { rows: &self.rows, positions, see_each_other: self.see_each_other }
    }

    fn theirs(&self, flash_attn: bool, ty: Type) -> Vec<Vec<f32>> {
        let fa = if flash_attn { "on" } else { "off" };
        let given = Given {
            before: self.before(),
            rows: &self.rows,
            positions: &self.positions,
            non_causal: self.see_each_other,
            next: self.next(),
            after: self.after(),
        };
        let reference = upstream().with_options(&["-fa", fa, "-ctk", ty.name(), "-ctv", ty.name()]);
        reference.given(&self.written.path, &given)
    }

    /// Reads the text before, and the picture. The last row's logits.
    fn read(&self, params: &SessionParams) -> (Session, Vec<f32>) {
        let mut session = session(&self.written.model, params.clone());
        session.prefill(self.before()).expect("prefill");
        session.run_embeddings(0, &self.embeddings(), Outputs::Last, false).expect("a picture");
        let row = session.logits().to_vec();
        (session, row)
    }

    /// As upstream's rows: of the picture's last one, and of each token behind it.
    fn ours(&self, params: &SessionParams) -> Vec<Vec<f32>> {
        let (mut session, row) = self.read(params);
        let entry = BatchEntry { seq: 0, tokens: self.after(), outputs: Outputs::All, prompt_end: true };
        session.run(&[entry]).expect("text");
        let n_vocab = self.written.model.hparams().n_vocab;
        std::iter::once(row).chain(session.logits().chunks_exact(n_vocab).map(<[f32]>::to_vec)).collect()
    }

    fn params(&self) -> SessionParams {
        let mut params = in_one_thread(plain());
        params.fused_attention = false;
        params
    }
}

fn check(random: &RandomDecoder, see_each_other: bool) {
    let page = Page::new(random, see_each_other);
    let name = random.architecture;
    let is_as_upstream = |run: &str, theirs: &[Vec<f32>], params: &SessionParams| {
        let kl = mean_kl(theirs, &page.ours(params));
        println!("{name}: {run}: mean KL {kl:.2e}");
        assert!(kl < MAX_KL, "{name}: {run}: mean KL {kl}");
    };
    let theirs = page.theirs(true, Type::F16);
    is_as_upstream("ggml's flash attention", &theirs, &page.params());
    if !see_each_other {
        is_as_upstream("in pieces", &theirs, &SessionParams { n_ubatch: 16, ..page.params() });
    }
    let separate = SessionParams { flash_attn: false, ..page.params() };
    is_as_upstream("no flash attention", &page.theirs(false, Type::F16), &separate);
    let mut fused = SessionParams { fused_attention: true, ..page.params() };
    (fused.type_k, fused.type_v) = (Type::F32, Type::F32);
    is_as_upstream("our kernel", &page.theirs(true, Type::F32), &fused);

    // The picture matters.
    let mut other = Page::new(random, see_each_other);
    other.rows.iter_mut().for_each(|x| *x = -*x);
    let kl = mean_kl(&theirs, &other.ours(&page.params()));
    assert!(kl > 100.0 * MAX_KL, "{name}: another picture changes nothing: {kl}");
    goes_on(name, &page);
}

/// Copies and states know where the text behind goes on, and so does who goes back into it.
fn goes_on(name: &str, page: &Page) {
    let params = page.params();
    let (mut session, _) = page.read(&params);
    assert_eq!(session.seq_next_position(0), page.next(), "{name}");
    let mut state = Vec::new();
    session.save_seq(0, &mut state).expect("saved");
    let (first, last) = page.after().split_at(20);
    let expected = session.sequence(0).prefill(first).expect("text").to_vec();
    let mut loaded = super::session(&page.written.model, params.clone());
    loaded.load_seq(0, &state).expect("loaded");
    loaded.sequence(0).copy_to(1).expect("copied");
    for seq in [0, 1] {
        let rows = loaded.sequence(seq).prefill(first).expect("text").to_vec();
        assert_eq!(rows, expected, "{name}: sequence {seq} of a state");
    }
    loaded.sequence(0).prefill(last).expect("text");
    assert!(loaded.truncate(N_BEFORE + N_ROWS + 10), "{name}");
    let rows = loaded.prefill(&first[10..]).expect("text").to_vec();
    let kl = mean_kl(&[expected], &[rows]);
    assert!(kl < MAX_KL, "{name}: gone back into the text: mean KL {kl}");
}

/// Llama, one position a token: rows are not scaled, nor is anything else.
#[test]
fn one_position_a_token() {
    let mut m = RandomDecoder::new("llama", Shape::default());
    m.key("rope.dimension_count", m.shape.head_size as u32);
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.gated(i);
    }
    check(&m, false);
}

#[test]
fn several_positions_a_token() {
    check(&random_qwen2vl(Shape::default()), false);
    check(&random_qwen2vl(Shape::other()), false);
}

/// Each row has others besides, which go to the first layers.
#[test]
fn rows_for_the_first_layers() {
    check(&random_qwen3vl(Shape { head_size: 32, ..Shape::default() }), false);
}

/// Tokens' embeddings are scaled, rows are not; the picture's rows see each other, through windows, too.
#[test]
fn rows_that_see_each_other() {
    let shape = Shape { n_layer: 14, tied: true, post_norm: 0.4, head_size: 32, ..Shape::default() };
    check(&random_gemma3(shape), true);
}

/// Rows have no embeddings for each layer: the first token's serve.
#[test]
fn rows_without_layer_embeddings() {
    check(&random_gemma4(gemma4_small()), false);
    let mut gemma3n = random_gemma3n(Shape { n_layer: 6, tied: true, ..Shape::default() }, Some(&[1, 4]));
    gemma3n.key("attention.shared_kv_layers", 2u32);
    check(&gemma3n, false);
}

/// Rows are scaled as tokens' embeddings are.
#[test]
fn scaled_rows() {
    check(&random_granite(Shape { head_size: 32, ..Shape::other() }), false);
}

/// Layers become lazy behind a picture: scores and looks are of the text.
#[test]
fn layers_become_lazy_behind_a_picture() {
    let mut m = RandomDecoder::new("qwen2vl", Shape::default());
    m.key("rope.dimension_sections", Meta::array([3, 3, 2, 0]));
    m.key("attention.layer_norm_rms_epsilon", 0f32);
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.gated(i);
    }
    let page = Page::new(&m, false);
    for policy in ["layers:1,2", "budget:0.5", "kl:1000"] {
        let mut params = in_one_thread(lazy_f16(policy, 16));
        params.lazy.n_queries = 8;
        let (mut session, _) = page.read(&params);
        session.sequence(0).prefill(page.after()).expect("text");
        assert!(session.kv().lazy_layers > 0, "{policy}");
        assert!(session.logits().iter().all(|x| x.is_finite()), "{policy}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let page = Page::new(&random_qwen2vl(Shape::default()), false);
    let mut session = session(&page.written.model, page.params());
    session.prefill(page.before()).expect("prefill");
    let embeddings = page.embeddings();
    let wrong = [
        Embeddings { rows: &page.rows[1..], ..embeddings },
        Embeddings { rows: &[], ..embeddings },
        Embeddings { positions: &page.positions[1..], ..embeddings },
        Embeddings { positions: &vec![3; page.positions.len()], ..embeddings },
    ];
    for wrong in wrong {
        let error = session.run_embeddings(0, &wrong, Outputs::Last, false).expect_err("it does not fit");
        assert!(matches!(error, simlayer::Error::Embeddings(_)), "{error}");
        assert_eq!(session.n_past(), N_BEFORE);
    }
}
