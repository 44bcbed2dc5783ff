"""Unmodified llama-cpp-python over a long prompt with lazy layers: prompts with a common beginning, states, its cache.
Arguments: model, text. Prints one JSON object of tokens.
"""

import json
import sys

from llama_cpp import Llama
from llama_cpp.llama_cache import LlamaRAMCache

N_PROMPT, N_ANSWER = 3000, 16


def new(model: str, **more) -> Llama:
    return Llama(model, n_ctx=8192, n_batch=8192, verbose=False, **more)


def take(tokens) -> list:
    return [token for _, token in zip(range(N_ANSWER), tokens)]


def main() -> None:
    model, text = sys.argv[1:]
    with open(text, "rb") as file:
        content = file.read()
    llama = new(model)
    tokens = llama.tokenize(content)[:N_PROMPT]
    question = llama.tokenize(b"\n\nWhat is this about?", add_bos=False)
    other = llama.tokenize(b"\n\nWho is the keeper?", add_bos=False)
    result = {"first": take(llama.generate(tokens + question, temp=0))}
    # The same prompt again: everything but its last token is there.
    result["again"] = take(llama.generate(tokens + question, temp=0))
    # A prompt that begins alike.
    result["other"] = take(llama.generate(tokens + other, temp=0))
    result["other_fresh"] = take(new(model).generate(tokens + other, temp=0))
    # Goes on behind what is there.
    result["on"] = take(llama.generate(question, temp=0, reset=False))

    saved, loaded = new(model), new(model)
    saved.eval(tokens + question)
    state = saved.save_state()
    result["saved"] = take(saved.generate(tokens + question, temp=0))
    loaded.load_state(state)
    result["loaded"] = take(loaded.generate(tokens + question + result["saved"], temp=0))
    result["not_loaded"] = take(saved.generate(tokens + question + result["saved"], temp=0))

    cached = new(model)
    cached.set_cache(LlamaRAMCache())
    prompt = cached.detokenize(tokens[1:]).decode(errors="replace")
    greedy = {"max_tokens": N_ANSWER, "temperature": 0}
    texts = [cached.create_completion(prompt + end, **greedy)["choices"][0]["text"] for end in ["", " And", "", " So"]]
    result["cached"] = texts
    print(json.dumps(result))


if __name__ == "__main__":
    main()
