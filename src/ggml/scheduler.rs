//! Running graphs on devices.

use std::{
    collections::HashSet,
    ffi::{CStr, c_void},
    fmt,
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use ggml_sys as sys;

use super::{
    Device, DeviceKind, Error, Graph, Type,
    context::{Inner, freed_device_memory, note_freed_device_memory},
};

/// ggml's own limit, the processor counted (`GGML_SCHED_MAX_BACKENDS`).
const MAX_DEVICES: usize = 16;

/// Runs graphs on one or more devices: splits them, gives their tensors memory, computes.
pub struct Scheduler {
    raw: NonNull<sys::ggml_backend_sched>,
    backends: Vec<Backend>,
    /// The graph whose tensors have memory now.
    current: Option<Arc<Inner>>,
    /// Whether devices may be computing it.
    running: bool,
    /// What [`freed_device_memory`] was when it got memory.
    freed: u64,
    /// [`Graph::leaves`] of the last graph that got memory.
    leaves: Option<u64>,
    max_nodes: usize,
    threads: usize,
    /// Threads of the caller's, used instead of our own.
    attached: Option<NonNull<sys::ggml_threadpool>>,
    abort: Arc<Abort>,
}

/// What ends a computation: our flag, or the caller's callback.
struct Abort {
    flag: Arc<AtomicBool>,
    callback: Mutex<Option<AbortCallback>>,
}

/// A C function that is asked now and then during a computation whether to end it, with its argument.
pub type AbortCallback = (unsafe extern "C" fn(*mut c_void) -> bool, *mut c_void);

// SAFETY: whoever sets a callback promises that it may be called from any thread (`set_abort_callback`).
unsafe impl Send for Abort {}
// SAFETY: as above.
unsafe impl Sync for Abort {}

// SAFETY: the scheduler and its backends are used through `&mut self` by one thread at a time.
unsafe impl Send for Scheduler {}

/// A started device.
struct Backend {
    device: Device,
    raw: NonNull<sys::ggml_backend>,
    threadpool: Option<ThreadPool>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's alone; the thread pool, a field, goes after it.
        unsafe { sys::ggml_backend_free(self.raw.as_ptr()) }
    }
}

/// Threads that live as long as the scheduler, so that a decode step starts none.
struct ThreadPool(NonNull<sys::ggml_threadpool>);

impl ThreadPool {
    fn new(threads: usize) -> Option<ThreadPool> {
        // SAFETY: the parameters are a plain struct that ggml fills and reads.
        unsafe {
            let mut params = sys::ggml_threadpool_params_default(threads as i32);
            NonNull::new(sys::ggml_threadpool_new(&mut params)).map(ThreadPool)
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's alone and no graph is running.
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) }
    }
}

impl Scheduler {
    /// Starts the devices; the processor is added at the end when it is not among them. `max_nodes` bounds the graphs.
    pub fn new(devices: &[Device], threads: usize, max_nodes: usize) -> Result<Scheduler, Error> {
        Scheduler::with_abort_flag(devices, threads, max_nodes, true, Arc::default())
    }

    /// As [`Scheduler::new`], with a flag that ends computations: see [`Scheduler::abort_flag`]. `offload`: devices that want to
    /// may compute what reads the processor's weights.
    pub fn with_abort_flag(
        devices: &[Device],
        threads: usize,
        max_nodes: usize,
        offload: bool,
        flag: Arc<AtomicBool>,
    ) -> Result<Scheduler, Error> {
        let mut devices = devices.to_vec();
        if !devices.contains(&Device::cpu()) {
            devices.push(Device::cpu());
        }
        if devices.len() > MAX_DEVICES {
            let n = devices.len();
            return Err(Error::Device(format!("number {n} (ggml computes on at most {MAX_DEVICES} at once)")));
        }
        let abort = Arc::new(Abort { flag, callback: Mutex::new(None) });
        let mut backends = Vec::new();
        for device in devices {
            // SAFETY: a live device, no parameters.
            let raw = unsafe { sys::ggml_backend_dev_init(device.raw(), std::ptr::null()) };
            let raw = NonNull::new(raw).ok_or_else(|| Error::Device(device.name()))?;
            let backend = Backend { device, raw, threadpool: None };
            if device.kind() == DeviceKind::Cpu {
                // SAFETY: `abort` outlives the backend: the scheduler owns both and drops the backend first.
                unsafe {
                    let flag = Arc::as_ptr(&abort).cast_mut().cast::<c_void>();
                    sys::ggml_backend_cpu_set_abort_callback(raw.as_ptr(), Some(is_set), flag);
                }
            }
            backends.push(backend);
        }
        let mut handles: Vec<_> = backends.iter().map(|backend| backend.raw.as_ptr()).collect();
        // SAFETY: the list is copied; null buffer types mean each backend's own.
        let raw = unsafe {
            sys::ggml_backend_sched_new(
                handles.as_mut_ptr(),
                std::ptr::null_mut(),
                handles.len() as i32,
                max_nodes,
                false,
                offload,
            )
        };
        let raw = NonNull::new(raw).ok_or_else(|| Error::Device("scheduler".into()))?;
        let mut scheduler = Scheduler {
            raw,
            backends,
            current: None,
            running: false,
            freed: 0,
            leaves: None,
            max_nodes,
            threads: 0,
            attached: None,
            abort,
        };
        scheduler.set_threads(threads)?;
        Ok(scheduler)
    }

    /// Uses this many threads on the processor from now on, but never more than the process has cores: ggml's threads
    /// spin until the last of them has done its part of a node, so that one without a core holds up all others for as
    /// long as the system gives each a turn.
    pub fn set_threads(&mut self, threads: usize) -> Result<(), Error> {
        let cores = std::thread::available_parallelism().map_or(threads, usize::from);
        let threads = threads.min(cores).clamp(1, sys::GGML_MAX_N_THREADS as usize);
        if let Some(pool) = self.attached {
            // SAFETY: `attach_threadpool`'s caller keeps the pool alive until it is detached; live handles.
            unsafe {
                for backend in &self.backends {
                    if sys::ggml_backend_is_cpu(backend.raw.as_ptr()) {
                        // Where the pool has fewer threads, ggml takes as many as it has.
                        sys::ggml_backend_cpu_set_n_threads(backend.raw.as_ptr(), threads as i32);
                        sys::ggml_backend_cpu_set_threadpool(backend.raw.as_ptr(), pool.as_ptr());
                    }
                }
            }
            // Our own pool is made anew once this one is detached.
            self.threads = 0;
            return Ok(());
        }
        if threads == self.threads {
            return Ok(());
        }
        for backend in &mut self.backends {
            // SAFETY: live handles; the new pool is set before the old one is dropped.
            unsafe {
                if !sys::ggml_backend_is_cpu(backend.raw.as_ptr()) {
                    continue;
                }
                sys::ggml_backend_cpu_set_n_threads(backend.raw.as_ptr(), threads as i32);
                let pool = ThreadPool::new(threads).ok_or_else(|| Error::Device("thread pool".into()))?;
                sys::ggml_backend_cpu_set_threadpool(backend.raw.as_ptr(), pool.0.as_ptr());
                backend.threadpool = Some(pool);
            }
        }
        self.threads = threads;
        Ok(())
    }

    /// Computes with the caller's threads from the next [`Scheduler::set_threads`] on, or with its own again.
    ///
    /// # Safety
    /// The pool stays alive until another one, or none, is attached and the scheduler has computed or was dropped.
    pub unsafe fn attach_threadpool(&mut self, pool: Option<NonNull<sys::ggml_threadpool>>) {
        self.attached = pool;
    }

    /// A flag that ends a running computation with [`Error::Aborted`] once it is set.
    pub fn abort_flag(&self) -> &Arc<AtomicBool> {
        &self.abort.flag
    }

    /// Asks the callback, too, whether to end a computation.
    ///
    /// # Safety
    /// The function may be called with its argument from any thread, until another one is set or the scheduler is
    /// dropped.
    pub unsafe fn set_abort_callback(&mut self, callback: Option<AbortCallback>) {
        *self.abort.callback.lock().unwrap_or_else(PoisonError::into_inner) = callback;
    }

    /// Shows each tensor to the callback before and after it is computed (ggml's `ggml_backend_sched_eval_callback`).
    ///
    /// # Safety
    /// The function may be called with its argument until another one is set or the scheduler is dropped.
    pub unsafe fn set_eval_callback(&mut self, callback: sys::ggml_backend_sched_eval_callback, data: *mut c_void) {
        // SAFETY: a live scheduler; the caller vouches for the callback.
        unsafe { sys::ggml_backend_sched_set_eval_callback(self.raw.as_ptr(), callback, data) }
    }

    /// Gives the graph's tensors memory. The graph that had it before loses it.
    pub fn alloc(&mut self, graph: &Graph) -> Result<(), Error> {
        assert!(graph.max_nodes() <= self.max_nodes, "the graph is larger than the scheduler was made for");
        self.release();
        let leaves = graph.leaves();
        if self.leaves.take() != Some(leaves) {
            self.forget_plan()?;
        }
        if self.has_devices() {
            // Its own buffers may be exchanged for larger ones.
            note_freed_device_memory();
        }
        // With the processor alone, too: it does not say that it can run our products of weights that ggml repacked.
        for (tensor, device) in graph.placed().iter() {
            if let Some(backend) = self.backends.iter().find(|backend| backend.device == *device) {
                // SAFETY: live handles; the tensor is one of this graph.
                unsafe {
                    sys::ggml_backend_sched_set_tensor_backend(self.raw.as_ptr(), tensor.raw(), backend.raw.as_ptr());
                }
            }
        }
        // SAFETY: both are alive; the graph's context is kept in `current` while the scheduler refers to its tensors.
        let done = unsafe { sys::ggml_backend_sched_alloc_graph(self.raw.as_ptr(), graph.raw()) };
        self.allocated(done)?;
        self.leaves = Some(leaves);
        let inner = Arc::clone(graph.context().inner());
        inner.has_memory.store(true, Ordering::Release);
        self.current = Some(inner);
        self.freed = freed_device_memory();
        Ok(())
    }

    /// What follows an attempt to give a graph memory.
    fn allocated(&self, done: bool) -> Result<(), Error> {
        if done {
            return Ok(());
        }
        // SAFETY: puts the scheduler back into its empty state.
        unsafe { sys::ggml_backend_sched_reset(self.raw.as_ptr()) };
        Err(Error::OutOfMemory {
            device: "the devices".into(),
            bytes: 0,
            what: "the graph's intermediate results (try a smaller ubatch)".into(),
        })
    }

    /// Makes ggml plan the next graph's memory anew. It takes the plan of the last graph for one with as many nodes and leaves and of
    /// the same sizes, and the leaves' part of the plan by their order alone: where graphs share leaves in different ways, one that
    /// needs memory would get that of one that has its own. A small graph between is never like the next one.
    fn forget_plan(&mut self) -> Result<(), Error> {
        let graph = Graph::new(4);
        let input = graph.input(Type::F32, &[1]);
        graph.expand(&graph.scale(&graph.scale(&graph.scale(&input, 1.0), 1.0), 1.0));
        // SAFETY: both are alive; the scheduler does not refer to the graph after the reset.
        let done = unsafe { sys::ggml_backend_sched_alloc_graph(self.raw.as_ptr(), graph.raw()) };
        self.allocated(done)?;
        // SAFETY: as above.
        unsafe { sys::ggml_backend_sched_reset(self.raw.as_ptr()) };
        Ok(())
    }

    /// Whether there are other devices than the processor.
    fn has_devices(&self) -> bool {
        self.backends.len() > 1
    }

    /// Whether this graph can be computed again: its tensors have memory now, and it does not run on a device that may
    /// have forgotten it.
    pub fn can_rerun(&self, graph: &Graph) -> bool {
        self.is_allocated(graph) && (!self.has_devices() || self.freed == freed_device_memory())
    }

    /// Whether this graph is the one whose tensors have memory now.
    pub fn is_allocated(&self, graph: &Graph) -> bool {
        self.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, graph.context().inner()))
    }

    /// Operations that a graph may have at most.
    pub fn max_nodes(&self) -> usize {
        self.max_nodes
    }

    /// Computes a graph that is not needed again.
    pub fn compute_once(&mut self, graph: &Graph) -> Result<(), Error> {
        self.alloc(graph)?;
        self.compute(graph)?;
        self.release();
        Ok(())
    }

    /// Takes the memory from the current graph's tensors.
    pub fn release(&mut self) {
        self.wait();
        if let Some(previous) = self.current.take() {
            previous.has_memory.store(false, Ordering::Release);
            // SAFETY: a live scheduler; clears its tables without touching the graph.
            unsafe { sys::ggml_backend_sched_reset(self.raw.as_ptr()) };
        }
    }

    /// Computes the graph that was given memory last. May be called again with new inputs.
    ///
    /// # Panics
    /// When another graph, or none, was given memory.
    pub fn compute(&mut self, graph: &Graph) -> Result<(), Error> {
        let started = self.start(graph);
        self.wait();
        started
    }

    /// Begins to compute the graph that was given memory last: the processor is done with its part when this returns,
    /// devices may not be. They are waited for by [`Scheduler::wait`], and before another graph is given memory.
    ///
    /// # Panics
    /// As [`Scheduler::compute`].
    pub fn start(&mut self, graph: &Graph) -> Result<(), Error> {
        assert!(self.is_allocated(graph), "compute follows alloc of the same graph");
        self.running = true;
        // SAFETY: the graph is alive and allocated by this scheduler, which keeps it alive until it was waited for.
        let status = unsafe { sys::ggml_backend_sched_graph_compute_async(self.raw.as_ptr(), graph.raw()) };
        match status {
            sys::GGML_STATUS_SUCCESS => Ok(()),
            sys::GGML_STATUS_ABORTED => Err(Error::Aborted),
            status => Err(Error::Compute(status)),
        }
    }

    /// Waits until devices have computed what was started.
    pub fn wait(&mut self) {
        if std::mem::take(&mut self.running) {
            // SAFETY: a live scheduler.
            unsafe { sys::ggml_backend_sched_synchronize(self.raw.as_ptr()) }
        }
    }

    /// As [`Scheduler::compute`], and returns the time that the nodes of this name took. Devices are waited for before
    /// and after each run of such nodes. Takes the place of a callback set by [`Scheduler::set_eval_callback`].
    ///
    /// # Panics
    /// As [`Scheduler::compute`].
    pub fn compute_timed(&mut self, graph: &Graph, name: &CStr) -> Result<Duration, Error> {
        let mut timer = Timer::new(graph, name);
        let data = (&raw mut timer).cast::<c_void>();
        // SAFETY: the timer outlives the computation, after which the callback is taken back.
        let done = unsafe {
            self.set_eval_callback(Some(time_node), data);
            let done = self.compute(graph);
            self.set_eval_callback(None, std::ptr::null_mut());
            done
        };
        done.map(|()| timer.total)
    }

    /// Parts that the current graph is split into, each of which one device computes.
    pub fn n_splits(&self) -> usize {
        // SAFETY: a live scheduler.
        usize::try_from(unsafe { sys::ggml_backend_sched_get_n_splits(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Bytes that intermediate results take on all devices.
    pub fn buffer_bytes(&self) -> usize {
        // SAFETY: live handles.
        let size = |backend: &Backend| unsafe {
            sys::ggml_backend_sched_get_buffer_size(self.raw.as_ptr(), backend.raw.as_ptr())
        };
        self.backends.iter().map(size).sum()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.release();
        if self.has_devices() {
            note_freed_device_memory();
        }
        // SAFETY: the handle is this value's alone; the backends, fields, go after it.
        unsafe { sys::ggml_backend_sched_free(self.raw.as_ptr()) }
    }
}

struct Timer {
    /// The last node before each run of timed ones, and the last of each run. ggml waits after these only: on a card
    /// waiting for every node takes longer than the nodes.
    before: HashSet<*const sys::ggml_tensor>,
    last: HashSet<*const sys::ggml_tensor>,
    started: Instant,
    total: Duration,
}

impl Timer {
    fn new(graph: &Graph, name: &CStr) -> Timer {
        let (mut before, mut last) = (HashSet::new(), HashSet::new());
        let mut previous: Option<(*const sys::ggml_tensor, bool)> = None;
        for node in graph.nodes() {
            // SAFETY: the graph keeps its nodes alive; a name ends with a zero.
            let timed = unsafe { CStr::from_ptr((*node).name.as_ptr()) } == name;
            match previous {
                Some((node, false)) if timed => drop(before.insert(node)),
                Some((node, true)) if !timed => drop(last.insert(node)),
                _ => {}
            }
            previous = Some((node, timed));
        }
        if let Some((node, true)) = previous {
            last.insert(node);
        }
        Timer { before, last, started: Instant::now(), total: Duration::ZERO }
    }
}

/// Asks whether to wait after a node (`ask`), and tells that it and those before it are done.
unsafe extern "C" fn time_node(node: *mut sys::ggml_tensor, ask: bool, timer: *mut c_void) -> bool {
    // SAFETY: `compute_timed` passed its timer, which only this thread uses.
    let timer = unsafe { &mut *timer.cast::<Timer>() };
    let node = node.cast_const();
    if ask {
        return timer.before.contains(&node) || timer.last.contains(&node);
    }
    if timer.last.contains(&node) {
        timer.total += timer.started.elapsed();
    }
    timer.started = Instant::now();
    true
}

unsafe extern "C" fn is_set(flag: *mut c_void) -> bool {
    // SAFETY: `Scheduler::new` passed a pointer to its `Abort`, which outlives the backend.
    let abort = unsafe { &*flag.cast::<Abort>() };
    if abort.flag.load(Ordering::Relaxed) {
        return true;
    }
    let callback = *abort.callback.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: `set_abort_callback`'s caller allows the call.
    callback.is_some_and(|(function, data)| unsafe { function(data) })
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler").field("devices", &self.backends.len()).field("threads", &self.threads).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::Context;

    /// As many nodes and leaves, and each node reads what has memory of its own or none as in the other; but the leaves come in another
    /// order.
    #[test]
    fn graphs_that_share_leaves_differently_follow_each_other() {
        let context = Context::new(2);
        let [one, two] = [(); 2].map(|()| context.tensor(Type::F32, &[2]));
        context.alloc(Device::cpu().buffer_type(), "what is read").unwrap();
        one.write(0, &[1.0f32, 2.0]);
        two.write(0, &[10.0f32, 20.0]);
        let mut scheduler = Scheduler::new(&[], 1, 64).unwrap();
        let mut sums = |shares_input: bool| {
            let graph = Graph::new(64);
            let [x, y, z] = [(); 3].map(|()| graph.input(Type::F32, &[2]));
            let first = graph.add(&one, &x);
            let second = graph.add(if shares_input { &two } else { &one }, &y);
            let third = graph.add(&first, if shares_input { &x } else { &z });
            let sum = graph.add(&second, &third);
            graph.expand(&first);
            graph.expand(&second);
            graph.expand(&sum);
            scheduler.alloc(&graph).unwrap();
            x.write(0, &[0.5f32, 0.25]);
            y.write(0, &[100.0f32, 200.0]);
            if !shares_input {
                z.write(0, &[1000.0f32, 2000.0]);
            }
            scheduler.compute(&graph).unwrap();
            sum.to_f32()
        };
        for _ in 0..3 {
            assert_eq!(sums(true), [112.0, 222.5]);
            assert_eq!(sums(false), [1102.5, 2204.25]);
        }
    }
}
