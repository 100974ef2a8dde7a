"""No optimiser step makes a GPU wait: its result is not looked at, no size depends on values, nothing is copied to the
device but the batch. On the device "meta", whose tensors have no values, whatever would wait raises an error."""
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

import lora_moe
import train
from conftest import encoded_of, tiny
from batch import pack, split_step
from test_train_steps import METHODS, inputs_of, ready


class WithoutWaiting(TorchDispatchMode):
    """A copy between the devices that is not said to be non-blocking raises AssertionError."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if function.overloadpacket is torch.ops.aten._to_copy else args[1]
            assert source.device == result.device or (kwargs or {}).get("non_blocking"), (source.shape, result.device)
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_device(place, monkeypatch, method):
    inputs_of(method)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no device "meta"
    config, model, encoded = ready(method)
    model, config = model.to("meta"), replace(config, device="meta")
    parameters = lora_moe.trainable_parameters(model)
    optimizer = SimpleNamespace(zero_grad=lambda **_: None, step=lambda: None)
    parts = split_step(train.training_order(encoded, config)[:8], 2, encoded.labels.get("annotator"))
    train.train_step(model, parameters, optimizer, encoded, parts, config, {})  # constants are copied once
    with WithoutWaiting():
        train.train_step(model, parameters, optimizer, encoded, parts, config, {})
    assert any(parameter.grad is not None for _, parameter in parameters)


def test_what_waits_is_found():
    values = torch.zeros(3, device="meta")
    for waiting in (lambda: values.sum().item(), lambda: values[values > 0], lambda: bool(values.any()),
                    lambda: values.unique(), lambda: torch.arange(3).to("meta")):
        with pytest.raises((RuntimeError, AssertionError)), WithoutWaiting():
            waiting()


def test_block_masks_are_made_without_waiting():
    model = tiny("gemma2 with a window shorter than the sequences").to("meta")
    batch = pack(encoded_of([(3, 9, 8), (1, 4, 2)]), [0, 1]).to("meta")
    with WithoutWaiting():
        masks = model.model.window_masks(batch.positions, batch.visible(), None)
    assert masks.keys() == {0, 4} and all(isinstance(mask, BlockMask) for mask in masks.values())
