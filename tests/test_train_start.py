"""What a run starts from is its reference: adapters, their settings, their base, and what is trained in float32."""
import math
from pathlib import Path

import pytest
import torch

import checkpoint
import methods
from chat import Tokenizer
from checkpoint import adapter_warnings, base_hash, load_adapter, load_model, save_model
from common import read_json
from conftest import (BASE, FIXTURES, first_batch, ids_of, load_run, logp_alone, mistake, pair_logps, rows, run,
                      small_pairs)
from lora_moe import merge_experts, trainable_parameters

SFT = ("--method", "sft", "--lora_rank", 4, "--lora_targets", "q_proj,down_proj", "--lr", 1e-2, "--max_steps", 6)


@pytest.fixture
def adapter(quick):
    """An adapter that SFT has moved far from the base."""
    return str(run("sft", *SFT) / "adapter")


def test_dpo_from_an_adapter_starts_at_log_2_with_the_adapters_model_as_the_reference(adapter):
    out = run("dpo", "--method", "dpo", "--view", "safedpo", "--init_adapter", adapter, "--max_steps", 2,
              "--log_every", 1)
    first = rows(out)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    pairs = first_batch(small_pairs("safedpo"))
    merged, tokenizer = merge_experts(load_adapter(load_model(BASE), adapter)), Tokenizer(BASE)
    with torch.no_grad():
        chosen = [float(logp_alone(merged, *ids_of(tokenizer, pair)[:2])) for pair in pairs]
    of_base = [pair_logps(BASE, pair)[0] for pair in pairs]
    assert first["logps/chosen"] == pytest.approx(sum(chosen) / 8, rel=1e-4)
    assert abs(sum(chosen) - sum(of_base)) > 0.1  # the reference is another model than the base


def test_a_merged_adapter_is_the_same_start_as_the_adapter(adapter):
    save_model(merge_experts(load_adapter(load_model(BASE), adapter)), Path("merged"))
    flags = ("--method", "dpo", "--view", "safedpo", "--max_steps", 3, "--log_every", 1, "--lr", 1e-3, "--beta", 1)
    starts = {"adapter": ("--init_adapter", adapter), "merged": ("--model", "merged", "--lora_rank", 4)}
    first = {name: rows(run(name, *flags, *start))[0] for name, start in starts.items()}
    assert first["adapter"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for metric in ("loss", "logps/chosen", "logps/rejected"):
        assert first["adapter"][metric] == pytest.approx(first["merged"][metric], rel=1e-5)


def test_safedpo_goes_on_from_dpo_and_learns(adapter):
    flags = ("--max_steps", 4, "--log_every", 1, "--lr", 1e-3, "--beta", 1)
    helpful = run("help", "--method", "dpo", "--init_adapter", adapter, *flags)
    sacpo = run("sacpo", "--method", "dpo", "--view", "harmless", "--init_adapter", helpful / "adapter", *flags)
    assert rows(sacpo)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows(sacpo)[-1]["loss"] < math.log(2) - 1e-3


def test_rank_targets_and_learning_rate_follow_the_adapter(adapter):
    config = methods.parse_flags(["--method", "dpo", "--model", BASE, "--init_adapter", adapter, "--device", "cpu"])
    assert (config.lora_rank, config.lora_alpha, config.lr) == (4, 8.0, 1e-5)
    assert sorted(config.lora_targets) == ["down_proj", "q_proj"]
    out = run("dpo", "--method", "dpo", "--init_adapter", adapter, "--max_steps", 1)
    assert read_json(out / "config.json")["lora_rank"] == read_json(out / "adapter/adapter_config.json")["r"] == 4


def test_a_flag_that_the_adapter_decides_is_refused(adapter):
    assert "--init_adapter has its own" in mistake("--method", "dpo", "--init_adapter", adapter, "--lora_rank", 8)


def test_one_policy_starts_from_one_adapter(adapter):
    message = mistake("--method", "dpo", "--init_adapter", f"{adapter},{adapter}")
    assert "2 adapters" in message and "starts from 1" in message


def test_folders_may_have_spaces_and_commas_and_a_flag_may_be_given_twice(adapter, quick):
    path = quick / "an adapter, twice"
    Path(adapter).rename(path)
    assert methods.parse_flags(["--method", "dpo", "--init_adapter", str(path)]).init_adapter == (str(path),)
    config = methods.parse_flags(["--method", "mix-dpo", "--init_adapter", str(path), "--init_adapter", str(path)])
    assert config.init_adapter == (str(path), str(path)) and config.experts == 2


def test_an_adapter_that_is_not_there_is_named_before_anything_is_trained(quick):
    message = mistake("--method", "midpo", "--init_adapter", "no/adapter", "--init_adapter", "no/other")
    assert "no/adapter" in message and not Path("out/midpo").exists()
    assert "no/score/model" in mistake("--method", "midpo", "--cost_model", "no/score/model")


def test_a_mixture_from_adapters_compares_each_expert_with_its_own_start(adapter, quick):
    other = run("other", *SFT, "--seed", 1, "--model", BASE, "--lr", 3e-2) / "adapter"
    out = run("mix", "--method", "mix-dpo", "--init_adapter", adapter, "--init_adapter", other, "--max_steps", 2,
              "--log_every", 1)
    first = rows(out)[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["log_likelihood"] == pytest.approx(-math.log(2), abs=1e-5)


# What is trained is float32


@pytest.mark.parametrize("flags", (
    ("--method", "reward", "--lora_rank", 4), ("--method", "cost", "--lora_rank", 4), ("--method", "reward"),
    ("--method", "safedpo", "--lora_rank", 4), ("--method", "pmol", "--lora_rank", 4),
    ("--method", "moe-dpo", "--lora_rank", 4), ("--method", "moe-dpo", "--share", "trunk", "--lora_rank", 0)),
    ids=lambda flags: " ".join(map(str, flags)))
def test_whatever_is_trained_is_float32_also_on_a_bfloat16_base(quick, flags):
    groups = ("helpfulness", "harmlessness", "empathy") if "pmol" in flags else ("warmth 000", "curtness 001")
    _, model, _ = load_run(*flags, "--dtype", "bfloat16", groups=groups)
    trained = dict(trainable_parameters(model))
    assert trained and {parameter.dtype for parameter in trained.values()} == {torch.float32}
    base = {parameter.dtype for name, parameter in model.named_parameters()
            if name not in trained and "lora_" not in name}
    assert base <= {torch.bfloat16}


def test_a_score_head_on_a_bfloat16_trunk_scores_in_float32(quick):
    out = run("reward", "--method", "reward", "--lora_rank", 4, "--dtype", "bfloat16", "--max_steps", 4, "--lr", 1e-2)
    model, tokenizer = checkpoint.load_score_model(out / "model")
    weight = model.score.weight
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    hidden = torch.randn(1, 3, weight.shape[1])
    model.model.forward = lambda *inputs: hidden.bfloat16()
    want = hidden.bfloat16().double()[0] @ weight.double()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(torch.zeros(1, 3), torch.arange(3)).double(), want, rtol=1e-6)


# An adapter knows its base


def test_an_adapter_on_another_base_or_template_gets_a_warning(adapter, quick, capsys):
    model = load_model(BASE)
    assert adapter_warnings(model, [adapter]) == []
    assert adapter_warnings(load_model(BASE, torch.bfloat16), [adapter]) == []
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    warning, = adapter_warnings(model, [adapter])
    assert "other base weights" in warning and adapter in warning
    run("dpo", "--method", "dpo", "--init_adapter", adapter, "--template", "plain", "--max_steps", 1)
    assert "warning: " + adapter + " was trained with --template chat, not plain" in capsys.readouterr().out


def test_the_hash_of_a_base_does_not_see_its_experts(adapter):
    model = load_model(BASE)
    before = base_hash(model)
    assert base_hash(load_adapter(model, adapter)) == before


@pytest.mark.parametrize("name, expected", (("llama", "ffe105a948f695172405c45863074fea"),
                                            ("gpt2", "737b877e1e7b8f69292e4c2a7b365bf9")))
def test_the_hash_of_a_base_is_the_one_in_the_files_of_adapters_that_exist(name, expected):
    assert base_hash(load_model(FIXTURES / name)) == expected


def test_peft_finds_a_local_base_from_any_folder(adapter):
    base = read_json(Path(adapter) / "adapter_config.json")["base_model_name_or_path"]
    assert Path(base).is_absolute() and (Path(base) / "config.json").is_file()


def test_a_model_trained_with_a_built_in_template_is_saved_with_it(quick):
    out = run("sft", "--method", "sft", "--template", "alpaca", "--max_steps", 1)
    assert "BEGINNING OF CONVERSATION" in (out / "model/chat_template.jinja").read_text()
    assert Tokenizer(out / "model").render("Hi") == Tokenizer(BASE, "alpaca").render("Hi")
    assert not (run("plain", "--method", "sft", "--max_steps", 1) / "model/chat_template.jinja").exists()


# Presets


def test_presets_of_real_models_are_those_of_the_papers_and_their_code(quick):
    def value(method, name, *flags):
        return getattr(methods.parse_flags(["--method", method, "--model", BASE, "--data", "hh-rlhf", *flags]), name)
    assert value("sft", "lr") == 2e-5 and value("sft", "lr", "--lora_rank", "8") == 1e-4
    assert value("safedpo", "lr") == 1e-6 and value("safedpo", "delta") == 10 and value("safedpo", "beta") == 0.1
    assert value("reward", "lr") == 2e-5 and value("cost", "epochs") == 2 and value("reward", "score_l2") == 0.001
    assert value("midpo", "lr") == 1e-5 and value("midpo", "router_hidden") == 512 and value("midpo", "lora_rank") == 16
    assert value("moe-dpo", "lr") * value("moe-dpo", "router_lr") == pytest.approx(0.01)


def test_scores_are_pulled_to_zero_by_their_squares(quick):
    flags = ("--method", "reward", "--max_steps", 8, "--log_every", 8)
    weak, strong = (rows(run(name, *flags, "--score_l2", weight))[-1]["margin"]
                    for name, weight in (("a", 0), ("b", 10)))
    assert strong < weak / 2
