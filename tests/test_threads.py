"""The toy base model, a run on it and its table are the same bytes with any number of threads."""
import os
import subprocess
import sys

import torch
from conftest import ROOT, files_of

import toy

SHORT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import eval as eval_file, toy, train
prompts = toy.eval_prompts
toy.DEMONSTRATIONS, toy.COMPARISONS, toy.eval_prompts = 480, 60, lambda *which: prompts(*which)[::51]
"""
TRAIN = SHORT + "train.main('--method safedpo --device cpu --out out/run --epochs 1'.split())"
EVALUATE = SHORT + "eval_file.main('out/run --split dev --device cpu'.split())"


def run_with(threads, folder, script):
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"})


def computed(folder):
    """files_of without the adapter's settings, which name the folder of the base model."""
    return {str(path): data for path, data in files_of(folder).items() if path.name != "adapter_config.json"}


def test_base_run_and_table_do_not_depend_on_the_number_of_threads(tmp_path):
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        run_with(threads, folder, TRAIN)  # makes a short base model first
        run_with(threads, folder, EVALUATE)
    for part in ("toy-base-seed0", "run"):
        one, two = (computed(tmp_path / threads / "out" / part) for threads in "12")
        assert one == two and len(one) >= 4
    assert {"eval.json", "eval-dev.json"} < one.keys()


def test_only_the_toy_world_is_bound_to_one_thread(tmp_path):
    before = torch.get_num_threads()
    try:
        for model, expected in (("gpt2", 2), (tmp_path, 2), ("toy", 1)):
            torch.set_num_threads(2)
            toy.one_thread(model)
            assert torch.get_num_threads() == expected
        (tmp_path / "recipe.txt").write_text("")  # as in the folder of a toy base model
        torch.set_num_threads(2)
        toy.one_thread(tmp_path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
