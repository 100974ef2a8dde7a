"""How a response begins and ends: the template's end of a turn, tokens of the joint text, answers that were cut."""
import json

import pytest
import tokenizers

import batch as batch_file
import eval as eval_file
from batch import encode_pairs, show_pair
from chat import Tokenizer
from conftest import tiny, write_rows
from data import Pair, apply_view, load_sources

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
         "+ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
          "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
           "else ' ' + m.content + eos_token }}{% endfor %}")
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>")


def tokenizer_of(folder, template, pre_tokenizer=None, vocabulary=(), name=None):
    """A tokenizer of single characters, and of the longer pieces given as merges of two."""
    characters = [chr(code) for code in range(32, 127)] + ["Ċ", "Ġ", "▁", "\n"]
    merges = [tuple(pair) for pair in vocabulary]
    tokens = [*SPECIAL, *characters, *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.Metaspace() if pre_tokenizer else tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder, name)


def encoded_parts(tokenizer, pair, max_len=512):
    """[prompt, chosen, rejected] as lists of ids, and what was counted."""
    encoded = encode_pairs(tokenizer, [pair], max_len)
    bounds = encoded.bounds[0]
    return [encoded.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:])], encoded.cut


# The end of a turn


@pytest.mark.parametrize("template, end, stop", (
    (CHATML, "<|im_end|>\n", "<|im_end|>"), (GEMMA, "<end_of_turn>\n", "<end_of_turn>"),
    (LLAMA3, "<|eot_id|>", "<|eot_id|>"), (MISTRAL, "</s>", "</s>"), ("{{ messages[0].content }}:", "</s>", "</s>"),
    (CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", ""), "<|im_end|>\n", "<|im_end|>"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:", "</s>", "</s>"),
    ("{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}:",
     "</s>", "</s>"),
), ids=("chatml", "gemma", "llama 3", "mistral", "no assistant's turn", "always asks for an answer", "no special token",
        "refuses an assistant's turn"))
def test_a_response_ends_as_the_template_ends_a_turn_and_generation_stops_there(tmp_path, template, end, stop):
    tokenizer = tokenizer_of(tmp_path, template)
    (prompt, chosen, rejected), cut = encoded_parts(tokenizer, Pair("Hi.", "Sure.", "No."))
    ids = tokenizer.encode([end])[0]
    assert chosen[-len(ids):] == ids and rejected[-len(ids):] == ids
    assert tokenizer.decode(chosen).strip() == "Sure." and tokenizer.decode(rejected).strip() == "No."
    assert tokenizer.stop_ids == {tokenizer.eos_id, tokenizer.backend.token_to_id(stop)} and not cut


@pytest.mark.parametrize("template", (CHATML, GEMMA, LLAMA3, MISTRAL), ids=("chatml", "gemma", "llama 3", "mistral"))
def test_prompt_and_response_are_the_tokens_of_the_rendered_dialogue(tmp_path, template):
    tokenizer = tokenizer_of(tmp_path, template)
    dialogue = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Sure."}]
    (prompt, chosen, _), _ = encoded_parts(tokenizer, Pair("Hi.", "Sure.", "No."))
    assert prompt + chosen == tokenizer.encode([tokenizer.render(dialogue, generation=False)])[0]


def test_answers_stop_at_the_templates_end_of_a_turn(tmp_path, monkeypatch):
    tokenizer, stops = tokenizer_of(tmp_path, CHATML), []
    end = tokenizer.backend.token_to_id("<|im_end|>")

    def stream(model, prompts, count, batch_size, temperature, top_p, eos_ids, *_):
        stops.append(set(eos_ids))
        return enumerate([[*tokenizer.encode(["Yes."])[0], end], tokenizer.encode(["Yes, and"])[0]])

    class Model:
        gate = None

        class config:
            eos_ids = (7,)
    monkeypatch.setattr(eval_file, "stream", stream)
    answers = eval_file.answer(Model, tokenizer, ["a", "b"], seed=0, temperature=0.0)
    assert [(row["answer"], row["ended"]) for row in answers] == [("Yes.", True), ("Yes, and", False)]
    assert stops == [{end, tokenizer.eos_id, 7}]


# Joint text


METASPACE = dict(pre_tokenizer=tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first"),
                 vocabulary=(("S", "u"), ("Su", "r"), ("Sur", "e"), ("▁", "Sure")))


def test_after_a_colon_a_sentencepiece_model_reads_no_space_before_the_response(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "{{ messages[0].content }} ASSISTANT:", **METASPACE)
    (prompt, chosen, rejected), cut = encoded_parts(tokenizer, Pair("Hi", "Sure.", "No."))
    pieces = [tokenizer.backend.id_to_token(i) for i in chosen]
    assert pieces == ["Sure", ".", "</s>"] and not cut
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(["Sure."])[0]] == ["▁Sure", "."]  # by itself


def test_scores_are_of_the_joint_text(tmp_path, monkeypatch):
    tokenizer, seen = tokenizer_of(tmp_path, "{{ messages[0].content }} ASSISTANT:", **METASPACE), []

    def batches(encoded, size, device):
        seen.append(encoded.tokens.tolist())
        return []
    monkeypatch.setattr(batch_file, "batches", batches)
    batch_file.score(tiny("llama"), tokenizer, [("Hi", "Sure.")])
    assert seen == [tokenizer.encode(["Hi ASSISTANT:Sure."])[0] + [tokenizer.eos_id]]


def test_where_the_prompt_is_no_prefix_of_the_joint_text_they_are_tokenised_apart_and_counted(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "{{ messages[0].content }}", vocabulary=(("x", "y"),))
    (prompt, chosen, rejected), cut = encoded_parts(tokenizer, Pair("ax", "yes", "no"))
    assert prompt == tokenizer.encode(["ax"])[0]
    assert chosen == tokenizer.encode(["yes"])[0] + [tokenizer.eos_id]
    assert rejected == tokenizer.encode(["no"])[0] + [tokenizer.eos_id]
    assert dict(cut) == {"responses tokenised apart from their prompt": 1}


# Answers that were cut, and base models that continue a text


def test_a_response_that_was_cut_gets_no_end(tmp_path):
    for template, end in ((CHATML, "<|im_end|>\n"), ("{{ messages[0].content }}:", "</s>")):
        tokenizer = tokenizer_of(tmp_path, template)
        (_, chosen, rejected), _ = encoded_parts(tokenizer, Pair("Hi.", "Sure.", "No.", ended=(False, True)))
        assert chosen == tokenizer.encode(["Sure."])[0]
        assert rejected == tokenizer.encode(["No." + end])[0]


def test_whether_answers_ended_comes_with_the_rows(tmp_path):
    row = {"prompt": "Hi.", "chosen": "Sure.", "rejected": "No."}
    path = write_rows(tmp_path / "pairs.jsonl", row, {**row, "prompt": "Ho.", "ended": [False, True]})
    pairs = apply_view("helpful", load_sources([path], held_out=0)[0])[0]
    assert [pair.ended for pair in pairs] == [(True, True), (False, True)]


def test_template_raw_puts_nothing_around_a_text_and_keeps_the_space_before_its_continuation(tmp_path):
    tokenizer = tokenizer_of(tmp_path, None, name="raw")
    assert tokenizer.render("The film") == "<s>The film"
    (prompt, chosen, _), _ = encoded_parts(tokenizer, Pair("The film", " was good", " was bad"))
    assert prompt + chosen == tokenizer.encode(["<s>The film was good"])[0] + [tokenizer.eos_id]
    assert tokenizer.answer(prompt, chosen[:-1]) == " was good"
    assert tokenizer_of(tmp_path, CHATML).answer(prompt, chosen[:-1]) == "was good"


def test_what_the_model_sees_is_shown_token_by_token(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML)
    text = show_pair(tokenizer, encode_pairs(tokenizer, [Pair("Hi", "Go", "No")], 512))
    assert text.splitlines()[0] == "prompt (21 tokens)" and " '<|im_start|>'  'u'  's'  'e'  'r'  '\\n'  'H' " in text
    assert "chosen (4 tokens)\n['G']['o']['<|im_end|>']['\\n']\n" in text
    assert "rejected (4 tokens)\n['N']['o']['<|im_end|>']['\\n']\n" in text
