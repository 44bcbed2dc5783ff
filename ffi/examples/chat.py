"""Unchanged llama-cpp-python on simlayer, and simlayer.h beside it.

    cargo xtask dist
    CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install llama-cpp-python==0.3.36
    LLAMA_CPP_LIB_PATH=dist/lib SIMLAYER_LAZY=budget:0.5 python ffi/examples/chat.py model.gguf text.txt

It asks the model about a text, then tells which layers are lazy and what the cache takes.
"""

import ctypes
import os
import sys

from llama_cpp import Llama


class Memory(ctypes.Structure):
    """struct simlayer_memory"""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("tokens", ctypes.c_uint64),
        ("f16_bytes", ctypes.c_uint64),
        ("allocated_bytes", ctypes.c_uint64),
        ("peak_bytes", ctypes.c_uint64),
        ("lazy_layers", ctypes.c_uint32),
        ("active_layers", ctypes.c_uint32),
    ]


def main() -> None:
    model, text = sys.argv[1:3]
    with open(text, encoding="utf-8") as file:
        prompt = file.read() + "\n\nWhat is this text about? Answer in one sentence."

    # n_batch as large as the prompt: it is then read layer by layer, and scored at its very end.
    llama = Llama(model, n_ctx=8192, n_batch=8192, verbose=False)
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": prompt},
    ]
    answer = llama.create_chat_completion(messages, max_tokens=64, temperature=0)
    print(answer["choices"][0]["message"]["content"].strip())

    simlayer = ctypes.CDLL(os.path.join(os.environ["LLAMA_CPP_LIB_PATH"], "libsimlayer.so"))
    simlayer.simlayer_last_error.restype = ctypes.c_char_p
    memory = Memory(size=ctypes.sizeof(Memory))
    if simlayer.simlayer_get_memory(ctypes.c_void_p(llama.ctx), ctypes.byref(memory)) < 0:
        sys.exit(simlayer.simlayer_last_error().decode())
    print(
        f"{memory.tokens} tokens, {memory.lazy_layers} lazy layers, "
        f"cache {memory.allocated_bytes / 1e6:.1f} MB, uncompressed {memory.f16_bytes / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
