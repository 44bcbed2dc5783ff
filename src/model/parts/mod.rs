//! What architectures are made of. An architecture's file picks the parts that its layers have.

mod altup;
mod attention;
mod builder;
mod decoder;
mod delta_net;
mod experts;
mod feed_forward;
mod gated;
mod latent;
mod layer;
mod layer_embeddings;
mod linear;
mod mamba2;
mod mixer;
mod norm;
mod parallel;
mod plain;
mod routing;
mod short_conv;

pub(super) use altup::{AltUp, Predictor};
pub(super) use attention::{RopeFactors, SelfAttention, Temperature};
pub(super) use builder::Builder;
pub(super) use decoder::{Block, Decoder};
pub(super) use delta_net::{DeltaNet, attending_layers};
pub(super) use experts::Experts;
pub(super) use feed_forward::FeedForward;
pub(super) use gated::{Activation, Gated};
pub(super) use latent::LatentAttention;
pub(super) use layer::Layer;
pub(super) use layer_embeddings::{LayerEmbeddings, OwnInput};
pub(super) use linear::Linear;
pub(super) use mamba2::Mamba2;
pub(super) use mixer::Mixer;
pub(super) use norm::Norm;
pub(super) use parallel::Parallel;
pub(super) use plain::{Plain, Unary};
pub(super) use routing::Routing;
pub(super) use short_conv::ShortConv;

use super::Error;
