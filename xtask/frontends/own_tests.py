"""llama-cpp-python's own tests, unmodified. Arguments: model, folder that holds `tests` and `vendor`.

The model stands for those that the tests would download, but for the kinds of model that it is not: what needs these is
skipped. Prints one JSON object: what became of each test.
"""

import contextlib
import json
import os
import sys
import types

import numpy as np
import pytest

MODEL, FOLDER = sys.argv[1:]


def hf_hub_download(_repo: str, filename: str) -> str:
    if any(name in filename for name in ("mamba", "Falcon-H1")):
        pytest.skip(f"{filename}: a recurrent model, and none is at hand")
    return MODEL


def log_softmax(x, axis=None):
    shifted = x - np.max(x, axis=axis, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))


def put_in_place(name: str, **members) -> None:
    """A module of that name, for what the tests import and nothing else."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


class Outcomes:
    """What became of each test."""

    def __init__(self) -> None:
        self.of = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid.split("/")[-1]] = report.outcome


if __name__ == "__main__":
    put_in_place("huggingface_hub", hf_hub_download=hf_hub_download)
    put_in_place("scipy")
    put_in_place("scipy.special", log_softmax=log_softmax)
    # The tests name llama.cpp's vocabularies from there.
    os.chdir(FOLDER)
    outcomes = Outcomes()
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(["-q", "-p", "no:cacheprovider", "tests"], plugins=[outcomes])
    print(json.dumps(outcomes.of))
