"""train.py in the small toy world of conftest.py, as a program: for tests that start several, or end them."""
import sys

import pytest

import train
from common import as_command
from conftest import make_small, shorten_answers

if __name__ == "__main__":
    make_small(pytest.MonkeyPatch())
    shorten_answers(pytest.MonkeyPatch(), 4)
    as_command(lambda: train.main([*sys.argv[1:], "--device", "cpu"]), "train.py", "interrupted")
