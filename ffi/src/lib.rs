//! The C ABI of simlayer. Nothing is exported yet.
