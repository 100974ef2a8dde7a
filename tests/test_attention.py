"""FlexAttention on packed rows, as on a GPU, against the dense mask: here its forward pass, in test_train_cuda.py the rest."""
import pytest
import torch

import model as model_file
from conftest import encoded_of, load_fixture
from batch import pack

ITEMS = [(9, 20, 25, 30, 31, 30), (1, 4, 6, 0, 1, 2), (30, 9, 1, 3, 9, 9), (2, 30, 9, 30, 2, 30), (9, 8, 7, 6, 5, 4)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ("llama", "mistral_window", "qwen2_window", "qwen3", "gemma", "gemma2", "gpt2"))
def test_flex_attention_of_packed_rows_is_attention_under_the_dense_mask(name, monkeypatch):
    """Over several of its blocks of 128 tokens, with padding; windows, soft-caps and grouped heads as the family has."""
    model, batch, calls = load_fixture(name), pack(encoded_of(ITEMS), [*range(len(ITEMS))]), []
    assert batch.tokens.shape[0] > 1 and batch.tokens.shape[1] > 128 and (batch.pair < 0).any()
    with torch.no_grad():
        dense = model(batch.tokens, batch.positions, batch.mask())
        flex = model_file.flex_attention
        monkeypatch.setattr(model_file, "flex_attention", lambda *args: calls.append(args) or flex(*args))
        fused = model(batch.tokens, batch.positions, batch.visible())
    assert len(calls) == model.config.num_layers
    assert (fused - dense).abs().max() < 1e-5 * dense.abs().max()
