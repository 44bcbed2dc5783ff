//! The structs that C and Rust share lie alike: a C program made from the headers tells sizes and offsets.

use std::{fmt::Write, fs, path::PathBuf, process::Command};

use ggml_sys as sys;

use crate::simlayer_api::{Layer, Memory, Params};

/// The lines that C must print, and the program that prints them.
#[derive(Default)]
struct Layouts {
    expected: String,
    program: String,
    structs: Vec<&'static str>,
}

macro_rules! layout {
    ($layouts:ident, $ty:ty, $name:ident { $($field:ident),* }) => {{
        let name = stringify!($name);
        $layouts.structs.push(name);
        let _ = writeln!($layouts.expected, "{name} {}", size_of::<$ty>());
        let _ = writeln!($layouts.program, "printf(\"{name} %zu\\n\", sizeof(struct {name}));");
        $(
            // bindgen puts an underscore behind names that are Rust's.
            let field = stringify!($field).trim_end_matches('_');
            let _ = writeln!($layouts.expected, "{name}.{field} {}", std::mem::offset_of!($ty, $field));
            let _ = writeln!(
                $layouts.program,
                "printf(\"{name}.{field} %zu\\n\", offsetof(struct {name}, {field}));"
            );
        )*
    }};
    ($layouts:ident, $name:ident { $($field:ident),* }) => {
        layout!($layouts, sys::$name, $name { $($field),* })
    };
}

fn layouts() -> Layouts {
    let mut l = Layouts::default();
    layout!(l, llama_token_data { id, logit, p });
    layout!(l, llama_token_data_array { data, size, selected, sorted });
    layout!(l, llama_batch { n_tokens, token, embd, pos, n_seq_id, seq_id, logits });
    layout!(l, llama_model_kv_override { tag, key });
    layout!(l, llama_model_tensor_buft_override { pattern, buft });
    layout!(
        l,
        llama_model_params {
            devices,
            tensor_buft_overrides,
            n_gpu_layers,
            split_mode,
            load_mode,
            lazy_mode,
            main_gpu,
            tensor_split,
            progress_callback,
            progress_callback_user_data,
            kv_overrides,
            vocab_only,
            check_tensors,
            use_extra_bufts,
            no_host,
            no_alloc,
            load_mtp
        }
    );
    layout!(l, llama_sampler_seq_config { seq_id, sampler });
    layout!(
        l,
        llama_context_params {
            n_ctx,
            n_batch,
            n_ubatch,
            n_seq_max,
            n_rs_seq,
            n_outputs_max,
            n_outputs_max_per_seq,
            n_threads,
            n_threads_batch,
            ctx_type,
            rope_scaling_type,
            pooling_type,
            attention_type,
            flash_attn_type,
            rope_freq_base,
            rope_freq_scale,
            yarn_ext_factor,
            yarn_attn_factor,
            yarn_beta_fast,
            yarn_beta_slow,
            yarn_orig_ctx,
            defrag_thold,
            cb_eval,
            cb_eval_user_data,
            type_k,
            type_v,
            abort_callback,
            abort_callback_data,
            embeddings,
            offload_kqv,
            no_perf,
            op_offload,
            swa_full,
            kv_unified,
            samplers,
            n_samplers,
            ctx_other
        }
    );
    layout!(l, llama_model_tensor_override { pattern, type_ });
    layout!(l, llama_model_imatrix_data { name, data, size });
    layout!(
        l,
        llama_model_quantize_params {
            nthread,
            ftype,
            output_tensor_type,
            token_embedding_type,
            allow_requantize,
            quantize_output_tensor,
            only_copy,
            pure_,
            keep_split,
            dry_run,
            imatrix,
            kv_overrides,
            tt_overrides,
            prune_layers,
            max_buf_size
        }
    );
    layout!(l, llama_logit_bias { token, bias });
    layout!(l, llama_sampler_chain_params { no_perf });
    layout!(l, llama_chat_message { role, content });
    layout!(l, llama_embd { data, n_rows, n_embd });
    layout!(l, llama_sampler_data { logits, probs, sampled, candidates });
    layout!(
        l,
        llama_sampler_i {
            name,
            accept,
            apply,
            reset,
            clone,
            free,
            backend_init,
            backend_accept,
            backend_apply,
            backend_set_input,
            backend_reset,
            copy_state
        }
    );
    layout!(l, llama_sampler { iface, ctx });
    layout!(l, llama_perf_context_data { t_start_ms, t_load_ms, t_p_eval_ms, t_eval_ms, n_p_eval, n_eval, n_reused });
    layout!(l, llama_perf_sampler_data { t_sample_ms, n_sample });
    layout!(
        l,
        llama_opt_params { n_ctx_train, param_filter, param_filter_ud, get_opt_pars, get_opt_pars_ud, optimizer_type }
    );
    layout!(
        l,
        Params,
        simlayer_params { size, lazy, lazy_type, n_sink, n_window, n_queries, at, prefill, narrow_keys }
    );
    layout!(l, Layer, simlayer_layer { index, kind, has_score, score, bytes });
    layout!(
        l,
        Memory,
        simlayer_memory { size, tokens, f16_bytes, allocated_bytes, peak_bytes, lazy_layers, active_layers }
    );
    l
}

fn source() -> PathBuf {
    PathBuf::from(env!("LLAMA_SOURCE"))
}

fn includes() -> Vec<String> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("include");
    [source().join("include"), source().join("ggml/include"), own].map(|dir| format!("-I{}", dir.display())).into()
}

fn output(command: &mut Command) -> String {
    let output = command.output().expect("a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn structs_lie_alike() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, program) = (folder.path().join("layout.c"), folder.path().join("layout"));
    let layouts = layouts();
    let text = format!(
        "#include <stdio.h>\n#include <stddef.h>\n#include \"llama.h\"\n#include \"simlayer.h\"\n\
         int main(void) {{\n{}return 0;\n}}\n",
        layouts.program
    );
    fs::write(&file, text).expect("the folder is writable");
    output(Command::new("cc").args(includes()).arg(&file).arg("-o").arg(&program));
    assert_eq!(output(&mut Command::new(&program)), layouts.expected);
    // The two that are passed by value and have no version in them.
    assert_eq!((size_of::<sys::llama_model_params>(), size_of::<sys::llama_context_params>()), (80, 160));
}

/// A struct that a later header adds must be added here.
#[test]
fn no_struct_is_missing() {
    let mut cc = Command::new("cc");
    cc.args(["-E", "-P", "-x", "c", "-include", "llama.h", "-include", "simlayer.h", "/dev/null"]).args(includes());
    let text = output(&mut cc);
    let known = layouts().structs;
    let mut found = 0;
    for prefix in ["struct llama_", "struct simlayer_"] {
        for (at, _) in text.match_indices(prefix) {
            let rest = &text[at + "struct ".len()..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            if rest[end..].trim_start().starts_with('{') {
                found += 1;
                assert!(known.contains(&&rest[..end]), "struct {} is not compared", &rest[..end]);
            }
        }
    }
    assert_eq!(found, known.len());
}
