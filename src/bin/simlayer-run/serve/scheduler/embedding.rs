//! Embeddings: read piece by piece between the steps.

use simlayer::{BatchEntry, Outputs, Token};
use tokio::sync::oneshot;

use super::{super::error::ApiError, Scheduler, conversation::Embedding};

impl Scheduler {
    pub(super) fn begin_embedding(&mut self, tokens: Vec<Token>, reply: oneshot::Sender<Result<Vec<f32>, ApiError>>) {
        // One at a time: the others are read to their end first.
        while self.embedding.is_some() {
            self.step_embedding();
        }
        let bytes = self.session.bytes_of(tokens.len());
        if !self.make_room(bytes, None) {
            let _ = reply.send(Err(ApiError::busy("there is no memory for this text now (--kv-mem): try again later")));
            return;
        }
        let seq = self.new_seq();
        self.embedding = Some(Embedding { seq, tokens, reply });
    }

    pub(super) fn step_embedding(&mut self) {
        let Some(embedding) = self.embedding.take() else { return };
        let done = self.session.seq_n_past(embedding.seq);
        let rest = &embedding.tokens[done..];
        let n = rest.len().min(self.pace.piece(self.running.len()).max(1));
        let is_last = n == rest.len();
        self.session.set_embeddings(is_last);
        let outputs = if is_last { Outputs::Last } else { Outputs::None };
        let entry = BatchEntry { seq: embedding.seq, tokens: &rest[..n], outputs, prompt_end: false };
        let result = self.session.run(&[entry]);
        let state = self.session.embeddings().to_vec();
        self.session.set_embeddings(false);
        match result {
            Ok(()) if !is_last && !embedding.reply.is_closed() => self.embedding = Some(embedding),
            result => {
                self.session.seq_clear(embedding.seq);
                let length = state.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
                let state = result.map(|()| state.iter().map(|x| x / length).collect());
                let state = state.map_err(|error| ApiError::internal(format!("the model could not be run: {error}")));
                let _ = embedding.reply.send(state);
            }
        }
    }
}
