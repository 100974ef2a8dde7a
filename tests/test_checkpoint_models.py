"""Checkpoints load, compute, score and save exactly; references were stored by fixtures/make_fixtures.py."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors, save_torch_state_dict
from safetensors.torch import load_file, save_file

import checkpoint
import model as model_file
from checkpoint import find_folder, load_model, read_config, save_model
from common import atomic_file, atomic_folder, read_json, write_text
from conftest import (FAMILY_FIXTURES, FIXTURES, edit_json, edit_tensors, line_of, load_fixture, logits_of,
                      relative_error)
from model import FAMILIES, ModelConfig, RMSNorm, ScoreModel, Transformer


def copy_of(name, tmp_path):
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name, ignore=shutil.ignore_patterns("expected*")))


# The numbers


@pytest.mark.parametrize("name", FAMILY_FIXTURES)
def test_logits_equal_transformers(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    logits = logits_of(load_fixture(name), expected["tokens"])
    assert relative_error(logits, expected["logits"]) < 2e-5


@pytest.mark.parametrize("name", FAMILY_FIXTURES)
def test_explicit_mask_and_positions_give_the_same_logits(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_fixture(name)
    B, T = expected["tokens"].shape
    with torch.no_grad():
        logits = model.logits(model(expected["tokens"], torch.arange(T).expand(B, T),
                                    lambda row, head, query, key: query >= key))
    assert relative_error(logits, expected["logits"]) < 2e-5


@pytest.mark.parametrize("name", FAMILY_FIXTURES)
def test_every_weight_matters_to_the_logits(name):
    """Else a wrong weight could hide behind the fixture."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_fixture(name)
    generator = torch.Generator().manual_seed(0)
    for key, weight in model.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
        moved = relative_error(logits_of(model, expected["tokens"]), expected["logits"])
        # Without rotations, a key's bias adds the same to all scores of a query, and softmax forgets it.
        assert moved > 1e-3 or (name == "gpt2" and key.endswith("k_proj.bias")), key
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize("name", [name for name in FAMILY_FIXTURES if name != "gpt2"])
def test_older_spelling_of_rope_gives_the_same_logits(name, tmp_path):
    folder = copy_of(name, tmp_path)
    config = read_json(folder / "config.json")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    expected = load_file(FIXTURES / name / "expected.safetensors")
    assert relative_error(logits_of(load_model(folder), expected["tokens"]), expected["logits"]) < 2e-5


def test_linear_rope_scaling_divides_positions():
    plain = ModelConfig.from_hf({**read_json(FIXTURES / "llama" / "config.json")})
    scaled = ModelConfig.from_hf({**plain.hf, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}})
    assert torch.allclose(model_file.rope_frequencies(scaled) * 4, model_file.rope_frequencies(plain))


def test_keys_left_out_of_config_json_mean_what_transformers_assumes():
    small = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    gemma2 = ModelConfig.from_hf({"model_type": "gemma2", **small})
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.windows, gemma2.head_dim, gemma2.tied,
            gemma2.attention_scale, gemma2.activation) == (50, 30, (4096, 0), 256, True, 1 / 16, "gelu_pytorch_tanh")
    assert ModelConfig.from_hf({"model_type": "gemma", **small, "hidden_act": "gelu"}).activation == "gelu_pytorch_tanh"
    assert ModelConfig.from_hf({"model_type": "mistral", **small}).windows == (4096, 4096)
    assert ModelConfig.from_hf({"model_type": "mistral", **small, "sliding_window": None}).windows == (0, 0)
    qwen2 = ModelConfig.from_hf({"model_type": "qwen2", **small, "sliding_window": 8, "use_sliding_window": False})
    assert (qwen2.windows, qwen2.qkv_bias, qwen2.o_bias, qwen2.head_dim) == ((0, 0), True, False, 8)
    assert ModelConfig.from_hf({"model_type": "qwen3", **small}).head_dim == 128


def test_layer_types_decide_which_layers_slide():
    for name, window in (("gemma2", 6), ("qwen2_window", 4)):
        hf = read_json(FIXTURES / name / "config.json")
        types = ["full_attention", "sliding_attention", "full_attention"]
        assert ModelConfig.from_hf({**hf, "layer_types": types}).windows == (0, window, 0)


def test_bfloat16_logits_stay_near_float32():
    expected = load_file(FIXTURES / "gemma2" / "expected.safetensors")
    model = load_model(FIXTURES / "gemma2", dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert relative_error(logits_of(model, expected["tokens"]).float(), expected["logits"]) < 0.1


@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_rms_norm_and_its_gradients_follow_the_formula(offset):
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-3, offset)
    x, pull = torch.randn(5, 7, 24), torch.randn(5, 7, 24)
    with torch.no_grad():
        norm.weight += torch.randn(24)
    want, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = want / (want.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + offset)
    got = norm(x.requires_grad_())
    (got * pull).sum().backward()
    (expected * pull.double()).sum().backward()
    assert relative_error(got.detach(), expected.detach()) < 1e-6
    assert relative_error(x.grad, want.grad) < 1e-6 and relative_error(norm.weight.grad, weight.grad) < 1e-6


def test_heads_that_share_a_key_have_the_outputs_and_gradients_of_copies_of_it():
    torch.manual_seed(0)
    attention = load_fixture("llama").model.layers[0].self_attn
    (B, T, C), group = (2, 6, attention.config.head_dim), 3
    query, key, value = (torch.randn(B, heads, T, C, requires_grad=True) for heads in (2 * group, 2, 2))
    mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    got = attention.attend(query, key, value, mask)
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query.double() @ keys.transpose(2, 3) / C ** 0.5).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ values
    pull = torch.randn_like(got)
    gradients, wanted = (torch.autograd.grad((out * pull).sum(), (query, key, value)) for out in (got, expected))
    for one, other in zip((got, *gradients), (expected, *wanted)):
        assert relative_error(one.detach(), other.detach()) < 1e-5


# Score models


def test_score_model_equals_transformers_sequence_classification():
    expected = load_file(FIXTURES / "score" / "expected.safetensors")
    model = load_model(FIXTURES / "score", kind=ScoreModel)
    B, T = expected["tokens"].shape
    with torch.no_grad():
        scores = model(expected["tokens"], torch.arange(B) * T + expected["lengths"] - 1)
    assert scores.shape == (B,) and relative_error(scores, expected["scores"]) < 2e-5


def beaver_folder(tmp_path, **config):
    """The score fixture in safe-rlhf's layout: other names, a bias, a normaliser and the buffers of old versions."""
    folder = copy_of("score", tmp_path)
    tensors = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    tensors["score_head.weight"] = tensors.pop("score.weight")
    tensors |= {"score_head.bias": torch.tensor([0.7]), "normalizer.mean": torch.tensor([-1.5]),
                "normalizer.var": torch.tensor([6.25]), "normalizer.count": torch.tensor([17]),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", architectures=["LlamaForScore"], score_dim=1, bias=True, dtype="float32",
              **config)
    return folder


@pytest.mark.parametrize("kind, normalise, formula", [
    ("reward", True, lambda s: (s + 1.5) / 2.5), ("cost", True, lambda s: s / 2.5), ("reward", False, lambda s: s),
    ("critic", True, lambda s: s)])
def test_safe_rlhf_scores_follow_their_formula(kind, normalise, formula, tmp_path):
    expected = load_file(FIXTURES / "score" / "expected.safetensors")
    folder = beaver_folder(tmp_path, score_type=kind, do_normalize=normalise, normalizer_type="RunningMeanStd")
    last = torch.arange(3) * 11 + expected["lengths"] - 1
    want = formula(expected["scores"].double() + 0.7)
    model = load_model(folder, kind=ScoreModel)
    with torch.no_grad():
        assert relative_error(model(expected["tokens"], last).double(), want) < 2e-5
        save_model(model, tmp_path / "again")
        assert torch.equal(load_model(tmp_path / "again", kind=ScoreModel)(expected["tokens"], last),
                           model(expected["tokens"], last))
    assert "score_head.bias" in load_file(tmp_path / "again" / "model.safetensors")


def test_safe_rlhf_shards_in_pytorch_format_load(tmp_path):
    folder = beaver_folder(tmp_path, score_type="cost", do_normalize=True, normalizer_type="RunningMeanStd")
    tensors = load_file(folder / "model.safetensors")
    before = load_model(folder, kind=ScoreModel)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    after = load_model(folder, kind=ScoreModel)
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))


# Saving


@pytest.mark.parametrize("name", FAMILY_FIXTURES)
def test_saved_checkpoint_has_the_original_tensors_and_logits(name, tmp_path):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_fixture(name)
    save_model(model, tmp_path / "saved")
    stored, saved = (load_file(folder / "model.safetensors") for folder in (FIXTURES / name, tmp_path / "saved"))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[key].float(), saved[key]) for key in stored)
    config, original = (read_json(folder / "config.json") for folder in (tmp_path / "saved", FIXTURES / name))
    assert config.pop("torch_dtype") == "float32" and original.pop("dtype") == "float16" and config == original
    again = load_model(tmp_path / "saved")
    assert torch.equal(logits_of(again, expected["tokens"]), logits_of(model, expected["tokens"]))
    assert again.config.eos_ids == (2,)


def test_saved_folder_keeps_the_tokenizer_files(tmp_path):
    folder = copy_of("llama", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    save_model(load_model(folder), tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(os.listdir(tmp_path / "saved"))


def test_big_checkpoints_are_saved_in_shards_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    model = load_fixture("gpt2")
    save_model(model, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 2
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_failed_write_leaves_the_old_folder_alone(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "kept").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as partial:
        (partial / "kept").write_text("new")
        raise KeyboardInterrupt
    assert (folder / "kept").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    with atomic_folder(folder) as partial:
        (partial / "other").write_text("new")
    assert os.listdir(folder) == ["other"] and os.listdir(tmp_path) == ["out"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(file) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_text(file, "new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_rename_that_fails_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("old")
    rename = Path.rename

    def refuse_the_new_one(path, target):
        if path.name == "out.partial":
            raise OSError("disk gone")
        return rename(path, target)
    with monkeypatch.context() as patched, pytest.raises(OSError), atomic_folder(tmp_path / "out"):
        patched.setattr(Path, "rename", refuse_the_new_one)
    with atomic_folder(tmp_path / "out") as partial:
        assert (tmp_path / "out" / "kept").read_text() == "old"
        (partial / "kept").write_text("new")
    assert (tmp_path / "out" / "kept").read_text() == "new"


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "kept").write_text("old")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out"):
        raise ValueError
    assert (tmp_path / "out" / "kept").read_text() == "old"


# Loading: other layouts


def test_sharded_safetensors_load(tmp_path):
    folder = copy_of("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(tensors, folder, max_shard_size="9KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole, sharded = load_fixture("qwen2"), load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), sharded.state_dict().values()))


@pytest.mark.parametrize("new_format", [True, False])
def test_pytorch_model_bin_loads(new_format, tmp_path):
    folder = copy_of("gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)  # a mask that old files hold
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    whole, loaded = load_fixture("gpt2"), load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), loaded.state_dict().values()))


def test_gpt2_checkpoint_of_the_bare_trunk_loads(tmp_path):
    """The original gpt2 on the hub has no `transformer.` before its names."""
    folder = copy_of("gpt2", tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    whole, loaded = load_fixture("gpt2"), load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), loaded.state_dict().values()))


def test_all_eos_ids_of_generation_config_are_read(tmp_path):
    folder = copy_of("llama3", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 7]}))
    assert read_config(folder).eos_ids == (2, 5, 7)
    (folder / "generation_config.json").unlink()
    assert read_config(folder).eos_ids == (2,)


# Loading: one clear line for each mistake


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight is missing"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
     "model.safetensors: unexpected tensor model.layers.2.mlp.up_proj.weight"),
    (lambda t: t.update({"model.norm.weight": torch.ones(23)}),
     "model.safetensors: model.norm.weight has shape (23,), the settings make it (24,)"),
    (lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}),
     "model.safetensors: model.norm.weight has shape (), the settings make it (24,)"),
    (lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}),
     "model.safetensors: model.norm.weight is stored as I8, which is not supported")])
def test_a_tensor_that_does_not_fit_is_named(change, says, tmp_path):
    folder = copy_of("llama", tmp_path)
    edit_tensors(folder / "model.safetensors", change)
    message = line_of(load_model, folder)
    assert says in message and str(folder) in message


@pytest.mark.parametrize("changes, says", [
    (dict(model_type="mamba"), "model_type 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3, gemma"),
    (dict(dtype="float8_e4m3fn"), "torch_dtype 'float8_e4m3fn' is not supported; supported: float32, bfloat16"),
    (dict(dtype="absent", torch_dtype="int8"), "torch_dtype 'int8' is not supported"),
    (dict(hidden_act="swishy"), "activation 'swishy' is not supported"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "RoPE scaling 'yarn' is not supported"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 4.0}), "'original_max_position_embeddings' is missing"),
    (dict(hidden_size="absent"), "'hidden_size' is missing")])
def test_a_config_that_we_cannot_run_is_refused(changes, says, tmp_path):
    folder = copy_of("llama", tmp_path)
    edit_json(folder / "config.json", **changes)
    message = line_of(load_model, folder)
    assert says in message and str(folder / "config.json") in message


def test_a_config_that_is_not_json_is_named(tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "config.json").write_text("{")
    assert f"{folder / 'config.json'}: not JSON" in line_of(load_model, folder)


def test_a_config_that_is_not_an_object_is_named(tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "config.json").write_text("[]")
    assert str(folder / "config.json") in line_of(load_model, folder)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in line_of(load_model, folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 6, 100, 20000])
def test_a_truncated_file_is_named(file, kept, tmp_path):
    folder = copy_of("llama", tmp_path)
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes((folder / file).read_bytes()[:kept])
    assert f"{folder / file}: broken, cut short" in line_of(load_model, folder)


@pytest.mark.parametrize("index, says", [
    ({"weight_map": {"a": "../secret.safetensors"}}, "names ../secret.safetensors, which is not a file in this folder"),
    ({"weight_map": {"a": "/etc/passwd"}}, "names /etc/passwd, which is not a file in this folder"),
    ({"weight_map": {"a": "model-1.safetensors"}}, "names model-1.safetensors, which is not a file in this folder"),
    ({}, "has no weight_map"), ([], "not a JSON object")])
def test_an_index_that_leads_nowhere_is_refused(index, says, tmp_path):
    folder = copy_of("llama", tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = line_of(load_model, folder)
    assert says in message and "model.safetensors.index.json" in message


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(new_format, tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    tensors = {"model.norm.weight": torch.ones(24), "trap": Malicious(str(tmp_path / "sprung"))}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    assert "pytorch_model.bin" in line_of(load_model, folder)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": load_file(FIXTURES / "llama" / "model.safetensors")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: state_dict is stored as dict" in line_of(load_model, folder)


# The hub


def hub_error(kind, status):
    """An exception of huggingface_hub, as its client makes it: with the response that it came from."""
    http = sys.modules[errors.HTTPError.__module__.split(".")[0]]
    response = http.Response(status, request=http.Request("GET", "https://hub.invalid/api/models/nobody/nothing"))
    return kind("Repository Not Found.\nA second line.", response=response)


def test_a_hub_id_downloads_only_what_is_needed(monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(FIXTURES / "llama")
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    assert load_model("somebody/llama").folder == FIXTURES / "llama"
    [(name, patterns)] = asked
    assert name == "somebody/llama" and "tokenizer.json" in patterns
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in patterns)


def test_pickles_are_downloaded_only_where_there_is_nothing_else(monkeypatch, tmp_path):
    folder = copy_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def snapshot_download(name, allow_patterns):
        if "pytorch_model*.bin*" in allow_patterns:
            torch.save(tensors, folder / "pytorch_model.bin")
        return str(folder)
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    assert load_model("somebody/llama").folder == folder


@pytest.mark.parametrize("error, says", [
    (lambda: hub_error(errors.RepositoryNotFoundError, 404), "neither a folder here nor a model on the hub"),
    (lambda: hub_error(errors.GatedRepoError, 403), "a gated one needs HF_TOKEN"),
    (lambda: hub_error(errors.HfHubHTTPError, 503), "the hub did not answer"),
    (lambda: errors.LocalEntryNotFoundError("Cannot find it.\nMore."), "the hub did not answer (Cannot find it.)"),
    (lambda: errors.OfflineModeIsEnabled("offline mode"), "the hub did not answer (offline mode)"),
    (lambda: sys.modules[errors.HTTPError.__module__.split(".")[0]].ConnectError("Name or service not known"),
     "the hub did not answer (Name or service not known)"),
    (lambda: sys.modules[errors.HTTPError.__module__.split(".")[0]].ReadTimeout(""), "the hub did not answer"),
    (lambda: OSError(28, "No space left on device"), "No space left on device")])
def test_a_hub_that_does_not_give_the_model_is_one_line(error, says, monkeypatch):
    def snapshot_download(*args, **settings):
        raise error()
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    message = line_of(find_folder, "nobody/nothing")
    assert says in message and message.startswith("nobody/nothing: ")


def test_a_path_that_is_not_there_never_reaches_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert "no such model folder" in line_of(find_folder, tmp_path / "missing")
    assert "no such model folder" in line_of(find_folder, "out/run/missing")
    assert "has no config.json" in line_of(find_folder, tmp_path)


# Memory


PEAK = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(2)
from checkpoint import load_model
import torch.nn.init
for name in ("uniform_", "normal_", "kaiming_uniform_"):
    setattr(torch.nn.init, name, lambda tensor, *a, **k: tensor if tensor.is_meta else sys.exit("random weights"))
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
load_model({tiny!r})  # what loading imports is not what it needs for the weights
before = peak()
model = load_model({folder!r}, dtype=torch.{dtype})
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("stored, dtype", [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_loading_needs_little_more_memory_than_the_weights(stored, dtype, tmp_path):
    """Peak resident memory of a fresh process; most weights are in one matrix, the hardest case."""
    config = {"model_type": "llama", "vocab_size": 50001, "hidden_size": 1024, "intermediate_size": 2816,
              "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": stored}))
    with torch.device("meta"):
        shapes = Transformer(ModelConfig.from_hf(config)).state_dict()
    del shapes["lm_head.weight"]
    save_file({name: torch.zeros(t.shape, dtype=getattr(torch, stored)) for name, t in shapes.items()},
              tmp_path / "model.safetensors")
    code = PEAK.format(root=str(Path(model_file.__file__).parent), tiny=str(FIXTURES / "llama"), folder=str(tmp_path),
                       dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15


def test_the_list_of_families_is_the_one_that_fixtures_cover():
    assert set(FAMILIES) == {read_json(FIXTURES / name / "config.json")["model_type"] for name in FAMILY_FIXTURES}
