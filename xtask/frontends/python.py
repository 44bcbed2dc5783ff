"""Unmodified llama-cpp-python on the library that LLAMA_CPP_LIB_PATH names. Arguments: model, text, and `features` or `long`.

Prints one JSON object. With `long` a prompt of 6,000 tokens is read, and the lazy layers are told.
"""

import ctypes
import json
import os
import sys

import llama_cpp
from llama_cpp import Llama

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


class Layer(ctypes.Structure):
    """struct simlayer_layer"""

    _fields_ = [
        ("index", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("has_score", ctypes.c_int32),
        ("score", ctypes.c_float),
        ("bytes", ctypes.c_uint64),
    ]


def resident() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def take(tokens, n: int) -> list:
    return [token for _, token in zip(range(n), tokens)]


def features(model: str) -> dict:
    options = {"n_ctx": 1024, "verbose": False, "seed": 1}
    llama = Llama(model, **options)
    greedy = {"max_tokens": 16, "temperature": 0}
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    person = [{"role": "user", "content": "Give a JSON object with name and age of a person."}]
    streamed = llama.create_completion("The sea is", stream=True, **greedy)
    result = {
        "completion": llama.create_completion("The sea is", **greedy)["choices"][0]["text"],
        "streamed": "".join(part["choices"][0]["text"] for part in streamed),
        "chat": llama.create_chat_completion(chat, **greedy)["choices"][0]["message"]["content"],
        "json": json.loads(
            llama.create_chat_completion(
                person, max_tokens=64, temperature=0, response_format={"type": "json_object", "schema": SCHEMA}
            )["choices"][0]["message"]["content"]
        ),
    }

    prompt = llama.tokenize(b"Once upon a time there was a king who")
    llama.reset()
    llama.eval(prompt)
    state = llama.save_state()
    other = Llama(model, **options)
    other.load_state(state)
    result["saved"] = take(llama.generate(prompt, temp=0), 12)
    result["loaded"] = take(other.generate(prompt, temp=0), 12)

    texts = ["Hello world", "Goodbye my friend"]
    result["embeddings"] = Llama(model, embedding=True, **options).embed(texts)
    pooling = llama_cpp.LLAMA_POOLING_TYPE_MEAN
    result["pooled"] = Llama(model, embedding=True, pooling_type=pooling, **options).embed(texts)
    return result


def long_prompt(model: str, text: str) -> dict:
    # With flash attention, so that without lazy layers memory is the cache as well, and no matrix of all weights.
    llama = Llama(model, n_ctx=8192, n_batch=8192, flash_attn=True, verbose=False)
    with open(text, "rb") as file:
        tokens = llama.tokenize(file.read())
    tokens = (tokens * (6000 // len(tokens) + 1))[:6000]
    before = resident()
    generated = take(llama.generate(tokens, temp=0), 24)
    result = {
        "resident": resident() - before,
        "prompt": llama.detokenize(tokens, special=True).decode(errors="replace"),
        "tokens": generated,
        "text": llama.detokenize(generated).decode(errors="replace"),
    }
    simlayer = ctypes.CDLL(os.path.join(os.environ["LLAMA_CPP_LIB_PATH"], "libsimlayer.so"))
    layers = (Layer * 512)()
    n = simlayer.simlayer_get_layers(ctypes.c_void_p(llama.ctx), 0, layers, 512, ctypes.sizeof(Layer))
    result["lazy_layers"] = [layer.index for layer in layers[:n] if layer.kind == 1]
    return result


if __name__ == "__main__":
    MODEL, TEXT, WHAT = sys.argv[1:]
    print(json.dumps(long_prompt(MODEL, TEXT) if WHAT == "long" else features(MODEL)))
