"""Claims about tokenizers and prompt formats: special tokens, chat templates and their worker, truncation."""
import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Timer

import jinja2
import pytest

import batch as batch_file
import chat
from batch import encode_pairs
from chat import Tokenizer
from common import UserError
from conftest import byte_tokenizer, line_of, pieces
from data import Pair

TURNS = [{"role": role, "content": content}
         for role, content in (("user", "one"), ("assistant", "two"), ("user", "three"))]
DIALOGUE = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer.json in which every byte is a token and a BOS goes before a text, as in Llama's."""
    return byte_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def make(letters, tmp_path):
    """make(template=…, jinja=text of chat_template.jinja, **tokenizer_config) -> Tokenizer of such a folder."""
    def make(template=None, jinja=None, **config):
        shutil.copy(letters / "tokenizer.json", tmp_path)
        config = {"bos_token": "<s>", "eos_token": "</s>", **config}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja)
        return Tokenizer(tmp_path, template)

    return make


# Special tokens, files


def test_a_folder_without_tokenizer_json_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json; save one .*AutoTokenizer.from_pretrained.*save_pretrained"):
        Tokenizer(tmp_path)


def test_special_tokens_are_text_or_objects(make):
    plain, objects = make(), make(bos_token={"content": "<s>", "lstrip": False}, eos_token={"content": "</s>"})
    assert (plain.bos, plain.eos, plain.eos_id) == (objects.bos, objects.eos, objects.eos_id) == ("<s>", "</s>", 1)


def test_special_tokens_come_from_special_tokens_map_or_config_json_where_tokenizer_config_names_none(make, tmp_path):
    make()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    with pytest.raises(UserError, match="names no eos_token that tokenizer.json knows"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 3}')
    assert (Tokenizer(tmp_path).bos, Tokenizer(tmp_path).eos) == ("<s>", "<|im_end|>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer(tmp_path).eos == "</s>"


# Chat templates


def test_chat_template_as_string_as_named_list_and_as_file_are_the_same(make):
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    assert make(chat_template=CHATML).render("hello") == expected
    assert make(chat_template=named).render("hello") == expected
    assert make(chat_template="not this one", jinja=CHATML).render("hello") == expected


def test_messages_and_dialogues_are_rendered_turn_by_turn(make):
    tokenizer = make(chat_template=CHATML)
    expected = ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
                "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.render(TURNS) == tokenizer.render(DIALOGUE) == expected


def test_turns_of_one_speaker_become_one_so_that_speakers_take_turns():
    messages = chat.as_messages("\n\nHuman: one\n\nHuman: and\n\nmore\n\nAssistant: two\n\nHuman: three")
    assert [m["content"] for m in messages] == ["one\n\nand\n\nmore", "two", "three"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]


def test_the_usual_variables_are_there(make):
    template = ("{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}"
                "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
                "{% if tools is not none %}tools{% endif %}")
    assert make(chat_template=template).render(TURNS) == f"<s></s>{datetime.now():%Y}Trueone"


def test_block_tags_take_their_line_with_them(make):
    assert make(jinja="{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
                ).render("x") == "x\n"


def test_no_system_turn_is_added_and_a_refused_one_is_a_user_error(make):
    tokenizer = make(chat_template=NO_SYSTEM)
    assert tokenizer.render("hello") == "<s>user: hello\n"
    with pytest.raises(UserError, match="the chat template refuses a prompt: System role not supported"):
        tokenizer.render([{"role": "system", "content": "be brief"}, *TURNS])


@pytest.mark.parametrize("attack", [
    "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__['sys'].modules }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ ''.__class__.__base__ }}",
    "{{ (messages | map(attribute='__class__') | first).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{% set _ = messages.append(1) %}{{ messages }}",
    "{% include 'secret' %}{% import 'os' as os %}",
    "{% for i in range(10**9) %}{% endfor %}",
])
def test_a_malicious_template_reaches_nothing_of_python(make, attack):
    with pytest.raises(UserError, match="the chat template refuses a prompt: .") as error:
        print(make(chat_template=attack).render([{"role": "user", "content": "x"}]))
    assert len(str(error.value).splitlines()) == 1


GROW = "{%% set ns = namespace(x='ab') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
STOPPED = "did not end in|MB of memory|more than 4 MB|its process"


@pytest.mark.parametrize("template", [
    ENDLESS,
    "{% for i in range(9999)|map('string') %}{% for j in range(9999)|map('string') %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    *(GROW % grown for grown in (
        "ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)", "{'a': ns.x, 'b': ns.x}", "dict(a=ns.x, b=ns.x)",
        "'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)", "ns.x|replace('b', ns.x)", "ns.x.join([ns.x, ns.x])")),
    "{{ 'a' * 10**9 }}", "{{ 10**(10**10) }}", "{{ 'a'|center(10**9) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}", "{{ '%999999999d'|format(1) }}", "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ {'a': [1] * 100}|tojson(indent=10**8) }}", "{{ 'ab'|wordwrap(1, wrapstring='x' * 10**8) }}",
    "{% set x = 'y' * 10**8 %}{% for i in range(9999) %}{% if 'q' in x %}{% endif %}{% endfor %}",
    "{% set x = 'y' * 10**8 %}{% for i in range(9999) %}{% set y = x[1:] %}{% endfor %}",
    "{% for i in range(9999) %}" + "x" * 90_000 + "{% endfor %}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfilter %}"])
def test_a_template_without_end_is_stopped_and_takes_neither_time_nor_memory_of_ours(make, monkeypatch, template):
    """In a thread as well, where no signal could stop it."""
    monkeypatch.setattr(chat, "DEADLINE", 0.5)
    tokenizer, started = make(chat_template=template), time.process_time()
    with ThreadPoolExecutor(1) as pool:
        line = pool.submit(line_of, tokenizer.render, "x").result()
    assert re.search(f"the chat template refuses a prompt: .*({STOPPED})", line), line
    assert time.process_time() - started < 1


LATER = ("messages|length > 5", "messages[0].role == 'system'", "'magic' in messages[-1].content",
         "messages|map(attribute='content')|join|length > 9999")


@pytest.mark.parametrize("when, what, why", [
    *((when, ENDLESS, "it did not end in 2 seconds") for when in LATER),
    (LATER[0], "{{ 'x' * (4 * 1024 * 1024 + 1) }}", "it writes more than 4 MB"),
    (LATER[1], "{{ ('x' * 10**9)|length }}", "it takes more than 512 MB of memory"),
    (LATER[2], "{{ raise_exception('not this one') }}", "not this one")])
def test_a_template_that_misbehaves_later_only_is_stopped_on_its_row(make, monkeypatch, when, what, why):
    tokenizer = make(chat_template="{% if " + when + " %}" + what + "{% endif %}" + CHATML)
    tokenizer.render("x")  # the worker has started
    monkeypatch.setattr(chat, "DEADLINE", 2)
    long = [{"role": "system", "content": "Be brief."}, *TURNS, TURNS[1], {"role": "user", "content": "magic" * 2000}]
    pairs = [Pair(prompt, "Yes.", "No.", row=f"pairs.jsonl:{i + 1}")
             for i, prompt in enumerate([TURNS, "fine"] * 50 + [long] + ["fine"] * 50)]
    assert line_of(encode_pairs, tokenizer, pairs, 99) == (
        f"pairs.jsonl:101: {tokenizer.folder}: the chat template refuses a prompt: {why}")


def test_what_comes_before_a_refused_dialogue_is_rendered(make):
    texts, tokenizer = [], make(chat_template="{% if 'magic' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + CHATML)
    with pytest.raises(UserError, match="refuses a prompt: division by zero"):
        texts.extend(tokenizer.render_all(["fine"] * 70 + ["magic", "fine"]))
    assert texts == ["<|im_start|>user\nfine<|im_end|>\n<|im_start|>assistant\n"] * 70


QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
            message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""  # the gist of Qwen3's


def test_long_dialogues_are_rendered_as_by_jinja_itself(make):
    thought = {"role": "assistant", "content": "<think>\n" + "Hm. " * 1250 + "\n</think>\n\nFine."}
    dialogues = [[TURNS[0], thought, TURNS[2]], [TURNS[0], thought]]
    for pairs in (20,) * 20 + (500,):
        turns = [f"{len(dialogues)} {j} {'wörd ' * 400}" for j in range(2 * pairs + 1)]
        dialogues.append([{"role": ("user", "assistant")[j % 2], "content": text} for j, text in enumerate(turns)])
    for template in (CHATML, QWEN3):
        plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        assert list(make(chat_template=template).render_all(dialogues)) == [
            plain.render(messages=messages, add_generation_prompt=True) for messages in dialogues]


def test_blocks_larger_than_a_pipe_do_not_wait_for_each_other(make):
    texts = [f"{i}" + "é" * 100_000 for i in range(40)]
    assert list(make(chat_template="{{ messages[0].content }}").render_all(texts)) == texts


@pytest.fixture
def fresh():
    """No worker is there before."""
    if worker := chat.WORKERS.pop(os.getpid(), None):
        worker[0].kill()
        worker[0].wait()


def gone(pid):
    """True once this process has ended; False after 20 seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)


def test_one_worker_serves_all_tokenizers_from_the_first_render_on(make, fresh):
    tokenizer, named = make(chat_template=CHATML), make("alpaca")
    named.render("x")
    assert not chat.WORKERS
    tokenizer.render("x")
    (first, _), = chat.WORKERS.values()
    list(tokenizer.render_all(["x"] * 100))
    make(chat_template="{{ 1 }}").render("x")
    assert [process for process, _ in chat.WORKERS.values()] == [first]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_worker_has_no_environment_no_files_to_write_and_little_memory(make, fresh):
    make(chat_template=CHATML).render("x")
    (process, _), = chat.WORKERS.values()
    assert Path(f"/proc/{process.pid}/environ").read_bytes() == b""
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    for limit in ("file size +0 +0", "address space +536870912 +536870912", "cpu time +600"):
        assert re.search(f"Max {limit} ", limits), limits


def test_a_worker_that_was_stopped_or_interrupted_is_gone_and_another_one_goes_on(make, fresh, monkeypatch):
    fine = "{{ messages[0].content }}"
    endless = make(chat_template="{% if 'go' in messages[0].content %}" + ENDLESS + "{% endif %}" + fine)
    endless.render("x")
    (first, _), = chat.WORKERS.values()

    def interrupt(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(endless.render_all(["x", "go", "x"]))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert first.returncode is not None and gone(first.pid)
    texts = [f"text {i}" for i in range(99)]
    assert list(make(chat_template=fine).render_all(texts)) == texts  # none of those that were under way
    (second, _), = chat.WORKERS.values()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="did not end in 0.5 seconds"):
        patch.setattr(chat, "DEADLINE", 0.5)
        make(chat_template=ENDLESS).render("x")
    assert second.returncode is not None and not chat.WORKERS
    assert list(make(chat_template=fine).render_all(texts)) == texts


def test_a_worker_that_dies_or_does_not_start_is_one_line(make, fresh, monkeypatch):
    tokenizer = make(chat_template="{% if 'go' in messages[0].content %}" + ENDLESS + "{% endif %}")
    tokenizer.render("x")
    (process, _), = chat.WORKERS.values()
    killer = Timer(0.5, process.kill)
    killer.start()
    assert "render.py, its process, ended, perhaps for lack of memory" in line_of(list, tokenizer.render_all(["go"]))
    assert tokenizer.render("x") == ""
    chat.WORKERS.pop(os.getpid())[0].kill()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for prompt in ("x", "x" * 10**6):
        assert "render.py, its process, ended" in line_of(tokenizer.render, prompt)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_a_worker_of_its_own_which_ends_with_it(make, tmp_path):
    tokenizer = make(chat_template=CHATML)
    expected = tokenizer.render("hello")
    (mine, _), = chat.WORKERS.values()
    child = os.fork()
    if not child:
        text = tokenizer.render("hello")
        (tmp_path / "found").write_text(json.dumps([text, chat.WORKERS[os.getpid()][0].pid]))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    text, pid = json.loads((tmp_path / "found").read_text())
    assert text == expected == tokenizer.render("hello") and pid != mine.pid and gone(pid)
    assert chat.WORKERS[os.getpid()][0] is mine and mine.poll() is None


def test_what_a_template_refuses_in_many_lines_and_half_characters_is_one_line(make):
    for template in ("{{ raise_exception('no\nmore \\ud800') }}", "{{ '\\ud800' }}", "{{ raise_exception(messages) }}",
                     "{{ raise_exception('x' * 10**6) }}"):
        assert "the chat template refuses a prompt: " in line_of(make(chat_template=template).render, "x")


def test_the_date_is_that_of_this_process(make, monkeypatch):
    monkeypatch.setenv("TZ", "Etc/GMT-14")
    time.tzset()
    try:
        now = datetime.now()
        assert make(chat_template="{{ strftime_now('%d %B, %H h') }}").render("x") in (
            f"{moment:%d %B, %H h}" for moment in (now, datetime.now()))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_template_that_is_not_jinja_or_fails_on_types_is_a_user_error(make):
    for template in ("{% if %}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ nothing.at.all }}"):
        with pytest.raises(UserError, match="the chat template refuses a prompt"):
            make(chat_template=template).render("x")


def test_there_is_one_bos_whoever_writes_it(make):
    with_bos = "{{ bos_token }}" + CHATML
    for tokenizer, count in ((make(chat_template=with_bos), 1), (make(chat_template=CHATML), 0), (make("alpaca"), 1)):
        bos_id = tokenizer.backend.token_to_id(tokenizer.bos)
        assert tokenizer.encode([tokenizer.render("hello")])[0].count(bos_id) == count


def test_named_templates_write_a_bos_only_where_the_model_is_used_to_one(make):
    assert make("plain", add_bos_token=False).render("x") == "x\n"
    assert make("plain", add_bos_token=True).render("x") == make("plain").render("x") == "<s>x\n"


# Named templates


@pytest.mark.parametrize("template, one, three", [
    ("alpaca", "<s>BEGINNING OF CONVERSATION: USER: one ASSISTANT:",
     "<s>BEGINNING OF CONVERSATION: USER: one ASSISTANT:two</s>USER: three ASSISTANT:"),
    ("hh", "<s>\n\nHuman: one\n\nAssistant:", f"<s>{DIALOGUE}\n\nAssistant:"),
    ("plain", "<s>one\n", "<s>one\ntwo\nthree\n"),
])
def test_named_templates(make, template, one, three):
    tokenizer = make(template, chat_template="never this")
    assert tokenizer.render("one") == one
    assert tokenizer.render(TURNS) == tokenizer.render(DIALOGUE) == three


def test_without_a_chat_template_the_error_names_the_others(make):
    with pytest.raises(UserError, match="no chat template; choose one with --template: alpaca, hh, plain"):
        make().render("x")


@pytest.mark.parametrize("template, answer", [("alpaca", "fine</s>"), ("hh", " fine</s>")])
def test_responses_start_as_the_template_wants_and_end_in_eos(make, template, answer):
    tokenizer = make(template)
    encoded = encode_pairs(tokenizer, [Pair("how", "fine", "no")], max_len=99)
    text = [tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in pieces(encoded, 0)]
    assert text == [tokenizer.render("how"), answer, answer.replace("fine", "no")]


# Truncation

SHORT = "{{ bos_token }}[{% for m in messages %}{{ m.content }}{% endfor %}]:"  # 2 tokens before the prompt, 2 after


def cut(make, prompt, chosen, rejected, max_len, template=SHORT):
    """(prompt, chosen, rejected) as text after truncation, and the counts."""
    tokenizer = make(chat_template=template)
    encoded = encode_pairs(tokenizer, [Pair(prompt, chosen, rejected)], max_len)
    assert (encoded.bounds[0, 1] + encoded.bounds[0, 2:] - encoded.bounds[0, 1:-1]).max() <= max_len
    texts = [tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in pieces(encoded, 0)]
    return texts, dict(encoded.cut)


def test_what_fits_exactly_is_left_alone(make):
    assert cut(make, "abcdef", "xyz", "x", 14) == (["<s>[abcdef]:", "xyz</s>", "x</s>"], {})


def test_a_long_prompt_loses_its_front_but_not_bos_and_template(make):
    assert cut(make, "abcdef", "xyz", "x", 11) == (["<s>[def]:", "xyz</s>", "x</s>"], {"prompts shortened": 1})


def test_a_long_response_loses_its_end_and_eos_and_only_after_the_prompt(make):
    assert cut(make, "abc", "tuvwxyz", "t", 8) == (["<s>[]:", "tuvw", "t</s>"],
                                                   {"prompts shortened": 1, "responses shortened": 1})


def test_a_template_that_leaves_no_room_is_a_user_error(make):
    with pytest.raises(UserError, match="--max_len 4: the template's 4 tokens leave no room for a response"):
        cut(make, "abc", "xyz", "x", 4)
    assert cut(make, "abc", "xyz", "x", 5)[0] == ["<s>[]:", "x", "x"]


def test_many_rows_are_tokenised_as_one_is(make, monkeypatch):
    tokenizer, pairs = make("alpaca"), [Pair("p" * i, "c" * (i % 7 + 1), "r" * (i % 5 + 1)) for i in range(1, 40)]
    monkeypatch.setattr(batch_file, "CHUNK", 8)  # more than one chunk, the last one not full
    together = encode_pairs(tokenizer, pairs, 60)
    assert len(together) == 39 and together.bounds[0, 0] == 0 and together.bounds[-1, -1] == len(together.tokens)
    assert (together.bounds[1:, 0] == together.bounds[:-1, -1]).all()
    for pair, bounds in zip(pairs, together.bounds):
        one = encode_pairs(tokenizer, [pair], 60)
        assert (bounds - bounds[0] == one.bounds[0]).all()
        assert (together.tokens[bounds[0]:bounds[-1]] == one.tokens).all()


def test_decode_leaves_special_tokens_out(make):
    tokenizer = make("plain")
    assert tokenizer.decode(tokenizer.encode(["<s>fine</s>"])[0]) == "fine"
