//! What architectures are made of. An architecture's file picks the parts that its layers have.

mod attention;
mod builder;
mod decoder;
mod experts;
mod feed_forward;
mod gated;
mod layer;
mod linear;
mod norm;

pub(super) use attention::{RopeFactors, SelfAttention, Temperature};
pub(super) use builder::Builder;
pub(super) use decoder::{Block, Decoder};
pub(super) use experts::{Experts, Routing};
pub(super) use feed_forward::FeedForward;
pub(super) use gated::{Activation, Gated};
pub(super) use layer::Layer;
pub(super) use linear::Linear;
pub(super) use norm::Norm;

use super::Error;
