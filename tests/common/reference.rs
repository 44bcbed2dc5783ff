//! A slow, straightforward llama in f32: every key is kept, and a query attends to what a function says. No ring, no
//! quantisation, no batches. The engine's caches are tested against it.

use std::path::Path;

use simlayer::{Hparams, Token, gguf::Gguf};

pub struct Reference {
    table: Vec<f32>,
    output: Vec<f32>,
    output_norm: Vec<f32>,
    layers: Vec<Layer>,
    hparams: Hparams,
    n_past: usize,
    /// The attention weights of the last token: layer, head, key.
    pub weights: Vec<Vec<Vec<f32>>>,
    /// Of the last token: its hidden state behind each layer.
    pub hidden: Vec<Vec<f32>>,
}

struct Layer {
    attn_norm: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    o: Vec<f32>,
    ffn_norm: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Reference {
    /// A model of plain layers: f32 weights, no biases, no RoPE scaling.
    pub fn load(path: &Path, hparams: &Hparams) -> Reference {
        let file = Gguf::open(path).expect("a model");
        let tensor = |name: &str| -> Vec<f32> {
            let info = file.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
            file.data(info).chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4"))).collect()
        };
        let layer = |i: usize| {
            let part = |name: &str| tensor(&format!("blk.{i}.{name}.weight"));
            Layer {
                attn_norm: part("attn_norm"),
                q: part("attn_q"),
                k: part("attn_k"),
                v: part("attn_v"),
                o: part("attn_output"),
                ffn_norm: part("ffn_norm"),
                gate: part("ffn_gate"),
                up: part("ffn_up"),
                down: part("ffn_down"),
                keys: Vec::new(),
                values: Vec::new(),
            }
        };
        let table = tensor("token_embd.weight");
        Reference {
            output: file.tensor("output.weight").map_or_else(|| table.clone(), |_| tensor("output.weight")),
            output_norm: tensor("output_norm.weight"),
            layers: (0..hparams.n_layer).map(layer).collect(),
            hparams: hparams.clone(),
            table,
            n_past: 0,
            weights: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// One more token: its logits. `sees(layer, query, key)` tells what a query attends to.
    pub fn decode(&mut self, token: Token, sees: &dyn Fn(usize, usize, usize) -> bool) -> Vec<f32> {
        let Hparams { n_embd, n_head, n_head_kv, head_size, norm_eps, .. } = self.hparams;
        let position = self.n_past;
        let rope_base = self.hparams.rope.freq_base;
        let mut hidden = self.table[token as usize * n_embd..][..n_embd].to_vec();
        self.weights = vec![vec![Vec::new(); n_head]; self.layers.len()];
        self.hidden.clear();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let input = norm(&hidden, &layer.attn_norm, norm_eps);
            let mut q = multiply(&layer.q, &input);
            let mut k = multiply(&layer.k, &input);
            for head in q.chunks_exact_mut(head_size).chain(k.chunks_exact_mut(head_size)) {
                rope(head, position, rope_base);
            }
            layer.keys.push(k);
            layer.values.push(multiply(&layer.v, &input));
            let mut attended = vec![0.0; n_head * head_size];
            for head in 0..n_head {
                let shared = head / (n_head / n_head_kv) * head_size;
                let query = &q[head * head_size..][..head_size];
                let visible: Vec<usize> = (0..=position).filter(|&key| sees(index, position, key)).collect();
                let scores: Vec<f32> = visible
                    .iter()
                    .map(|&key| dot(query, &layer.keys[key][shared..][..head_size]) / (head_size as f32).sqrt())
                    .collect();
                let highest = scores.iter().copied().fold(f32::MIN, f32::max);
                let exps: Vec<f32> = scores.iter().map(|score| (score - highest).exp()).collect();
                let sum: f32 = exps.iter().sum();
                let mut weights = vec![0.0; position + 1];
                for (&key, exp) in visible.iter().zip(exps) {
                    weights[key] = exp / sum;
                    let value = &layer.values[key][shared..][..head_size];
                    for (out, value) in attended[head * head_size..][..head_size].iter_mut().zip(value) {
                        *out += weights[key] * value;
                    }
                }
                self.weights[index][head] = weights;
            }
            add(&mut hidden, &multiply(&layer.o, &attended));
            let input = norm(&hidden, &layer.ffn_norm, norm_eps);
            let up = multiply(&layer.up, &input);
            let gated: Vec<f32> = multiply(&layer.gate, &input)
                .iter()
                .zip(up)
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            add(&mut hidden, &multiply(&layer.down, &gated));
            self.hidden.push(hidden.clone());
        }
        self.n_past += 1;
        multiply(&self.output, &norm(&hidden, &self.output_norm, norm_eps))
    }
}

/// Rows of `matrix` times `input`.
fn multiply(matrix: &[f32], input: &[f32]) -> Vec<f32> {
    matrix.chunks_exact(input.len()).map(|row| dot(row, input)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

fn norm(input: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = dot(input, input) / input.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    input.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

fn rope(head: &mut [f32], position: usize, base: f32) {
    let n = head.len();
    let step = base.powf(-2.0 / n as f32);
    let mut angle = position as f32;
    for i in (0..n).step_by(2) {
        let (sin, cos) = angle.sin_cos();
        let (a, b) = (head[i], head[i + 1]);
        (head[i], head[i + 1]) = (a * cos - b * sin, a * sin + b * cos);
        // As ggml does: one factor after the other, whose rounding adds up at high positions.
        angle *= step;
    }
}
