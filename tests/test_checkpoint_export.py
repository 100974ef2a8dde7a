"""What was trained, in formats that other software reads: plain checkpoints and PEFT adapters."""
from pathlib import Path

import pytest
import torch

import checkpoint
import eval as eval_file
from checkpoint import load_adapter, load_model
from common import read_json
from conftest import BASE, line_of, logits_of, run
from lora_moe import Gate, expert_layers, use_expert

TOKENS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
STEPS = ("--lora_rank", 4, "--lr", 1e-2, "--max_steps", 3)


def policy_logits(out, expert=None):
    policy = checkpoint.load_policy(out)[0]
    if expert is not None:
        use_expert(policy, expert)
    return logits_of(policy, TOKENS)


def close(got, want):
    return float((got - want).abs().max()) < 1e-4


@pytest.mark.parametrize("flags", (("--method", "safedpo", *STEPS), ("--method", "dpo", "--max_steps", 2),
                                   ("--method", "dpo", *STEPS, "--lora_targets", "all-linear")), ids=str)
def test_a_merged_run_is_a_plain_checkpoint_with_the_runs_logits(quick, flags):
    out = run("run", *flags)
    eval_file.main(["--merge", str(out), "--out", "merged"])
    model = load_model("merged")
    assert not expert_layers(model) and close(logits_of(model, TOKENS), policy_logits(out))
    assert Path("merged/tokenizer.json").is_file()


def test_a_merged_run_keeps_its_built_in_template(quick):
    out = run("run", "--method", "safedpo", *STEPS, "--template", "alpaca")
    eval_file.main(["--merge", str(out), "--out", "merged"])
    assert "BEGINNING OF CONVERSATION" in Path("merged/chat_template.jinja").read_text()


def test_several_experts_are_merged_at_fixed_weights_only(quick):
    out = run("run", "--method", "mix-dpo", *STEPS)
    assert "--static" in line_of(eval_file.main, ["--merge", str(out), "--out", "merged"])
    assert not Path("merged").exists()
    eval_file.main(["--merge", str(out), "--static", "0,1", "--out", "merged"])
    assert close(logits_of(load_model("merged"), TOKENS), policy_logits(out, expert=1))


@pytest.mark.parametrize("flags", ((), ("--gate", "prompt"), ("--gate", "constant"), ("--gate", "0.3,0.7"),
                                   ("--share", "trunk"), ("--share", "trunk", "--lora_rank", 0)), ids=str)
def test_each_exported_expert_is_a_peft_adapter_with_its_logits(quick, flags):
    out = run("run", "--method", "moe-dpo", *STEPS, *flags)
    eval_file.main(["--export", str(out), "--out", "exported"])
    gate = read_json("exported/gate.json")
    assert gate["experts"] == ["expert-0", "expert-1"]
    for k, name in enumerate(gate["experts"]):
        model = load_adapter(load_model(BASE), f"exported/{name}")
        assert close(logits_of(model, TOKENS), policy_logits(out, expert=k))
    assert not close(policy_logits(out, 0), policy_logits(out, 1))


def test_the_exported_gate_has_the_weights_of_every_user_and_of_an_unknown_one(quick):
    out = run("run", "--method", "moe-dpo", *STEPS, "--annotators", 4)
    eval_file.main(["--export", str(out), "--out", "exported"])
    gate, trained = read_json("exported/gate.json"), checkpoint.load_policy(out)[0].gate
    assert list(gate["users"]) == trained.spec["groups"] and len(gate["users"]) == 4
    logits = trained.weight.double() + trained.bias.double()
    for weights, row in zip(gate["users"].values(), logits.softmax(-1)):
        assert weights == pytest.approx(row.tolist(), rel=1e-5)
    unknown = (trained.weight.double().mean(0) + trained.bias).softmax(-1)
    assert gate["weights"] == pytest.approx(unknown.tolist(), rel=1e-5)


def test_an_exported_gate_on_prompts_is_a_linear_map(quick):
    out = run("run", "--method", "moe-dpo", *STEPS, "--gate", "prompt")
    eval_file.main(["--export", str(out), "--out", "exported"])
    gate, trained = read_json("exported/gate.json"), checkpoint.load_policy(out)[0].gate
    pooled = torch.randn(5, len(gate["weight"]))
    again = (pooled @ torch.tensor(gate["weight"]) + torch.tensor(gate["bias"])).softmax(-1)
    assert torch.allclose(again, trained(pooled).exp(), atol=1e-6) and isinstance(trained, Gate)


@pytest.mark.parametrize("flags", (("--method", "pmol", *STEPS), ("--method", "safedpo", *STEPS)), ids=str)
def test_what_no_adapter_format_describes_is_refused_in_one_line(quick, flags):
    out = run("run", *flags)
    assert "--export" in line_of(eval_file.main, ["--export", str(out), "--out", "exported"])
    assert not Path("exported").exists()
    if "pmol" in flags:
        assert "no routers or gate" in line_of(eval_file.main, ["--merge", str(out), "--out", "merged"])


def test_nothing_that_is_there_is_overwritten(quick):
    out = run("run", "--method", "safedpo", *STEPS)
    Path("there").mkdir()
    assert "not there yet" in line_of(eval_file.main, ["--merge", str(out), "--out", "there"])


def test_evaluation_honours_dtype_and_device(quick, monkeypatch):
    out, models = run("run", "--method", "safedpo", *STEPS), []
    monkeypatch.setattr(eval_file, "evaluate_run", lambda policy, base, *rest: models.extend((policy, base)) or exit())
    with pytest.raises(SystemExit):
        eval_file.main([str(out), "--dtype", "bfloat16", "--device", "cpu"])
    assert [model.model.norm.weight.dtype for model in models] == [torch.bfloat16] * 2
