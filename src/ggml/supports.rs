//! What devices can compute.

use ggml_sys as sys;

use super::{BufferType, Context, Device, Tensor, Type};

impl Device {
    /// Whether `weight × activations` can run here when a weight of this type and shape lies in `memory`. With a third
    /// dimension it is a stack of experts' weights.
    pub(crate) fn can_multiply(self, memory: BufferType, ty: Type, shape: &[usize]) -> bool {
        // The number of tokens does not matter for the answer.
        const TOKENS: usize = 512;
        let context = Context::new(4);
        let weight = context.tensor(ty, shape);
        let experts = shape.len() > 2;
        let input = if experts { &[shape[0], 1, TOKENS][..] } else { &[shape[0], TOKENS] };
        let input = context.tensor(Type::F32, input);
        let ids = context.tensor(Type::I32, &[1, TOKENS]);
        // SAFETY: the empty buffer only tells which memory is meant, as the device's answer depends on it; it is taken
        // from the header again before it is freed.
        unsafe {
            let product = if experts {
                sys::ggml_mul_mat_id(context.raw(), weight.raw(), input.raw(), ids.raw())
            } else {
                sys::ggml_mul_mat(context.raw(), weight.raw(), input.raw())
            };
            let empty = sys::ggml_backend_buft_alloc_buffer(memory.raw(), 0);
            if empty.is_null() {
                return false;
            }
            (*weight.raw()).buffer = empty;
            let supported = sys::ggml_backend_dev_supports_op(self.raw(), product);
            (*weight.raw()).buffer = std::ptr::null_mut();
            sys::ggml_backend_buffer_free(empty);
            supported
        }
    }

    /// Whether this device wants to compute a product whose weight is the processor's, which is then sent there: for many
    /// tokens (`op_offload`).
    pub(super) fn takes_over(self, product: &Tensor) -> bool {
        // SAFETY: live handles; the node is asked about and not changed.
        unsafe {
            sys::ggml_backend_dev_offload_op(self.raw(), product.raw())
                && sys::ggml_backend_dev_supports_op(self.raw(), product.raw())
        }
    }

    /// Whether ggml's flash attention can run here over caches of these types.
    ///
    /// `sizes` are elements of a key and of a value, `heads` heads of queries and of keys.
    pub(crate) fn can_attend(self, sizes: [usize; 2], heads: [usize; 2], k: Type, v: Type) -> bool {
        // ggml knows nothing of these.
        if k.is_tiles() || v.is_tiles() {
            return false;
        }
        // Of rows and tokens the answer does not depend.
        const ROWS: usize = 256;
        let context = Context::new(8);
        let query = context.tensor(Type::F32, &[sizes[0], 1, heads[0]]);
        let [k, v] = [(k, sizes[0]), (v, sizes[1])].map(|(ty, size)| context.tensor(ty, &[size, ROWS, heads[1]]));
        let mask = context.tensor(Type::F16, &[ROWS, 1]);
        // SAFETY: live tensors of fitting shapes; the node is asked about and never computed.
        unsafe {
            let node =
                sys::ggml_flash_attn_ext(context.raw(), query.raw(), k.raw(), v.raw(), mask.raw(), 1.0, 0.0, 0.0);
            sys::ggml_backend_dev_supports_op(self.raw(), node)
        }
    }
}
