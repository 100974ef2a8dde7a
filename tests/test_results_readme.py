"""README and the rooms: stops, files and commands that it names exist, its example trains, imports point down, the index.

    python tests/test_results_readme.py      makes tests/README.md anew
"""
import ast
import re
from pathlib import Path

import pytest

import conftest
import losses
import methods
import train

ROOMS = ("train", "eval", "methods", "judges", "toy", "checkpoint", "runs", "report", "lora_moe", "data", "batch", "model",
         "chat", "losses", "common")  # a room imports from those behind it
README = (conftest.ROOT / "README.md").read_text(encoding="utf-8")


def tree_of(room):
    return ast.parse((conftest.ROOT / f"{room}.py").read_text(encoding="utf-8"))


def imports_of(room):
    """{room: names taken from it, () where it is imported whole}."""
    found = {}
    for node in ast.walk(tree_of(room)):
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, []).extend(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            found |= {alias.name: [] for alias in node.names}
    return {name: names for name, names in found.items() if name in ROOMS}


def names_in(room):
    """What a room defines at its top level."""
    names = set()
    for node in tree_of(room).body:
        targets = getattr(node, "targets", None) or [node]
        names |= {getattr(target, "id", getattr(target, "name", None)) for target in targets}
    return names


def test_every_stop_in_the_readme_exists():
    stops = re.findall(r"`(\w+)\.py: ([\w, ]+)`", README)
    assert len(stops) > 25
    for room, names in stops:
        assert set(names.split(", ")) <= names_in(room), (room, names)


def test_every_file_that_is_named_exists():
    for page in (conftest.ROOT / "README.md", conftest.ROOT / "results/README.md", conftest.ROOT / "tests/README.md"):
        for name in set(re.findall(r"\b((?:results|tests)/\w+\.(?:py|png|md))\b", page.read_text(encoding="utf-8"))):
            assert (conftest.ROOT / name).is_file(), (page.name, name)


def test_imports_point_down_and_are_few():
    arrows = {room: imports_of(room) for room in ROOMS}
    for room, taken in arrows.items():
        assert all(ROOMS.index(name) > ROOMS.index(room) for name in taken), (room, [*taken])
        for other, names in taken.items():
            assert set(names) <= names_in(other), (room, other, "passes names on")
    assert sum(map(len, arrows.values())) <= 60
    assert not arrows["losses"] and not arrows["common"]


def test_rooms_and_functions_are_of_a_length_that_can_be_read():
    for room in ROOMS:
        assert len((conftest.ROOT / f"{room}.py").read_text(encoding="utf-8").splitlines()) <= 650, room
        for node in ast.walk(tree_of(room)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (room, node.name)


def test_the_readmes_method_trains(quick, monkeypatch):
    loss, row = README[README.index("      def ipo_loss"):].split("\n\n")[:2]
    exec(re.sub("^      ", "", loss, flags=re.M), vars(losses))
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | {})
    monkeypatch.setattr(train, "METHODS", methods.METHODS)
    try:
        exec(re.sub("^      ", "", row, flags=re.M), vars(methods))
        config = methods.replace(methods.Config(), method="ipo", view="helpful", beta=0.5, lora_rank=4, lora_alpha=8.0,
                                 lr=1e-3, max_steps=2, log_every=1, device="cpu", out="out/ipo")
        train.run(config)
        first, second = conftest.rows(Path("out/ipo"))
        assert first["loss"] == pytest.approx(1.0, abs=1e-4)  # (0 − 1/(2 · 0.5))²
        assert second["rewards/margins"] > 0
    finally:
        del losses.ipo_loss, methods.ipo


def index():
    """tests/README.md: the first line of every test file."""
    lines = ["# Tests, by room", "", "`python -m pytest -q` runs all of them. Made by `python tests/test_results_readme.py`.", ""]
    for path in sorted((conftest.ROOT / "tests").glob("*.py")):
        doc = " ".join(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n\n")[0].split())
        lines.append(f"- `{path.name}`: {doc}")
    return "\n".join(lines) + "\n"


def test_the_index_of_tests_is_current():
    assert (conftest.ROOT / "tests/README.md").read_text(encoding="utf-8") == index()


if __name__ == "__main__":
    (conftest.ROOT / "tests/README.md").write_text(index(), encoding="utf-8")
