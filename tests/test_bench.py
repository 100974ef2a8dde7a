"""The FLOPs that bench_train.py reports are those of the matrix products that torch runs."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import methods
import lora_moe
import train
from bench_train import products
from conftest import encoded_of, load_fixture


class CountProducts(TorchDispatchMode):
    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def test_products_are_the_matrix_products_of_a_step_but_for_those_of_lora():
    model, encoded, rank = load_fixture("llama"), encoded_of([(9, 5, 4)]), 2
    lora_moe.add_experts(model, ["down_proj"], rank, 4)
    encoded.labels["reference"] = torch.zeros(1, 2).numpy()
    parameters = lora_moe.trainable_parameters(model)
    config = methods.parse_flags(["--method", "dpo", "--device", "cpu"])
    with CountProducts() as counter:
        train.train_step(model, parameters, train.make_optimizer(parameters, config), encoded, [[0]], config, {})
    c, tokens, predicted = model.config, 18, 9
    both = c.intermediate_size + c.hidden_size
    forward_and_weights = 2 * 2 * tokens * rank * both * c.num_layers
    states = 2 * tokens * rank * (both * c.num_layers - c.intermediate_size)  # none below the first expert
    assert sum(2 * rows * d_in * d_out * number for rows, d_in, d_out, number in products(c, tokens, predicted)) \
        == counter.flops - forward_and_weights - states
