//! How much memory caches hold: counted by the buffers themselves, not by formulas.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Counts the bytes of a session's cache buffers, now and at their highest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    now: AtomicUsize,
    peak: AtomicUsize,
}

/// Bytes that count while this value lives.
#[derive(Debug)]
pub(crate) struct Lease {
    meter: Meter,
    bytes: usize,
}

impl Meter {
    pub fn lease(&self, bytes: usize) -> Lease {
        let now = self.counts.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.counts.peak.fetch_max(now, Ordering::Relaxed);
        Lease { meter: self.clone(), bytes }
    }

    pub fn now(&self) -> usize {
        self.counts.now.load(Ordering::Relaxed)
    }

    pub fn peak(&self) -> usize {
        self.counts.peak.load(Ordering::Relaxed)
    }
}

impl Lease {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Other bytes in the same count.
    pub fn another(&self, bytes: usize) -> Lease {
        self.meter.lease(bytes)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.meter.counts.now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_is_the_highest_sum() {
        let meter = Meter::default();
        let first = meter.lease(100);
        drop(meter.lease(50));
        drop(first);
        let _third = meter.lease(120);
        assert_eq!((meter.now(), meter.peak()), (120, 150));
    }
}
