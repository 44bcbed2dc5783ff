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
mod parallel;
mod plain;
mod routing;

pub(super) use attention::{RopeFactors, SelfAttention, Temperature};
pub(super) use builder::Builder;
pub(super) use decoder::{Block, Decoder};
pub(super) use experts::Experts;
pub(super) use feed_forward::FeedForward;
pub(super) use gated::{Activation, Gated};
pub(super) use layer::Layer;
pub(super) use linear::Linear;
pub(super) use norm::Norm;
pub(super) use parallel::Parallel;
pub(super) use plain::{Plain, Unary};
pub(super) use routing::Routing;

use super::Error;
