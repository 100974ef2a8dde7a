"""Generation: each row as if alone, sampling as its formula says, the same on every run."""
import pytest
import torch
from safetensors.torch import load_file

from common import UserError
from conftest import FAMILY_FIXTURES, FIXTURES, load_fixture
from lora_moe import add_experts, merge_experts, perturb_experts
from model import KVCache, few_rows, generate, sample, stream

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [33], [90, 4, 71, 22], [8, 8, 8, 30, 2, 61, 44]]


@torch.no_grad()
def greedy_alone(model, prompt, count):
    """The plainest way: a whole pass for each new token, no cache, no batch, no padding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens]))[:, -1]).argmax()))
    return tokens[len(prompt):]


@pytest.mark.parametrize("name", FAMILY_FIXTURES)
def test_greedy_continuations_equal_transformers(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    prompts = [expected[f"prompt_{i}"].tolist() for i in range(2)]
    assert generate(load_fixture(name), prompts, 12) == [expected[f"greedy_{i}"].tolist() for i in range(2)]


@pytest.mark.parametrize("name", FAMILY_FIXTURES)
def test_each_row_of_a_ragged_batch_equals_its_prompt_alone(name):
    model = load_fixture(name)
    assert generate(model, PROMPTS, 10) == [greedy_alone(model, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_rows_of_equal_length_equal_each_prompt_alone(name):
    """Without padding no mask is built, another way through attention."""
    model, prompts = load_fixture(name), [PROMPTS[2], [3, 4, 5, 6], [60, 50, 40, 30]]
    assert generate(model, prompts, 10) == [greedy_alone(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("name", ["llama3", "mistral_window", "gemma2"])
def test_cache_filled_in_pieces_gives_the_logits_of_one_pass(name):
    model, tokens = load_fixture(name), torch.arange(3, 20)[None]
    cache = KVCache(model.config, 1, 17, torch.float32, "cpu")
    with torch.no_grad():
        pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([6, 1, 3, 7], dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(tokens), rtol=1e-4, atol=1e-5)


def test_generation_works_with_experts_and_equals_the_merged_model():
    model = perturb_experts(add_experts(load_fixture("qwen2"), "all-linear", rank=2, alpha=4), 0.3)
    adapted = generate(model, PROMPTS, 10)
    assert adapted == [greedy_alone(model, prompt, 10) for prompt in PROMPTS]
    assert adapted == generate(merge_experts(model), PROMPTS, 10) != generate(load_fixture("qwen2"), PROMPTS, 10)


def test_every_eos_id_ends_a_row_and_the_batch_stops_early():
    model = load_fixture("llama")
    free = generate(model, PROMPTS, 12)
    eos = {free[0][3], free[1][5]}
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    ended = generate(model, PROMPTS[:2], 12, eos_ids=eos)
    hook.remove()
    for row, whole in zip(ended, free):
        first = next(i for i, token in enumerate(whole) if token in eos)
        assert row == whole[:first + 1]
    assert len(passes) == max(map(len, ended)) < 12


def test_no_prompts_and_no_new_tokens_are_fine():
    assert generate(load_fixture("llama"), [], 5) == []
    assert generate(load_fixture("llama"), PROMPTS, 0) == [[]] * 4


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    model = load_fixture("llama")
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.9)
    together = generate(model, PROMPTS, seed=3, **settings)
    assert together == generate(model, PROMPTS, seed=3, **settings)
    assert together == [generate(model, [prompt], seed=3, **settings)[0] for prompt in PROMPTS]
    assert together != generate(model, PROMPTS, seed=4, **settings)
    twice = generate(model, [PROMPTS[0], PROMPTS[0]], seed=3, **settings)
    assert twice[0] == together[0] != twice[1]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3), (1.0, 1e-9)])
def test_sample_follows_the_nucleus_distribution(temperature, top_p):
    """Every one of evenly spaced draws, so that frequencies are the probabilities up to one draw a token."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(1)).double() * 2
    chance = torch.softmax(logits / temperature, 0)
    nucleus, mass = [], 0.0
    for token in sorted(range(11), key=lambda i: -chance[i]):
        if nucleus and mass >= top_p:
            break
        nucleus.append(token)
        mass += float(chance[token])
    want = torch.zeros(11, dtype=torch.float64)
    want[nucleus] = chance[nucleus] / mass
    draws = 20000
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens = sample(logits.float().expand(draws, -1), temperature, top_p, uniform)
    got = torch.bincount(tokens, minlength=11) / draws
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2 / draws)


def test_sampled_first_tokens_have_the_models_distribution():
    model = load_fixture("llama")
    with torch.no_grad():
        chance = model.logits(model(torch.tensor([PROMPTS[2]]))[0, -1]).softmax(-1)
    tokens = torch.tensor(generate(model, [PROMPTS[2]] * 4000, 1, temperature=1.0)).flatten()
    got = torch.bincount(tokens, minlength=97) / 4000
    deviation = (chance * (1 - chance) / 4000).sqrt()
    assert ((got - chance).abs() < 4.5 * deviation + 1e-3).all()


def test_more_tokens_than_gpt2_has_positions_is_one_clear_line():
    with pytest.raises(UserError, match="12 tokens and 29 new ones are more than the 40 positions"):
        generate(load_fixture("gpt2"), PROMPTS, 29)
    assert len(generate(load_fixture("gpt2"), PROMPTS, 28)[0]) == 28


@pytest.mark.parametrize("rows, columns", [(1, 64), (5, 200), (3, 10)])
def test_few_rows_times_a_weight_is_the_linear_layer(rows, columns):
    """Also where the columns are no multiple of a block, or fewer."""
    x, weight = torch.randn(rows, 32), torch.randn(columns, 32)
    torch.testing.assert_close(few_rows(weight, x), torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_generate_leaves_training_mode_as_it_was():
    model = load_fixture("llama")
    generate(model.train(), PROMPTS, 2)
    assert model.training
    generate(model.eval(), PROMPTS, 2)
    assert not model.training


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_a_prompt_takes_the_row_of_one_that_has_ended(rows):
    """Answers of different lengths; each pass has at most so many rows, and no row stays without a prompt for long."""
    model, prompts = load_fixture("mistral_window"), [prompt[k:] or [k + 3] for prompt in PROMPTS for k in range(3)]
    settings = dict(temperature=1.0, eos_ids=set(range(0, 97, 6)), seed=2)
    alone = [generate(model, [prompt], 9, **settings)[0] for prompt in prompts]
    assert len(set(map(len, alone))) > 3
    asked, sizes = [], []
    hook = model.model.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
    answers = dict(stream(model, prompts, 9, rows, prepare=asked.append, **settings))
    hook.remove()
    assert answers == dict(enumerate(alone))
    assert max(map(len, asked)) == max(size[0] for size in sizes) <= rows
    assert sum(size[0] for size in sizes if size[1] == 1) <= sum(map(len, alone)), "a row that ended has one pass"


def test_prompts_are_taken_from_the_longest_to_the_shortest():
    assert [i for i, _ in stream(load_fixture("llama"), PROMPTS, 3, 1)] == [0, 3, 2, 1]
