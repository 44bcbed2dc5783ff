"""simlayer for Python: `import simlayer` before `llama_cpp`, and llama-cpp-python runs on simlayer's libllama.so.0.

With nothing more no layer is lazy and answers are llama.cpp's. `simlayer.lazy("auto")`, before a model is loaded, makes
caches small; its argument is that of `simlayer-run --lazy`, which this package has on the PATH.
"""

import os
import sys
from importlib import metadata
from pathlib import Path

from ._checked import CHECKED, LLAMA_CPP, VERSION

__version__ = VERSION

_HERE = Path(__file__).resolve().parent

#: The folder with libllama.so.0.
LIBRARY = _HERE / "lib"
#: The folder with llama.h and simlayer.h.
INCLUDE = _HERE / "include"


def _set_up():
    """Makes llama-cpp-python load our library, where it is of a version that was checked with it."""
    try:
        found = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        # The program and the library serve without it.
        return
    if found not in CHECKED:
        raise ImportError(
            f"simlayer {VERSION} is built for {LLAMA_CPP} and was checked with llama-cpp-python "
            f"{', '.join(CHECKED)}; {found} is installed. Install that version (pip install "
            f"llama-cpp-python=={CHECKED[-1]}), or another version of simlayer."
        )
    named = os.environ.get("LLAMA_CPP_LIB_PATH")
    if "llama_cpp" in sys.modules and named != str(LIBRARY):
        raise ImportError("llama_cpp has loaded a library of its own already: import simlayer before it")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARY)


def lazy(rule="auto", **options):
    """Sets how layers of contexts made from now on become lazy: `lazy("budget:0.5", window=512)`.

    Options are named as the variables without SIMLAYER_: sink, window, slack, queries, lazy_type, keys, at, prefill.
    """
    os.environ["SIMLAYER_LAZY"] = rule
    for name, value in options.items():
        os.environ[f"SIMLAYER_{name.upper()}"] = str(value)


def main():
    """The program simlayer-run."""
    program = _HERE / "bin" / "simlayer-run"
    os.execv(program, [str(program), *sys.argv[1:]])


_set_up()
