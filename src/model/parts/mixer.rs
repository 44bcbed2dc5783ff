//! What a layer has to bring tokens together.

use super::{DeltaNet, LatentAttention, Mamba2, SelfAttention, ShortConv};
use crate::{
    ggml::{Graph, Tensor},
    model::{Attention, LayerStep},
};

/// What brings a layer's tokens together: attention, or a recurrent state.
pub(in crate::model) enum Mixer {
    Attention(Box<SelfAttention>),
    Latent(LatentAttention),
    DeltaNet(DeltaNet),
    Mamba2(Mamba2),
    ShortConv(ShortConv),
    /// Attention and a state beside each other, of the same input.
    Both(Box<(SelfAttention, Mamba2)>),
}

impl Mixer {
    /// `input` `[n_embd, n]` → `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, step: &LayerStep<'_>, input: &Tensor, attention: &mut dyn Attention) -> Tensor {
        match self {
            Mixer::Attention(own) => own.apply(graph, step, input, attention),
            Mixer::Latent(own) => own.apply(graph, step, input, attention),
            Mixer::DeltaNet(net) => net.apply(graph, step, input, attention),
            Mixer::Mamba2(mamba) => mamba.apply(graph, step, input, attention),
            Mixer::ShortConv(conv) => conv.apply(graph, step, input, attention),
            Mixer::Both(both) => {
                let (own, mamba) = &**both;
                let attended = own.apply(graph, step, input, attention);
                graph.add(&attended, &mamba.apply(graph, step, input, attention))
            }
        }
    }
}

impl From<SelfAttention> for Mixer {
    fn from(attention: SelfAttention) -> Mixer {
        Mixer::Attention(Box::new(attention))
    }
}

impl From<LatentAttention> for Mixer {
    fn from(attention: LatentAttention) -> Mixer {
        Mixer::Latent(attention)
    }
}

impl From<DeltaNet> for Mixer {
    fn from(net: DeltaNet) -> Mixer {
        Mixer::DeltaNet(net)
    }
}

impl From<Mamba2> for Mixer {
    fn from(mamba: Mamba2) -> Mixer {
        Mixer::Mamba2(mamba)
    }
}

impl From<ShortConv> for Mixer {
    fn from(conv: ShortConv) -> Mixer {
        Mixer::ShortConv(conv)
    }
}
