"""train.py, with what its metrics do not have: python results/study_record.py margins|conflict[:GROUP] FLAGS of train.py

margins    quantiles of Δr on safe/unsafe pairs in each twentieth of SafeDPO's training, to margins.json
conflict   cosine of the gradients of two preferences' losses, by layer, over the training, to conflict.json;
           conflict:GROUP trains on that preference's pairs only, and asks both gradients all the same
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import losses  # noqa: E402
import methods  # noqa: E402
import train  # noqa: E402
from batch import pack  # noqa: E402
from common import write_text  # noqa: E402

PROBE, EVERY = 128, 40  # pairs of each preference that a gradient is taken of; steps between two measurements


def record_margins(config):
    """Train as `config` says; returns [{"step", quantiles of Δr, "passed": share with Δr > Δ}] over the training."""
    loss, seen = losses.safedpo_loss, []

    def recording(chosen, rejected, ref_chosen, ref_rejected, chosen_unsafe, rejected_unsafe, beta, *settings):
        if torch.is_grad_enabled():  # training, not measuring
            margins = beta * (chosen - ref_chosen - (rejected - ref_rejected)).detach()
            seen.append(margins[rejected_unsafe.bool() & ~chosen_unsafe.bool()])
        return loss(chosen, rejected, ref_chosen, ref_rejected, chosen_unsafe, rejected_unsafe, beta, *settings)

    losses.safedpo_loss = recording
    train.run(config)
    rows = []
    for part in np.array_split(np.arange(len(seen)), 20):
        margins = torch.cat([seen[i] for i in part])
        rows.append({"step": int(part[-1]) + 1, **{f"q{q}": float(margins.quantile(q / 100)) for q in (10, 50, 90)},
                     "passed": float((margins > config.delta).float().mean())})
    return rows


def layer_gradients(model, parameters, encoded, indices, config):
    """{layer: gradient of the method's loss on these pairs with respect to the layer's trained parameters}."""
    gradients = {}
    methods.METHODS[config.method].loss(model, pack(encoded, indices).to(config.device), config)[0].backward()
    for name, parameter in parameters:
        layer = name.split("layers.")[1].split(".")[0]
        gradients.setdefault(layer, []).append(parameter.grad.flatten())
    for _, parameter in parameters:
        parameter.grad = None
    return {layer: torch.cat(parts) for layer, parts in gradients.items()}


def record_conflict(config, only):
    """Train as `config` says, on the pairs of the preference `only` if named; returns [{"step", layer: cosine}]."""
    train_step, rows = train.train_step, []

    def recording(model, parameters, optimizer, encoded, parts, config, *rest):
        group, step = encoded.labels["group"], len(rows)
        members = [np.flatnonzero(group == i) for i in range(2)]
        if step % EVERY == EVERY - 1:
            one, two = (layer_gradients(model, parameters, encoded, probe[:PROBE], config) for probe in members)
            rows.append({"step": step + 1, **{layer: float(torch.cosine_similarity(one[layer], two[layer], 0))
                                              for layer in one}})
        else:
            rows.append(None)
        if only:
            trained = members[encoded.groups.index(only)]
            parts = [trained[indices % len(trained)] for indices in parts]
        return train_step(model, parameters, optimizer, encoded, parts, config, *rest)

    train.train_step = recording
    train.run(config)
    return [row for row in rows if row]


def main():
    what, _, only = sys.argv[1].partition(":")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    config = methods.parse_flags(sys.argv[2:])
    rows = record_margins(config) if what == "margins" else record_conflict(config, only)
    write_text(Path(config.out) / f"{what}.json", json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
