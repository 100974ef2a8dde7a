"""TRL's DPOTrainer with PEFT's LoRA on a work folder, in an environment that has transformers, trl, peft and datasets:
what results/bench_train.py runs beside train.py. Prints one JSON line.

    PEER/bin/python results/peer_trl.py WORK [--epochs 2] [--device cpu]

With the options that TRL has for speed: reference log-probs computed once; on a GPU, batches without padding and
bfloat16.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    rows = [json.loads(line) for line in open(args.work / "pairs.jsonl", encoding="utf-8")]
    model = AutoModelForCausalLM.from_pretrained(args.work / "model", dtype=torch.bfloat16 if cuda else torch.float32)
    settings = DPOConfig(
        output_dir=str(args.work / "peer"), num_train_epochs=args.epochs, per_device_train_batch_size=8, beta=0.1,
        max_length=512, learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=0, precompute_ref_log_probs=True,
        gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, padding_free=cuda, dataloader_pin_memory=cuda,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["down_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), peft_config=lora,
                         processing_class=AutoTokenizer.from_pretrained(args.work / "model"))
    start = time.perf_counter()
    trainer.train()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(json.dumps({"loop_s": seconds, "first_loss": losses[0], "last_loss": losses[-1],
                      "gpu_mib": torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else 0}))


if __name__ == "__main__":
    main()
