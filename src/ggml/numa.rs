//! Machines with several memory nodes.

use std::sync::Once;

use ggml_sys as sys;

/// Where ggml's threads run, on a machine with several memory nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numa {
    /// Evenly over all nodes.
    Distribute,
    /// On the node that the program was started on.
    Isolate,
    /// Where numactl allows it.
    Numactl,
}

/// Lets threads run so from now on. The first call counts; without several nodes it does nothing.
pub fn spread_threads(numa: Numa) {
    static ONCE: Once = Once::new();
    let strategy = match numa {
        Numa::Distribute => sys::GGML_NUMA_STRATEGY_DISTRIBUTE,
        Numa::Isolate => sys::GGML_NUMA_STRATEGY_ISOLATE,
        Numa::Numactl => sys::GGML_NUMA_STRATEGY_NUMACTL,
    };
    // SAFETY: it reads what the system says of its nodes into a table of ggml's own, once and here only.
    ONCE.call_once(|| unsafe { sys::ggml_numa_init(strategy) });
}
