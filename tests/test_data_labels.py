"""Labels that are absent, rows that mislead, demonstrations for SFT, and prompts that several sources share."""
import numpy as np
import pytest
import torch

import methods
import train
from batch import epoch_order
from conftest import BASE, line_of, load_run, mistake, preference_pairs, rows, run, scored_file, write_rows
from data import Comparison, apply_view, load_sources, require
from losses import moe_dpo_loss

PAIR = {"prompt": "How do I bake bread?", "chosen": "Sure.", "rejected": "I will not help with that."}
FLAGS = {"chosen_unsafe": False, "rejected_unsafe": True}


def pairs_file(path, *changes):
    """A row of a pair for each dict of further fields; every prompt is another one."""
    return write_rows(path, *({**PAIR, "prompt": f"{PAIR['prompt']} {i}", **fields}
                              for i, fields in enumerate(changes)))


def wrong(path, *flags):
    return mistake("--model", BASE, "--data", path, "--held_out", 0, "--out", "out/wrong", *flags)


# Labels that are absent are not labels


@pytest.mark.parametrize("flags", (("--method", "safedpo", "--view", "helpful"), ("--method", "safedpo"),
                                   ("--method", "cost", "--view", "helpful"), ("--method", "cost")), ids=" ".join)
def test_a_loss_that_reads_safety_flags_refuses_rows_without(quick, flags):
    path = pairs_file(quick / "pairs.jsonl", FLAGS, {}, FLAGS, {})
    message = wrong(path, *flags)
    assert "2 of 4 comparisons have no safety" in message and f"{path}:2" in message and "chosen_unsafe" in message


def test_flags_under_another_name_are_pointed_at(quick):
    path = pairs_file(quick / "pairs.jsonl", *[{"chosen_safe": True, "rejected_safe": False}] * 3)
    message = wrong(path, "--method", "safedpo")
    assert "3 of 3" in message and f"{path}:1" in message and "chosen_safe" in message.split("with fields")[1]
    assert "is chosen_safe meant to be chosen_unsafe?" in message


def test_a_row_without_the_score_that_spe_dpo_needs_is_no_margin_of_zero(quick):
    lines = scored_file(quick / "scored.jsonl", ("cost",))
    kept = [line for line in lines if line["is_response_0_safe"] != line["is_response_1_safe"]]
    del kept[1]["scores"]
    path = write_rows(quick / "scored.jsonl", *lines)
    message = wrong(path, "--method", "spe-dpo", "--view", "safety")
    assert f"1 of {len(kept)} pairs have no scores.cost" in message and "--cost_model" in message


def test_dpo_needs_no_flags_and_pairs_keep_them_as_absent(quick):
    pairs = apply_view("helpful", load_sources([pairs_file(quick / "pairs.jsonl", {}, FLAGS)], held_out=0)[0])[0]
    assert [(pair.chosen_unsafe, pair.rejected_unsafe, pair.margin) for pair in pairs] == [(None, None, None),
                                                                                          (False, True, None)]
    run("dpo", "--model", BASE, "--data", quick / "pairs.jsonl", "--method", "dpo", "--held_out", 0, "--max_steps", 1)


def test_require_names_what_is_absent_and_how_often():
    items = [Comparison("a", ("b", "c"), unsafe=(False, True)), Comparison("a", ("b", "c"))]
    assert "who: 1 of 2 comparisons have no safety flags" in line_of(require, items, "unsafe", "who")
    require(items[:1], "unsafe", "who")


# Rows that mislead


def test_a_prompt_under_another_name_is_pointed_at(quick):
    path = write_rows(quick / "pairs.jsonl", {"question": "Why?", "chosen": "So.", "rejected": "No."})
    message = wrong(path, "--method", "dpo")
    assert f"{path}:1" in message and "no field 'prompt' (nearest: question)" in message


def test_a_system_turn_under_a_built_in_template_blames_the_template(quick):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    path = write_rows(quick / "pairs.jsonl", {"prompt": messages, "chosen": "So.", "rejected": "No."})
    message = wrong(path, "--method", "dpo", "--template", "alpaca")
    assert "pairs.jsonl:1: --template alpaca" in message and "system" in message and BASE not in message


def test_a_language_model_as_a_score_model_is_called_what_it_is(quick):
    path = pairs_file(quick / "pairs.jsonl", *[FLAGS] * 4)
    message = wrong(path, "--method", "spe-dpo", "--cost_model", BASE)
    assert all(part in message for part in (BASE, "LlamaForCausalLM", "not a score model", "score.weight"))


# Demonstrations


DIALOGUE = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How do I bake bread?"},
            {"role": "assistant", "content": "Sure."}, {"role": "user", "content": "How do I cook rice?"},
            {"role": "assistant", "content": "Of course."}]


@pytest.mark.parametrize("row, want", (
    ({"prompt": "Why?", "response": "So."}, [("Why?", "So.")]),
    ({"prompt": "Why?", "chosen": "So."}, [("Why?", "So.")]),
    ({"messages": DIALOGUE}, [(DIALOGUE[:2], "Sure."), (DIALOGUE[:4], "Of course.")]),
    (PAIR, [(PAIR["prompt"], "Sure.")])), ids=("prompt, response", "prompt, chosen", "messages", "pairs"))
def test_sft_takes_demonstrations_in_every_layout(tmp_path, row, want):
    comparisons = load_sources([write_rows(tmp_path / "rows.jsonl", row)], held_out=0)[0]
    pairs, _ = apply_view("helpful", comparisons, responses=1)
    assert [(pair.prompt, pair.chosen) for pair in pairs] == want


@pytest.mark.parametrize("turns, count", (("all", 2), ("last", 1)))
def test_sft_trains_on_all_turns_of_the_assistant_or_on_the_last(quick, turns, count):
    path = write_rows(quick / "rows.jsonl", {"messages": DIALOGUE})
    config, _, tokenizer = load_run("--method", "sft", "--model", BASE, "--data", path, "--held_out", 0,
                                    "--turns", turns)
    encoded, held_out = train.load_data(config, tokenizer)
    assert len(encoded) == count and held_out is None
    ids = encoded.tokens[encoded.bounds[-1, 1]:encoded.bounds[-1, 2]].tolist()
    assert tokenizer.decode(ids).strip() == "Of course." and ids[-1] == tokenizer.eos_id


def test_a_run_of_sft_on_demonstrations(quick):
    path = write_rows(quick / "rows.jsonl", *({"prompt": f"How do I bake a pie? {i}", "response": "Sure."}
                                              for i in range(8)))
    out = run("sft", "--method", "sft", "--model", BASE, "--data", path, "--held_out", 0, "--max_steps", 3,
              "--lr", 1e-3, "--log_every", 1)
    assert rows(out)[-1]["loss"] < rows(out)[0]["loss"]


def test_methods_that_compare_two_responses_refuse_demonstrations(quick):
    path = write_rows(quick / "rows.jsonl", {"prompt": "Why?", "response": "So."})
    message = wrong(path, "--method", "dpo")
    assert f"{path}:1" in message and "--method sft" in message


def test_a_dialogue_without_an_answer_is_counted_and_a_broken_one_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"messages": DIALOGUE}, {"messages": DIALOGUE[:2]})
    comparisons, _, lines = load_sources([path], held_out=0)
    assert len(comparisons) == 2 and "1 dropped (no turn of the assistant)" in lines[0]
    greeting = {"role": "assistant", "content": "Hi."}  # answers nothing
    path = write_rows(tmp_path / "rows.jsonl", {"messages": [greeting, *DIALOGUE[1:3]]},
                      {"messages": [*DIALOGUE[:2], {"role": "assistant", "content": 7}]})
    assert f"{path}:2" in line_of(load_sources, [path], held_out=0)


# Sources that share prompts


def test_prompts_held_out_by_one_source_are_in_no_sources_training_part(tmp_path):
    for name, split in (("a", "train"), ("a", "test"), ("b", "train")):
        (tmp_path / name).mkdir(exist_ok=True)
        numbers = range(20) if name == "b" else range(10, 20) if split == "train" else range(5)
        write_rows(tmp_path / name / f"{split}.jsonl", *({**PAIR, "prompt": f"Prompt {i}?"} for i in numbers))
    train_part, test_part, lines = load_sources([str(tmp_path / "a"), str(tmp_path / "b")], held_out=0)
    held_out = {c.prompt for c in test_part}
    assert held_out == {f"Prompt {i}?" for i in range(5)} and not held_out & {c.prompt for c in train_part}
    assert {c.prompt for c in train_part} == {f"Prompt {i}?" for i in range(5, 20)}
    assert "5 training comparisons dropped" in lines[-1]


# Annotators


def test_an_annotators_pairs_stay_together_also_where_shares_are_given():
    annotator = np.repeat(np.arange(30), 20)
    group = annotator % 2
    order = epoch_order(600, 2, 0, group, [2.0, 1.0], annotator)
    for epoch in np.split(order, 2):
        seen = annotator[epoch]
        assert len(np.flatnonzero(np.diff(seen))) + 1 == len(set(seen.tolist()))  # each stands in one stretch
        assert np.mean(group[epoch] == 0) == pytest.approx(2 / 3, abs=0.01)


def test_pairs_without_an_annotator_have_a_latent_expert_each(quick):
    pairs = preference_pairs(("warmth", "curtness"), annotators=2)[:12]
    lines = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "group": p.group if i < 6 else None}
             for i, p in enumerate(pairs)]
    path = write_rows(quick / "rows.jsonl", *lines)
    flags = ("--method", "mix-dpo", "--latent", "annotator", "--model", BASE, "--data", path, "--held_out", 0,
             "--lora_rank", 4)
    config, model, tokenizer = load_run(*flags, groups=("curtness 001", "warmth 000"))
    encoded, _ = train.load_data(config, tokenizer)
    methods.prepare_mixture(model, encoded, config)
    annotator = torch.from_numpy(encoded.labels["annotator"])
    assert len(set(annotator[6:].tolist())) == 6 and not set(annotator[:6].tolist()) & set(annotator[6:].tolist())
    policy = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0))
    reference, gate = torch.zeros(2, 12, 2), torch.full((12, 2), 0.5).log()
    together, apart = (moe_dpo_loss(policy, reference, gate, 1.0, annotator=numbers)[0]
                       for numbers in (torch.where(annotator > 1, -1, annotator), annotator))
    assert float(together) != pytest.approx(float(apart), rel=1e-3)


@pytest.mark.parametrize("flags", (
    ("--method", "sft"), ("--method", "safedpo"), ("--method", "pmol", "--egs_weight", 1),
    ("--method", "mix-dpo", "--expert_noise", 0.3),
    ("--method", "mix-dpo", "--latent", "annotator", "--annotators", 12, "--expert_noise", 0.3)),
    ids=lambda flags: " ".join(map(str, flags)))
def test_held_out_metrics_do_not_depend_on_how_pairs_are_batched(quick, flags):
    metrics = []
    for size in (1, 3, 100):
        out = run(f"run-{size}", *flags, "--lora_rank", 4, "--max_steps", 1, "--batch_size", size, "--lr", 1e-12)
        metrics.append({name: value for name, value in rows(out)[-1].items()
                        if name.startswith("eval/") and not name.endswith("accuracies")})  # of margins that are rounding
    assert len(metrics[0]) > 1
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)
