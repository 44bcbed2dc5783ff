"""llama-cpp-python on the wheel's library: python3 check.py MODEL, or with `other` a release that is for another revision."""

import os
import subprocess
import sys
import tempfile

model, *rest = sys.argv[1:]

if rest == ["other"]:
    from importlib.util import find_spec

    library = os.path.join(os.path.dirname(find_spec("simlayer").origin), "lib")
    try:
        import simlayer
        sys.exit("it was taken")
    except ImportError as error:
        print(error)
    # Whoever names the library is told by the library.
    os.environ["LLAMA_CPP_LIB_PATH"] = library
    from llama_cpp import Llama

    try:
        Llama(model_path=model, n_ctx=512, verbose=True)
        sys.exit("it was taken")
    except ValueError as error:
        print(error)
    sys.exit()

if not rest:
    import simlayer

import llama_cpp
from llama_cpp import Llama, llama_cpp as api


def say(prompt, n):
    llm = Llama(model_path=model, n_ctx=4096, n_batch=4096, seed=1, verbose=False)
    pieces = [part["choices"][0]["text"] for part in llm(prompt, max_tokens=n, temperature=0, stream=True)]
    state = llm.save_state().llama_state_size
    return "".join(pieces), state


prompt = "The sea is"
if rest:
    print(say(prompt, 24)[0], end="")
    sys.exit()

version = api.llama_version().decode()
assert version.startswith(f"simlayer {simlayer.__version__}"), version
print(f"llama-cpp-python {llama_cpp.__version__} on {version}")

text, _ = say(prompt, 24)
print(f"streamed, nothing lazy: {text!r}")

# The same on unmodified llama.cpp, which the wheel has for models that simlayer does not run.
with tempfile.TemporaryDirectory() as folder:
    for library in simlayer.LIBRARY.iterdir():
        if library.name != "libllama.so":
            os.symlink(library, f"{folder}/{library.name}")
    os.symlink(simlayer.LIBRARY / "libsimlayer-upstream.so", f"{folder}/libllama.so")
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": folder}
    command = [sys.executable, __file__, model, "upstream"]
    theirs = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
print(f"llama.cpp says: {theirs!r}")
assert len(text) > 20 and text == theirs

long = "The lighthouse keeper counted the ships that passed in the night. " * 200
full, n_full = say(long, 16)
simlayer.lazy("budget:0.5", window=256)
lazy, n_lazy = say(long, 16)
print(f"{len(long)} characters: {full!r}, state of {n_full} bytes")
print(f"half of the layers lazy: {lazy!r}, state of {n_lazy} bytes")
assert n_lazy < 0.75 * n_full, "the cache is not smaller"
