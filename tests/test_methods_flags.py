"""The command line: settings and presets, --help, and one line for every mistake, before a run folder is made."""
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

import common
import eval as eval_file
import toy
import train
from common import check_values
from conftest import BASE, ROOT, check_mistake, grouped_file, line_of, mistake, write_rows
from methods import Config, parse_flags, resolve

# Mistakes

MISTAKES = {
    "safedpo": (
        (("--method", "ppo"), ("ppo", "safedpo", "dpo", "sft")),
        (("--mehtod", "dpo"), ("--mehtod", "did you mean --method")),
        (("--learning_rate", "1e-5"), ("unrecognized --learning_rate: here it is --lr",)),
        (("--learning-rate=1e-5",), ("unrecognized --learning-rate: here it is --lr",)),
        (("--batch-size", "4"), ("unrecognized --batch-size: here it is --batch_size",)),
        (("--bf16",), ("unrecognized --bf16: here it is --dtype bfloat16",)),
        (("--epochs", "many"), ("--epochs", "many")),
        (("--delta", "ten"), ("--delta", "ten")),
        (("--delta", "-1"), ("--delta", "-1")),
        (("--delta", "nan"), ("--delta", "nan")),
        (("--delta", "inf"), ("--delta", "inf")),
        (("--beta", "0"), ("--beta", "more than 0")),
        (("--beta", "-0.1"), ("--beta", "-0.1")),
        (("--beta", "nan"), ("--beta", "nan")),
        (("--lr", "0"), ("--lr", "more than 0")),
        (("--lr", "nan"), ("--lr", "nan")),
        (("--label_smoothing", "0.5"), ("--label_smoothing", "less than 0.5")),
        (("--label_smoothing", "-0.1"), ("--label_smoothing",)),
        (("--lora_rank", "-1"), ("--lora_rank", "-1")),
        (("--lora_rank", "4", "--lora_alpha", "0"), ("--lora_alpha",)),
        (("--batch_size", "0"), ("--batch_size", "at least 1")),
        (("--grad_accum", "0"), ("--grad_accum", "at least 1")),
        (("--epochs", "0"), ("--epochs", "at least 1")),
        (("--seed", "-1"), ("--seed", "-1")),
        (("--view", "kind"), ("--view", "kind", "safe-better")),
        (("--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
        (("--device", "cuda:99"), ("--device", "cuda:99")),
        (("--device", "toaster"), ("--device", "toaster")),
        (("--lora_rank", "4", "--lora_targets", "nonsense"), ("nonsense", "down_proj")),
        (("--low_memory", "--lora_rank", "4"), ("--low_memory", "all weights")),
        (("--low_memory", "--grad_accum", "2"), ("--grad_accum", "--low_memory")),
        (("--low_memory", "--grad_clip", "1"), ("--grad_clip", "--low_memory")),
        (("--low_memory", "--dtype", "float32"), ("--dtype", "--low_memory", "bfloat16"))),
    "pmol": (
        (("--experts", "4"), ("--experts 4", "multiple", "3")),
        (("--experts=-3",), ("--experts -3",)),
        (("--experts", "0"), ("--experts 0",)),
        (("--groups", "helpfulness,kindness"), ("--groups", "kindness", "harmlessness")),
        (("--groups", "empathy=x"), ("--groups", "empathy=x", "more than 0")),
        (("--groups", "empathy=-1,helpfulness=2"), ("--groups", "empathy=-1", "more than 0")),
        (("--groups", "empathy=0,helpfulness=2"), ("--groups", "empathy=0", "more than 0")),
        (("--groups", "empathy=nan,helpfulness"), ("--groups", "empathy=nan")),
        (("--groups", "empathy,empathy"), ("--groups", "empathy")),
        (("--soft_constraint", "abc"), ("--soft_constraint", "abc", "expected")),
        (("--soft_constraint", "2"), ("--soft_constraint 2", "at most 1")),
        (("--soft_constraint", "-0.5"), ("--soft_constraint", "-0.5")),
        (("--soft_constraint=-0.5",), ("--soft_constraint -0.5", "at least 0")),
        (("--soft_constraint", "nan"), ("--soft_constraint nan", "not a finite number")),
        (("--soft_constraint", "0.1,0.2"), ("--soft_constraint", "2 numbers for 3 groups")),
        (("--soft_constraint", "0.1,,0.2"), ("--soft_constraint", "0.1,,0.2", "expected")),
        (("--egs_weight", "-1"), ("--egs_weight -1",)),
        (("--egs_weight", "nan"), ("--egs_weight nan",)),
        (("--router_temperature", "0"), ("--router_temperature 0", "more than 0")),
        (("--lora_rank", "0"), ("--lora_rank 0", "at least 1"))),
    "moe-dpo": (
        (("--gate", "0.5"), ("--gate", "1 weights for 2 experts")),
        (("--gate", "0.2,0.3,0.5"), ("--gate", "3 weights for 2 experts")),
        (("--gate", "nonsense"), ("--gate", "nonsense", "prompt", "user")),
        (("--gate", "0,0"), ("--gate 0", "more than 0")),
        (("--gate=-1,2",), ("--gate -1", "more than 0")),
        (("--gate", "1,0"), ("--gate 0", "more than 0")),
        (("--gate", "nan,1"), ("--gate nan", "not a finite number")),
        (("--latent", "nobody"), ("--latent nobody", "comparison", "annotator")),
        (("--objective", "sum"), ("--objective sum", "elbo", "weights")),
        (("--share", "head"), ("--share head", "trunk")),
        (("--references", BASE), ("--references", "1 folders for 2 experts")),
        (("--references", "nowhere/a,nowhere/b"), ("nowhere/a",)),
        (("--q_temperature", "0"), ("--q_temperature 0",)),
        (("--q_temperature", "4,0"), ("--q_temperature 0", "more than 0")),
        (("--q_temperature", "4,2,1"), ("--q_temperature: 3 numbers",)),
        (("--expert_noise=-1",), ("--expert_noise -1",)),
        (("--experts=-2",), ("--experts -2",)),
        (("--router_lr", "0"), ("--router_lr 0", "more than 0")),
        (("--annotators=-1",), ("--annotators -1",)),
        (("--lora_rank", "0"), ("--lora_rank 0",)),
        (("--lora_targets", "down_proj,lm_head"), ("lm_head",)),
        (("--groups", "kindness,warmth"), ("--groups", "kindness"))),
}


CASES = [(method, *case) for method, cases in MISTAKES.items() for case in cases]


@pytest.mark.parametrize("method, flags, parts", CASES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_mistaken_flag_gets_one_line_that_names_it(place, method, flags, parts):
    check_mistake(method, flags, parts)


def test_no_run_folder_is_made_for_a_mistake(place, monkeypatch):
    (place / "empty").mkdir()
    for flags in (("--model", "empty"), ("--model", "no/such/folder"), ("--model", "./nowhere")):
        check_mistake("safedpo", flags, ())
    monkeypatch.setattr(toy, "make_comparisons", lambda *_, **__: [])
    check_mistake("safedpo", (), ("no pairs are left",))


def test_a_run_folder_that_is_a_file_is_named(place):
    Path("out/file").write_text("")
    with pytest.raises(FileExistsError):  # as_command makes one line of an OSError
        mistake("--out", "out/file")


def test_a_folder_that_is_no_model_is_named(place):
    (place / "empty").mkdir()
    assert "empty: not a model folder" in mistake("--model", "empty")
    (place / "empty/config.json").write_text('{"model_type": "bert"}')
    assert "bert" in mistake("--model", "empty")


def test_views_that_drop_everything_say_so(place, monkeypatch):
    unsafe = [comparison for comparison in toy.make_comparisons(300, 0) if all(comparison.unsafe)]
    assert unsafe
    monkeypatch.setattr(toy, "make_comparisons", lambda *_, **__: unsafe)
    message = mistake()
    assert "no pairs are left" in message and f"{len(unsafe)} dropped (both unsafe)" in message


def test_the_command_line_answers_mistakes_with_one_line_and_no_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    commands = [("train.py", "--method", "ppo"), ("train.py", "--model", "empty"), ("eval.py", "empty")]
    processes = [subprocess.Popen([sys.executable, str(ROOT / name), *flags], cwd=tmp_path, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}) for name, *flags in commands]
    for command, process in zip(commands, processes):
        printed, error = process.communicate(timeout=120)
        assert process.returncode == 1 and not printed, command
        assert error.count("\n") == 1 and error.startswith(f"{command[0]}: ") and "Traceback" not in error, error
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_flags_of_transformers_and_trl_are_answered_with_flags_that_there_are(place):
    for theirs, ours in common.THEIRS.items():
        assert theirs not in {flag.name for flag in fields(Config)}
        assert mistake(f"--{theirs}", "1") == f"unrecognized --{theirs}: here it is {ours}"
        assert re.match("--([a-z_]+)", ours)[1] in {flag.name for flag in fields(Config)}
    assert line_of(eval_file.main, ["--max_length", "9"]) == "unrecognized --max_length: here it is --max_len"
    assert "here it is" not in line_of(eval_file.main, ["--learning_rate", "9"])


# Flags that a run would not read


def adapter_settings(folder):
    """A folder with the settings of an adapter. Returns its name."""
    Path(folder).mkdir()
    write_rows(Path(folder) / "adapter_config.json",
               {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["down_proj"]})
    return folder


UNREAD = (  # flags, the one that is not read last, and parts of the answer: methods that read it, or the reason
    ("--method dpo --delta 3", ("--method dpo", "safedpo")),
    ("--method safedpo --experts 2", ("--method safedpo", "pmol", "mix-dpo", "moe-dpo")),
    ("--method mix-dpo --label_smoothing 0.1", ("--method mix-dpo", "dpo", "safedpo", "spe-dpo", "midpo", "pmol")),
    (f"--method dpo --references {BASE}", ("mix-dpo", "moe-dpo")),
    ("--method moe-dpo --share trunk --lora_targets q_proj", ("--share trunk",)),
    ("--method dpo --lora_rank 0 --lora_targets q_proj", ("--lora_rank 0",)),
    ("--method dpo --lora_rank 0 --lora_alpha 8", ("--lora_rank 0",)),
    ("--method dpo --init_adapter adapter --lora_rank 8", ("--init_adapter",)),
    ("--method mix-dpo --objective weights --latent annotator", ("--objective weights",)),
    ("--method moe-dpo --objective weights --q_temperature 2", ("--objective weights",)),
    ("--method mix-dpo --gate 0.5,0.5 --router_lr 10", ("a fixed gate does not learn",)),
    ("--method dpo --annotators 9", ("only toy preferences",)),
    ("--method moe-dpo --data pairs.jsonl --annotators 9", ("only toy preferences",)),
    ("--method pmol --harmful_share 0.5", ("--groups",)),
    ("--method dpo --held_out 0.1", ("no file",)),
    (f"--method dpo --model {BASE} --temperature 0", ("toy model",)),
)


@pytest.mark.parametrize("flags, parts", UNREAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_flag_that_the_run_would_not_read_gets_one_line_that_says_why(place, flags, parts):
    grouped_file("pairs.jsonl", ("ann", "bob"))
    adapter_settings("adapter")
    _, method, *others = flags.split()
    check_mistake(method, others, (others[-2], *parts))


READ = (  # the other side of the table: nothing is refused needlessly
    "--method safedpo --delta 3", "--method pmol --experts 3", "--method spe-dpo --label_smoothing 0.1",
    f"--method mix-dpo --references {BASE},{BASE}", "--method moe-dpo --lora_targets q_proj",
    "--method moe-dpo --share trunk --lora_rank 0", "--method dpo --lora_rank 8 --lora_targets q_proj",
    "--method mix-dpo --latent annotator --q_temperature 2", "--method mix-dpo --gate constant --router_lr 9",
    "--method moe-dpo --annotators 9", "--method dpo --groups warmth,curtness --annotators 9",
    "--method safedpo --harmful_share 0.5", "--method dpo --data pairs.jsonl --held_out 0.1",
    "--method dpo --data pairs.jsonl --temperature 0", f"--method dpo --model {BASE} --lora_rank 0")


@pytest.mark.parametrize("flags", READ)
def test_the_same_flags_are_read_where_they_matter(place, flags):
    grouped_file("pairs.jsonl", ("ann", "bob"))
    assert parse_flags([*flags.split(), "--device", "cpu"]).method == flags.split()[1]


# Settings


def test_the_settings_of_nothing_given_are_valid_and_those_of_the_papers_safedpo():
    config = Config()
    check_values(Config, vars(config))
    assert all(value is None or isinstance(value, flag.type) for flag in fields(Config)
               for value in [getattr(config, flag.name)])
    given = {"model": BASE, "data": ("hh-rlhf",), "device": "cpu"}
    assert replace(config, **given) == resolve(given)


def test_settings_cannot_change_after_they_are_resolved():
    config = parse_flags(["--device", "cpu"])
    with pytest.raises(FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(FrozenInstanceError):
        config.groups = ("warmth", None)


def test_settings_with_commas_are_tuples(place):
    config = parse_flags(["--method", "pmol", "--groups", "empathy=3,cheer", "--soft_constraint", "0,0.5",
                          "--lora_targets", "q_proj,mlp.up_proj", "--device", "cpu"])
    assert config.groups == (("empathy", 3.0), ("cheer", 1.0)) and config.preferences == ["empathy", "cheer"]
    assert config.shares == [3.0, 1.0] and config.soft_constraint == (0.0, 0.5)
    assert config.lora_targets == ("q_proj", "mlp.up_proj") and config.data == ("toy",) and config.init_adapter == ()
    config = parse_flags(["--method", "mix-dpo", "--gate", "3,1", "--references", f"{BASE},{BASE}",
                          "--groups", "cheer,warmth", "--lora_targets", "mlp", "--device", "cpu"])
    assert config.gate == (3.0, 1.0) and config.references == (BASE, BASE) and config.lora_targets == "mlp"
    assert config.groups == (("cheer", None), ("warmth", None)) and config.shares is None


@pytest.mark.parametrize("method, papers, toys", (
    ("safedpo", dict(lr=1e-6, lora_rank=0, epochs=3, delta=10.0, beta=0.1, weight_decay=0.05),
     dict(lr=1.6e-4, lora_rank=16, epochs=2)),
    ("spe-dpo", dict(lr=1e-5, lora_rank=16, weight_decay=0.01, view="safety"), dict(epochs=2)),
    ("midpo", dict(lr=1e-5, lora_rank=16, weight_decay=0.0, router_hidden=512, router_l1=0.001, view="dual"),
     dict(lr=3e-4, epochs=6, router_hidden=64, harmful_share=0.7)),
    ("pmol", dict(lora_rank=16, lora_targets="mlp", egs_weight=0.1, soft_constraint=(0.5,), groups=()),
     dict(lora_targets=("down_proj",), preferences=["helpfulness", "harmlessness", "empathy"])),
    ("mix-dpo", dict(beta=0.1, gate="constant", experts=2, annotators=0, router_lr=100.0),
     dict(beta=0.3, gate="constant", experts=2, annotators=100, router_lr=100.0, preferences=["warmth", "curtness"])),
    ("moe-dpo", dict(gate="prompt"), dict(gate="user")),
    ("reward", dict(lr=2e-5, lora_rank=0), dict(lr=3e-4, epochs=1)),
))
def test_defaults_are_the_papers_or_those_chosen_for_the_toy_world(method, papers, toys, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.touch()
    config = parse_flags(["--method", method, "--model", "x", "--data", str(data), "--device", "cpu"])
    assert {name: getattr(config, name) for name in papers} == papers
    config = parse_flags(["--method", method, "--device", "cpu"])
    assert {name: getattr(config, name) for name in toys} == toys


def test_settings_that_depend_on_others_follow_the_given_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def resolved(*flags):
        return parse_flags([*flags, "--device", "cpu"])

    assert resolved("--lora_rank", "4").lora_alpha == 8.0 and resolved("--lora_rank", "0").lr == 1.6e-5
    assert resolved("--model", "x", "--lora_rank", "4").lr == 1e-5
    assert resolved("--method", "spe-dpo", "--view", "helpful").epochs == 1
    assert resolved("--method", "mix-dpo", "--share", "trunk").lora_targets == ("lm_head",)
    started = resolved("--method", "mix-dpo", "--init_adapter", ",".join(adapter_settings(n) for n in "abc"))
    assert started.experts == 3 and (started.lora_rank, started.lora_alpha) == (4, 12)
    assert resolved("--method", "dpo").out == "out/dpo"


# --help


@pytest.fixture
def help_of(monkeypatch, capsys):
    """help_of(*flags) -> {heading: {flag: its help}} of train.py --help."""
    monkeypatch.setenv("COLUMNS", "300")  # a flag to a line

    def help_of(*flags):
        with pytest.raises(SystemExit) as ended:
            train.main(["--help", *flags])
        assert ended.value.code == 0
        headings = {}
        for line in capsys.readouterr().out.splitlines():
            if line.endswith(":") and not line.startswith(" "):
                headings[line[:-1]] = {}
            elif line.startswith("  --"):
                flag, _, text = line.strip().partition(" ")
                headings[[*headings][-1]][flag[2:].rstrip(",")] = text
        return headings
    return help_of


def test_help_is_grouped_and_names_every_flag_with_its_default(help_of):
    headings = help_of()
    assert [*headings][-8:] == ["method", "model", "data", "optimiser", "machine", "run", "toy", "score models"]
    for heading, flags in (("method", ("method", "view", "beta", "delta", "label_smoothing")),
                           ("model", ("model", "lora_rank", "experts", "gate", "router_hidden")),
                           ("data", ("data", "groups", "max_len", "template", "skip_bad_rows")), ("score models", ("reward_model",)),
                           ("optimiser", ("epochs", "batch_size", "grad_accum", "lr", "seed")),
                           ("machine", ("device", "dtype")), ("toy", ("harmful_share", "annotators")),
                           ("run", ("out", "resume", "save_every", "log_every"))):
        assert set(flags) <= headings[heading].keys(), heading
    shown = {flag for flags in headings.values() for flag in flags}
    assert shown == {flag.name for flag in fields(Config)} | {"help"}
    assert "(default: 0.1)" in headings["method"]["beta"] and "(default: 10.0)" in headings["method"]["delta"]


@pytest.mark.parametrize("flags, hidden, epochs", (((), 64, 6), (("--model", "x"), 512, 3)), ids=("toy", "other"))
def test_help_of_a_method_shows_its_values_and_hides_flags_that_it_does_not_read(help_of, flags, hidden, epochs):
    headings = help_of("--method", "midpo", *flags)
    assert f"(default: {hidden})" in headings["model"]["router_hidden"]
    assert f"(default: {epochs})" in headings["optimiser"]["epochs"]
    assert "(default: dual)" in headings["method"]["view"] and "(default: out/midpo)" in headings["run"]["out"]
    shown = {flag for flags in headings.values() for flag in flags}
    assert {"beta", "label_smoothing", "router_l1", "router_lr", "reward_model", "init_adapter", "lora_rank"} <= shown
    assert not {"delta", "egs_weight", "experts", "gate", "objective", "references", "router_temperature"} & shown


def test_help_shows_the_values_that_were_given(help_of):
    assert "(default: 3.5)" in help_of("--method", "safedpo", "--delta", "3.5")["method"]["delta"]


def test_help_shows_lists_as_they_are_typed(help_of):
    assert "(default: warmth,curtness)" in help_of("--method", "moe-dpo")["data"]["groups"]
    weighted = help_of("--method", "pmol", "--groups", "empathy=2,brevity=0.5")
    assert "(default: empathy=2,brevity=0.5)" in weighted["data"]["groups"]
