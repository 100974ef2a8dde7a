"""Bytes per process by formula: a table for Llama's sizes, or with flags of train.py beside what a small model takes.

    python results/fsdp_memory.py
    MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc_per_node 2 results/fsdp_memory.py --lora_rank 16     Linux, on the CPU
"""
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import methods  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from checkpoint import save_model  # noqa: E402
from common import DTYPES  # noqa: E402
from conftest import encoded_of  # noqa: E402
from lora_moe import add_experts  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from runs import Processes  # noqa: E402

LLAMA = {"1B": (2048, 8192, 16, 64), "8B": (4096, 14336, 32, 128), "70B": (8192, 28672, 80, 128)}
COUNTS = (1, 2, 8, 32)  # processes
SMALL = {**toy.MODEL, "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": False}


def memory(model, processes, width):
    """(bytes that a process holds when a model is loaded, those at the peak of a step without activations).

    width: bytes of a frozen weight. Experts are whole in every process, of all else it has its part. In a step the
    embedding and the head are whole, and two blocks and a buffer: one block computes, the next one arrives.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if "lora_" in name)
    total = sum(sizes.values()) - experts
    block = sum(size for name, size in sizes.items() if ".layers.0." in name and "lora_" not in name)
    ends, weight, gradient = total - len(model.model.layers) * block, width if experts else 4, 0 if experts else 4
    loaded = weight * total / processes + 4 * experts
    trained = 12 * (experts or total / processes)  # gradients and AdamW's two moments, float32
    whole = (weight + gradient) * (ends + block) + 2 * weight * block if processes > 1 else 0
    return loaded, loaded + trained + whole


def table():
    """GB of a step for each size: LoRA of rank 16 on all linear layers over bfloat16, all weights, and on one process
    all weights with --low_memory, where beside 6 bytes a weight the gradient of one matrix is there."""
    for name, (hidden, inner, layers, head) in LLAMA.items():
        shape = ModelConfig.from_hf(dict(
            model_type="llama", vocab_size=128256, hidden_size=hidden, intermediate_size=inner, head_dim=head,
            num_hidden_layers=layers, num_attention_heads=hidden // head, num_key_value_heads=8,
            tie_word_embeddings=name == "1B"))
        with torch.device("meta"):
            model = Transformer(shape)
        full = [memory(model, processes, 2)[1] for processes in COUNTS]
        sizes = [parameter.numel() for parameter in model.parameters()]
        low = [6 * sum(sizes) + 2 * max(sizes)]
        add_experts(model, "all-linear", 16, 32)
        lora = [memory(model, processes, 2)[1] for processes in COUNTS]
        for kind, values in (("LoRA", lora), ("all weights", full), ("all weights, --low_memory", low)):
            print(f"| {name}, {kind} | " + " | ".join(f"{value / 1e9:.1f}" for value in values) + " |")


def kilobytes(field):
    """VmRSS, now, or VmHWM, the peak, in bytes; then the peak starts again."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(flags, processes):
    """Load and train a small model, and print what each process took."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(processes.run_once(lambda: folder))
        if processes.rank == 0:
            save_model(toy.init_weights(Transformer(ModelConfig.from_hf(SMALL)).requires_grad_(False), 0), folder)
        processes.run_once(lambda: None)
        config = methods.parse_flags(["--method", "sft", "--model", str(folder), "--device", "cpu", "--fsdp",
                                    "--batch_size", "1", "--max_steps", "3", *flags])
        before = kilobytes("VmRSS")
        model = train.build_model(config, folder, (), processes)
        took = [kilobytes("VmHWM") - before]
        expected = memory(model, processes.count, DTYPES[config.dtype].itemsize)
        took.append(kilobytes("VmRSS") - before)
        train.train(model, encoded_of([(4, 4)] * 16), None, config, folder, processes)
        took.append(kilobytes("VmHWM") - before)
    for part in processes.gather(dict(zip(("peak of loading", "loaded", "peak of a step"), took))):
        print({name: f"{value / 1e9:.2f} GB" for name, value in part.items()},
              "by formula: loaded, step", [f"{value / 1e9:.2f} GB" for value in expected], flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1:], Processes.join())
    else:
        table()
