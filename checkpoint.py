"""Weights on disk: Hugging Face models, PEFT adapters, mixtures of experts, and what a run has trained.

Read in this order: a model's folder and files, names and layouts of tensors, `load_model` and `save_model`; adapters
and mixtures; the weights of runs, and cached log-probs. Sharded weights are gathered by all processes together: all
of them call the functions with a flag `write`, and only those for which it is true write.
"""
import json
import math
import re
import shutil
from pathlib import Path
from zipfile import is_zipfile

import torch
import torch.nn as nn
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from batch import batch_indices, pack, policy_logps, precision
from chat import Tokenizer
from common import (BROKEN, CACHE, DTYPES, HUB_FAILED, UserError, atomic_file, atomic_folder, check_keys, content_hash,
                    gathered, hash_bytes, one_line, progress, read_json, shard_like)
from lora_moe import (ConstantRouter, ExpertLinear, Gate, add_experts, count_experts, expert_layers, gate_of,
                      gate_report, is_mixture, is_routed, matches, merge_experts, select_modules)
from model import CONFIG_KEYS, FAMILIES, ModelConfig, ScoreModel, Transformer, as_ids

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_SIZE = "5GB"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "generation_config.json")
GPT2_NAMES = {
    "model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f",
    "model.embed_positions": "transformer.wpe", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn", "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def find_folder(name_or_dir):
    """The local folder of a checkpoint; a hub id is downloaded first, weights and tokenizer files only. Raises
    UserError when there is no such folder and the hub does not have or cannot be asked for the id."""
    folder, name = Path(name_or_dir), str(name_or_dir)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: not a model folder (it has no config.json)")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"{name}: no such model folder")
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    with (one_line(f"{name}: not a folder here, and the hub did not answer", HUB_FAILED),
          one_line(f"{name}: neither a folder here nor a model on the hub; a gated one needs HF_TOKEN",
                   (RepositoryNotFoundError, HFValidationError))):
        snapshot = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(snapshot.glob("*.safetensors")):
            snapshot = Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin*"]))
    return find_folder(snapshot)


def read_config(folder):
    """ModelConfig of a checkpoint folder, with all the eos ids that generation_config.json names."""
    hf = read_json(folder / "config.json", CONFIG_KEYS)
    if "method" in hf:
        raise UserError(f"{folder}: a run folder; did you mean {folder}/model, or --init_adapter {folder}/adapter?")
    config = ModelConfig.from_hf(hf, folder / "config.json")
    if (folder / "generation_config.json").is_file():
        stated = read_json(folder / "generation_config.json", CONFIG_KEYS).get("eos_token_id")
        config.eos_ids = as_ids(stated) or config.eos_ids
    return config


def weight_files(folder):
    """The files that hold a checkpoint's tensors. Raises UserError when there are none or one is missing."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in files:
            weight_map = read_json(files[index], {"an object": "weight_map"}).get("weight_map")
            if not weight_map:
                raise UserError(f"{files[index]}: has no weight_map")
            for name in weight_map.values():
                if not isinstance(name, str) or name not in files:
                    raise UserError(f"{files[index]}: names {name}, which is not a file in this folder")
            return [files[name] for name in sorted(set(weight_map.values()))]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in files:
            return [files[name]]
    raise UserError(f"{folder}: no model.safetensors (nor its index) and no pytorch_model.bin")


def read_tensors(path, dtype=None):
    """Yield (path, name, tensor) of one weight file, converted to dtype if given. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with one_line(f"{path}: broken, cut short or not plain tensors", BROKEN):
        if path.suffix == ".safetensors":
            yield from read_safetensors(path, dtype)
        else:
            for name, tensor in torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path)).items():
                if not is_derived(name):
                    stored = getattr(tensor, "dtype", type(tensor).__name__)
                    if stored not in STORED_DTYPES.values():
                        raise UserError(f"{path}: {name} is stored as {stored}, which is not supported")
                    yield path, name, tensor.to(dtype or stored)


def read_safetensors(path, dtype):
    """Yield (path, name, tensor), read through a small buffer into memory of its own. The library maps the file
    instead: its pages would stay in memory beside every converted copy, and weights would change with the file."""
    with safe_open(path, framework="pt"):
        pass  # checks the header: sizes, overlaps, the length of the file
    buffer = torch.empty(2 ** 22, dtype=torch.uint8)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        for name, entry in header.items():
            if name == "__metadata__" or is_derived(name):
                continue
            if entry["dtype"] not in STORED_DTYPES:
                raise UserError(f"{path}: {name} is stored as {entry['dtype']}, which is not supported")
            stored = STORED_DTYPES[entry["dtype"]]
            tensor = torch.empty(entry["shape"], dtype=dtype or stored)
            file.seek(start + entry["data_offsets"][0])
            for block in tensor.view(-1).split(len(buffer) // stored.itemsize):
                content = buffer[:block.numel() * stored.itemsize]
                file.readinto(content.numpy())
                block.copy_(content.view(stored))
            yield path, name, tensor


def check_tensors(tensors, shapes, where):
    """Yield (name, tensor) of each (path, name, tensor). Raises UserError naming the file and a tensor that is not in
    `shapes`, {name: shape}, or has another shape; at the end, naming `where` and a tensor that is missing."""
    missing = set(shapes)
    for path, name, tensor in tensors:
        if name not in shapes:
            raise UserError(f"{path}: unexpected tensor {name}")
        if tensor.shape != shapes[name]:
            raise UserError(f"{path}: {name} has shape {(*tensor.shape,)}, the settings make it {(*shapes[name],)}")
        missing.discard(name)
        yield name, tensor
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: tensor {min(missing)} is missing{more}")


def stored_name(config, name):
    """What a checkpoint calls our tensor or layer `name`. In GPT-2, q, k and v are one: c_attn."""
    if config.model_type == "gpt2":
        for ours, stored in GPT2_NAMES.items():
            name = name.replace(ours, stored)
    return config.score_name + name.removeprefix("score") if name.startswith("score.") else name


def stored_layout(model, names):
    """{name in a checkpoint: our names of it, in order}, without what a checkpoint leaves out: a tied head."""
    layout = {}
    for name in names:
        if not (model.config.tied and name == "lm_head.weight"):
            layout.setdefault(stored_name(model.config, name), []).append(name)
    return layout


def is_conv1d(name):
    """GPT-2 stores the weights of these layers as (in, out)."""
    return name.startswith("transformer.h.") and ".c_" in name and name.endswith(".weight")


def is_derived(name):
    """Buffers that older checkpoints store though the model makes them itself: RoPE tables, causal masks, counts."""
    return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "normalizer.count"))


def shard(modules, mesh, ignored=()):
    """Shard all weights of the modules but the ignored ones over the mesh, by FSDP2: each process holds some rows. A
    module's weights are whole while it runs, the outermost one's until the backward pass ends. Gradients are summed."""
    from torch.distributed.fsdp import fully_shard  # here, as it takes most of a second
    for module in modules:
        fully_shard(module, mesh=mesh, ignored_params=set(ignored))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # the other way to avoid dividing is NCCL's alone
        module.register_forward_hook(lambda *_: torch.clear_autocast_cache())  # it would keep a copy of every weight


def load_weights(model, folder, dtype, device):
    """Put a checkpoint's tensors in the place of a meta-device model's parameters, one at a time."""
    config, slots, shapes, weights = model.config, model.state_dict(), {}, {}
    layout = stored_layout(model, slots)
    for stored, names in layout.items():
        rows, *columns = slots[names[0]].shape
        shapes[stored] = (len(names) * rows, *columns)[::-1 if is_conv1d(stored) else 1]
    tensors = ((path, f"transformer.{name}" if f"transformer.{name}" in layout else name, tensor)  # GPT-2's first files
               for file in weight_files(folder) for path, name, tensor in read_tensors(file, dtype)
               if not (config.tied and name == "lm_head.weight" or
                       name.startswith("normalizer.") and not config.normalizer))
    for stored, tensor in check_tensors(tensors, shapes, folder):
        tensor = tensor.t().contiguous() if is_conv1d(stored) else tensor
        for name, values in zip(layout[stored], tensor.chunk(len(layout[stored]))):
            weights[name] = shard_like(values.to(device), slots[name])
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head is left out
    if config.tied and isinstance(model, Transformer):
        model.lm_head.weight = model.model.embed_tokens.weight


def load_model(name_or_dir, dtype=torch.float32, device="cpu", mesh=None, kind=Transformer):
    """Load a folder in Hugging Face layout, or a hub id; weights are read once, into their final place. kind:
    Transformer or ScoreModel. mesh: processes over which the blocks are sharded first, by `shard`. Raises UserError
    naming the file and the tensor that is missing, unexpected, wrongly shaped or cut short."""
    folder = find_folder(name_or_dir)
    config = read_config(folder)  # computes RoPE's frequencies, for which the meta device would import torch._refs
    with torch.device("meta"):
        model = kind(config)
    if mesh:
        shard(model.model.layers, mesh)
    load_weights(model, folder, dtype, device)
    model.folder, model.origin = folder, str(folder.resolve() if folder == Path(name_or_dir) else name_or_dir)
    return model


def save_model(model, folder, chat_template=None, write=True):
    """Write config.json, safetensors (in shards above 5 GB), the tokenizer's files and chat template, atomically;
    `transformers` loads the folder."""
    weights, tensors = model.state_dict(), {}
    kind, config = model.config.model_type, dict(model.config.hf)
    if any(".base." in name for name in weights):
        raise UserError("save_model: the model carries experts; merge_experts(model) first, or save_adapter")
    for stored, names in stored_layout(model, weights).items():
        pieces = [gathered(weights[name], write) for name in names]
        if write:
            tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            tensors[stored] = (tensor.t() if is_conv1d(stored) else tensor).contiguous().cpu()
    if not write:
        return
    if isinstance(model, Transformer):
        config["architectures"] = [FAMILIES[kind]]
    elif model.config.score_name == "score":  # safe-rlhf has classes of its own
        config |= {"architectures": [re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", FAMILIES[kind])],
                   "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config.pop("dtype", None)  # newer files say dtype, older ones torch_dtype, which every reader knows
    config["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_torch_state_dict(tensors, temporary, max_shard_size=SHARD_SIZE)
        for name in TOKENIZER_FILES:
            if model.folder and (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, temporary / name)
        if chat_template:
            (temporary / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def load_with_tokenizer(name_or_dir, template=None, dtype="float32", device="cpu"):
    """(language model, its tokenizer with a template)."""
    model = load_model(name_or_dir, DTYPES[dtype], device)
    return model, Tokenizer(model.folder, template)


def load_score_model(name_or_dir, template=None, dtype="float32", device="cpu"):
    """(score model, its tokenizer). template None: alpaca for safe-rlhf's models, else the tokenizer's own."""
    folder = find_folder(name_or_dir)
    kind = (read_config(folder).hf.get("architectures") or ["?"])[0]
    if kind in FAMILIES.values():
        raise UserError(f"{name_or_dir}: not a score model, but a language model ({kind}): it has no score.weight")
    model = load_model(folder, DTYPES[dtype], device, kind=ScoreModel).eval()
    return model, Tokenizer(model.folder, template or ("alpaca" if model.config.score_name == "score_head" else None))


# What load_adapter reads of adapter_config.json, and keys that do not change what the adapter computes
READ_KEYS = {"r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"}
HARMLESS_KEYS = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
                 "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"}
ADAPTER_KEYS = {
    "a whole number from 1 to a million": "r", "a number above 0": "lora_alpha", "true or false": "use_rslora",
    "text or a list of texts": "target_modules", "an object": "rank_pattern alpha_pattern"}
EXPERTS_KEYS = {"a whole number from 1 to a million": "num_experts rank hidden", "a whole number": "width",
                "a number above 0": "alpha temperature", "true or false": "rslora empty", "text": "base type kind",
                "a list of texts": "layers groups", "an object": "router gate", "a list": "weights"}
SUPPORTED = {"peft_type": ("LORA",),  # any other key has to be off; other inits, such as PiSSA, change the base too
             "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
PEFT_TENSOR = "base_model.model.{}.lora_{}.weight"  # of what PEFT calls a layer, and A or B


def peft_modules(model):
    """{PEFT's name of a linear layer: our names of it}: the same but for GPT-2, whose c_attn is our q, k and v."""
    return stored_layout(model, [name.removesuffix(".base") for name, module in model.named_modules()
                                 if isinstance(module, nn.Linear)])


def fuse(layers, number):
    """A (R, D_in) and B (D_out, R) of expert `number` in a PEFT layer that joins several of ours; None is one without
    experts. In an adapter that was loaded, GPT-2's q, k and v share one A. If they were trained apart, A stacks
    theirs and B is block-diagonal."""
    experts = [layer and (layer.lora_A.detach().unflatten(0, (-1, layer.rank))[number],
                          layer.lora_B.detach().unflatten(1, (-1, layer.rank))[:, number]) for layer in layers]
    As, Bs = zip(*filter(None, experts))
    if all(torch.equal(A, As[0]) for A in As):
        return As[0], torch.cat([expert[1] if expert else torch.zeros_like(Bs[0]) for expert in experts])
    return torch.cat(As), torch.block_diag(*[expert[1] if expert else Bs[0][:, :0] for expert in experts])


def save_adapter(model, folder, template=None, number=0, write=True):
    """Write expert `number` of a model in PEFT's format: adapter_config.json and adapter_model.safetensors, whose
    metadata has a hash of the base's weights and the template that it was trained with, for `adapter_warnings`."""
    assert not is_routed(model), "PEFT's format holds experts without a router"
    origin = json.dumps({"base": base_hash(model), "template": template or "chat"})  # one: save_file shuffles entries
    if not write:
        return
    layers, modules, tensors, ranks, alphas = expert_layers(model), peft_modules(model), {}, {}, {}
    first = next(iter(layers.values()))
    wrapped = {module: [layers.get(name) for name in names] for module, names in modules.items()
               if not layers.keys().isdisjoint(names)}
    for module, members in wrapped.items():
        A, B = fuse(members, number)
        tensors |= {PEFT_TENSOR.format(module, letter): matrix.contiguous() for letter, matrix in (("A", A), ("B", B))}
        layer = next(filter(None, members))
        growth = len(A) / layer.rank  # PEFT divides by the rank that it sees
        ranks[module], alphas[module] = len(A), layer.alpha * (math.sqrt(growth) if layer.rslora else growth)
    targets = sorted({module.rpartition(".")[2] for module in wrapped})
    if select_modules(targets, modules) != list(wrapped):  # short names only where they mean these layers and no other
        targets = sorted(wrapped)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.origin,
        "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": model.config.model_type == "gpt2", "inference_mode": True, "target_modules": targets,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != first.rank},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != first.alpha}}
    with atomic_folder(folder) as temporary:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "adapter_model.safetensors", {"trained_on": origin})


def base_hash(model):
    """Hash of a sample of the base's weights, rounded to bfloat16: the same whatever precision they are loaded in."""
    pieces = []
    for name, tensor in model.state_dict().items():
        if not is_mixture(name):
            sample = gathered(tensor).detach().flatten()[::tensor.numel() // 4096 + 1].bfloat16().float()
            pieces += [f"{name.replace('.base.', '.')} {tuple(tensor.shape)}".encode(), sample.cpu().numpy()]
    return hash_bytes(*pieces)


def adapter_warnings(model, folders, template=None):
    """A line for each adapter that was trained on another base or with another template than these."""
    warnings, base, template = [], base_hash(model) if folders else "", template or "chat"
    for folder in folders:
        path = Path(folder) / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            metadata = read_json(path, text=(file.metadata() or {}).get("trained_on", "{}"))
        if metadata.get("base", base) != base:
            warnings.append(f"warning: {folder} was trained on other base weights than those of {model.origin}")
        if metadata.get("template", template) != template:
            warnings.append(f"warning: {folder} was trained with --template {metadata['template']}, not {template}")
    return warnings


def read_adapter_config(path):
    """The dictionary in an adapter_config.json. Raises UserError naming the first setting that we do not implement."""
    config = read_json(path, ADAPTER_KEYS)
    for key, value in config.items():
        if key not in READ_KEYS | HARMLESS_KEYS and value not in SUPPORTED.get(key, (None, False, "none", [], {})):
            raise UserError(f"{path}: {key} = {value!r} is not supported")
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if not config.get(key):
            raise UserError(f"{path}: {key} is missing")
    for key, kind in (("rank_pattern", "a whole number from 1 to a million"), ("alpha_pattern", "a number above 0")):
        for value in (config.get(key) or {}).values():
            check_keys({key: value}, {kind: key}, path)
    return config


def read_adapter(model, folder):
    """{name of our layer: (rank, alpha, rslora)} and {name: (A, B)} of an adapter in PEFT's format. Raises UserError
    naming the setting or the tensor that does not fit the model."""
    described, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    config, modules, where = read_adapter_config(described), peft_modules(model), f"{described}: target_modules"
    alphas, shapes, scalings, matrices = {}, {}, {}, {}
    for module in select_modules(config["target_modules"], modules, where):
        rank = pattern_value(config.get("rank_pattern"), module, config["r"], where)
        alphas[module] = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"], where)
        bases = [model.get_submodule(name) for name in modules[module]]
        shapes[PEFT_TENSOR.format(module, "A")] = rank, bases[0].in_features
        shapes[PEFT_TENSOR.format(module, "B")] = sum(base.out_features for base in bases), rank
    tensors = dict(check_tensors(read_tensors(path), shapes, path))
    for module, alpha in alphas.items():
        A, B = (tensors[PEFT_TENSOR.format(module, letter)] for letter in "AB")
        for name, rows in zip(modules[module], B.chunk(len(modules[module]))):
            scalings[name], matrices[name] = (len(A), alpha, bool(config.get("use_rslora"))), (A, rows)
    return scalings, matrices


@torch.no_grad()
def load_adapter(model, *folders):
    """Wrap the model with the adapters in these folders (PEFT's format), one expert each. Returns the model. Raises
    UserError when one does not fit the model, or they differ in layers, rank or alpha."""
    assert not expert_layers(model), "the model has experts already; merge_experts(model) first"
    scalings, matrices = zip(*[read_adapter(model, folder) for folder in folders])
    for folder, scaling in zip(folders, scalings):
        if scaling != scalings[0]:
            raise UserError(f"{folder}: its layers, rank or alpha differ from those of {folders[0]}")
    model.requires_grad_(False)
    for name, (rank, alpha, rslora) in scalings[0].items():
        layer = ExpertLinear(model.get_submodule(name), rank, alpha, len(folders), rslora=rslora)
        layer.lora_A.copy_(torch.cat([pairs[name][0] for pairs in matrices]))
        layer.lora_B.copy_(torch.cat([pairs[name][1] for pairs in matrices], dim=1))
        model.set_submodule(name, layer)
    return model


def pattern_value(patterns, module, default, where):
    """PEFT's per-layer exceptions: the value of the first key that matches the end of the module's name."""
    keys = (key for key in patterns or () if matches(rf"(.*\.)?({key})", module, where))
    return (patterns or {}).get(next(keys, None)) or default


def save_experts(model, folder, write=True):
    """Write a mixture: experts.json describes it, experts.safetensors holds its experts, routers and gate."""
    layers = expert_layers(model)
    first = next(iter(layers.values()))
    config = {"base": str(model.folder), "layers": list(layers), "num_experts": first.num_experts, "rank": first.rank,
              "alpha": first.alpha, "rslora": first.rslora, "router": first.router.spec,
              "gate": gate_of(model) and gate_of(model).spec}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if is_mixture(name)}
    if not write:  # after state_dict(), which shards what a forward pass has left whole
        return
    with atomic_folder(folder) as temporary:
        (temporary / "experts.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "experts.safetensors")


@torch.no_grad()
def load_experts(model, folder):
    """Wrap the model with the mixture that `save_experts` wrote. Returns the model. Raises UserError naming the setting
    or the tensor that does not fit."""
    described, path = Path(folder) / "experts.json", Path(folder) / "experts.safetensors"
    config, tensors = read_json(described, EXPERTS_KEYS), list(read_tensors(path))
    router, gate = (check_keys(config.get(key) or {}, EXPERTS_KEYS, described) for key in ("router", "gate"))
    largest = max((max(tensor.shape, default=1) for _, _, tensor in tensors), default=0)
    with one_line(f"{described}: does not fit this model", (KeyError, TypeError, ValueError, OverflowError, UserError)):
        if max(config["rank"] * config["num_experts"], router.get("hidden", 0), gate.get("width", 0)) > largest:
            raise UserError("rank, num_experts, hidden or width are more than the tensors have")
        add_experts(model, config["layers"], config["rank"], config["alpha"], config["num_experts"], config["rslora"],
                    router=config["router"])
        if config["gate"]:
            model.gate = Gate(num_experts=config["num_experts"], **config["gate"])
    slots = {name: tensor for name, tensor in model.state_dict().items() if is_mixture(name)}
    for name, tensor in check_tensors(tensors, {name: slot.shape for name, slot in slots.items()}, path):
        slots[name].copy_(tensor)
    return model


def export_experts(model, folder, template=None):
    """Write a mixture as one PEFT adapter for each expert, expert-0 …, and `gate_report` in gate.json, for servers of
    many adapters. Raises UserError for routers, whose weights differ from token to token."""
    if gate_of(model) is None:
        raise UserError("--export: only mix-dpo and moe-dpo have experts that are whole policies; MidPO and PMoL route "
                        "every token, which no adapter format describes; a single adapter is in PEFT's format already")
    gate = gate_report(model)
    with atomic_folder(folder) as temporary:
        for k, name in enumerate(gate["experts"]):
            save_adapter(model, temporary / name, template, k)
        (temporary / "gate.json").write_text(json.dumps(gate, indent=2) + "\n", encoding="utf-8")


def save_trained(model, out, template=None, chat_template=None, write=True):
    """Write what was trained: out/model (all weights), out/adapter (one expert, for PEFT) or out/experts. template: the
    name of the prompt format; chat_template: its text, where it is not the tokenizer's."""
    if isinstance(model, ScoreModel) or not count_experts(model):
        save_model(merge_experts(model), out / "model", chat_template, write)
    elif count_experts(model) == 1 and not is_routed(model) and gate_of(model) is None:
        save_adapter(model, out / "adapter", template, write=write)
    else:
        save_experts(model, out / "experts", write)


def load_trained(run, base, dtype=torch.float32, device="cpu"):
    """The language model that `save_trained` wrote into a run folder, on its base. Raises UserError without one."""
    if (run / "model").is_dir():
        return load_model(run / "model", dtype, device)
    for name, load in (("adapter", load_adapter), ("experts", load_experts)):
        if (run / name).is_dir():
            return load(load_model(base, dtype, device), run / name)
    raise UserError(f"{run}: no trained weights (no model, adapter, experts); did the run finish?")


def load_policy(run, dtype="float32", device="cpu"):
    """The trained model of a run folder, its tokenizer and the run's settings."""
    run = Path(run)
    config = read_json(run / "config.json", {"text": "base method template", "a list of texts": "init_adapter"})
    if config.get("method") in ("reward", "cost"):
        raise UserError(f"{run}: a score model, which answers nothing; --score FILE lets it judge")
    if config.get("lora_rank") is None or config.get("base") is None:
        raise UserError(f"{run}: not a run folder of train.py")
    config |= {"init_adapter": config.get("init_adapter") or [], "template": config.get("template")}
    model = load_trained(run, config["base"], DTYPES[dtype], device)
    return model, Tokenizer(config["base"], config.get("template")), config


def load_start(config, dtype="float32", device="cpu"):
    """The model that a run started from, by its settings: its base, with the adapter that it continued from, if any."""
    model = load_model(config["base"], DTYPES[dtype], device)
    return load_adapter(model, *started_from(config)) if started_from(config) else model


def started_from(config):
    """The adapter that a run continued from, in a tuple. Several adapters are its experts, and give ()."""
    return config["init_adapter"] if len(config["init_adapter"]) == 1 else ()


LOGPS_BATCH = 32  # pairs; not --batch_size, as how a batch is packed changes the last bits of a log-prob


def weights_hash(model):
    """Hash of a model's settings, weights, and experts in use; of the base alone where they are disabled."""
    layers = {name: layer for name, layer in expert_layers(model).items() if layer.enabled}
    settings = [(layer.scale, {**layer.router.spec, "weights": None}) for layer in layers.values()]
    tensors = {name: tensor for name, tensor in model.state_dict().items() if layers or not is_mixture(name)}
    tensors |= {f"{name}.chosen": layer.router.weights for name, layer in layers.items()
                if isinstance(layer.router, ConstantRouter)}
    return content_hash(model.config, settings, list(tensors), *tensors.values())


@torch.no_grad()
def response_logps(model, encoded, batch_size, dtype, device, processes):
    """log π(y|x) of every response of an encoded set: (N, R) float32 on the CPU, in nats."""
    logps = torch.zeros(len(encoded), encoded.bounds.shape[1] - 2)
    with progress(desc="log-probs", unit="pair", leave=False, total=len(encoded) // processes.count,
                  show=processes.rank == 0) as bar:
        for indices, counted in processes.split(batch_indices(encoded, batch_size)):
            with precision(dtype, device):
                batch_logps = policy_logps(model, pack(encoded, indices).to(device)).cpu()
            if counted:
                logps[indices] = batch_logps
                bar.update(len(indices))
    processes.all_reduce([logps])
    return logps


def cached_logps(model, encoded, dtype, device, processes):
    """`response_logps` of a model as it is, kept under out/cache by a hash of all that they depend on: weights, experts
    in use, tokens and precision. Other runs that need the same reuse them."""
    path = CACHE / f"logps-{content_hash(dtype, weights_hash(model), encoded.tokens, encoded.bounds)}.safetensors"
    if processes.run_once(path.is_file):
        return load_file(path)["logps"]
    logps = response_logps(model, encoded, LOGPS_BATCH, dtype, device, processes)
    if processes.rank == 0:
        with atomic_file(path) as temporary:
            save_file({"logps": logps}, temporary)
    return logps
