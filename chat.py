"""The tokenizer, and the chat templates that turn a dialogue into text."""
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import cache, cached_property
from itertools import groupby, islice
from os.path import commonprefix
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import tokenizers
from jinja2 import StrictUndefined, Template, TemplateError

from common import KINDS, UserError, check_keys, first_line, one_line, read_json


def as_messages(prompt):
    """A prompt as chat messages: text is one turn of the user, unless it is a dialogue in hh-rlhf's notation."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:]  # speaker, text, speaker, text, …
    messages = [{"role": "user" if speaker == "Human" else "assistant",  # they take turns, as templates want
                 "content": "\n\n".join(text.strip() for _, text in texts)}
                for speaker, texts in groupby(zip(turns[::2], turns[1::2]), lambda turn: turn[0])]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


# For models without a chat template. alpaca is safe-rlhf's format, which its score models expect as well.
NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('this template has no system role') }}{% endif %}"
TEMPLATES = {
    "alpaca": "{{ bos_token }}BEGINNING OF CONVERSATION: {% for m in messages %}" + NO_SYSTEM + "{{ 'USER: ' ~ "
              "m.content ~ ' ASSISTANT:' if m.role == 'user' else m.content ~ eos_token }}{% endfor %}",
    "hh": "{{ bos_token }}{% for m in messages %}" + NO_SYSTEM + "{{ '\n\nHuman: ' if m.role == 'user' else "
          "'\n\nAssistant: ' }}{{ m.content }}{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt }}",
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content ~ '\n' }}{% endfor %}",
    "raw": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",  # for base models that continue a text
}
TEMPLATE_NAMES = ("chat", *TEMPLATES)
compiled = cache(Template)


# Templates that come with a model: a worker process renders them, see render.py

DEADLINE = 10  # seconds of a dialogue: a long one takes milliseconds, the rest is for a busy machine
BLOCK = 32     # dialogues that are sent at a time: both processes hold their texts in memory
WORKERS = {}   # process id: (idle worker, thread that reads from it); after a fork each process has its own


def start_worker():
    command = [sys.executable, "-I", Path(__file__).with_name("render.py"), *sys.path]
    return Popen(command, env={}, encoding="ascii", stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
                 start_new_session=True), ThreadPoolExecutor(1)  # Ctrl-C in a terminal goes to a session


def render_apart(template, dialogues, variables):
    """Yield the text of each dialogue, by a worker. Raises TemplateError where one is refused or has to be stopped."""
    lines = map(json.dumps, dialogues)
    while block := list(islice(lines, BLOCK)):
        (worker, reader), answer, texts, error = WORKERS.pop(os.getpid(), None) or start_worker(), {}, [], ""
        head = json.dumps([template, variables, datetime.now().isoformat(), len(block)])
        try:
            print(head, *block, sep="\n", file=worker.stdin, flush=True)
            for line in [reader.submit(worker.stdout.readline) for _ in block]:
                answer = json.loads(line.result(DEADLINE))
                texts.append(answer["text"])
            WORKERS[os.getpid()] = worker, reader
        except TimeoutError:
            error = f"it did not end in {DEADLINE} seconds"
        except (KeyError, ValueError, BrokenPipeError):  # the last two: without an answer
            error = answer.get("error", "python -I render.py, its process, ended, perhaps for lack of memory")
        finally:
            if len(texts) < len(block):
                with suppress(BrokenPipeError), worker:  # closes the pipes and waits for it
                    worker.kill()
        yield from texts
        if error:
            raise TemplateError(error)


class Tokenizer:
    """A tokenizer.json with the special tokens and the chat template of its folder.

    template: "chat" or None for the folder's chat template, or a name in TEMPLATES.
    bos, eos: the tokens' text (bos may be None); eos_id: the id of eos; stop_ids: the ids at which an answer ends.
    """

    def __init__(self, folder, template=None):
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: no tokenizer.json; save one there with transformers: "
                            "AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)")
        self.folder, self.template = folder, template
        self.backend = self._ask(tokenizers.Tokenizer.from_file, str(folder / "tokenizer.json"))
        self.backend.no_padding()
        self.backend.no_truncation()
        files = ("special_tokens_map.json", "tokenizer_config.json")  # the later one wins
        config = {k: v for name in files if (folder / name).is_file() for k, v in read_json(folder / name).items()}
        check_keys(config, {"true or false": "add_bos_token"}, folder / files[1])
        self.bos, self.eos = (self._text(config.get(key), key) for key in ("bos_token", "eos_token"))
        self.eos_id = self.backend.token_to_id(self.eos) if self.eos else None
        if self.eos_id is None:
            raise UserError(f"{folder / files[1]}: names no eos_token that tokenizer.json knows")
        self.chat_template = TEMPLATES.get(template) or self._chat_template(config)
        adds_bos = self.bos and self._ask(self.backend.encode, "").ids[:1] == [self.backend.token_to_id(self.bos)]
        if template in TEMPLATES and not (self.bos and config.get("add_bos_token", adds_bos)):
            # Many tokenizers name a BOS that the model never saw in training; only a chat template knows
            self.chat_template = self.chat_template.replace("{{ bos_token }}", "")

    def _ask(self, function, *values, **named):
        """Call the tokenizers library. Raises UserError where it cannot read tokenizer.json, or use it on a text."""
        try:
            return function(*values, **named)
        except BaseException as error:  # its errors are bare Exceptions, and its panics not even that
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self.folder / 'tokenizer.json'}: cannot be used ({first_line(error)})") from None

    def _text(self, token, key):
        """The text of a special token: as tokenizer_config.json writes it, or by its number in config.json."""
        if token is None and (self.folder / "config.json").is_file():
            number = read_json(self.folder / "config.json").get(f"{key}_id")
            return self.backend.id_to_token(number) if KINDS["a whole number"](number) else None
        token = token.get("content") if isinstance(token, dict) else token
        return check_keys({key: token}, {"text": key}, self.folder / "tokenizer_config.json")[key]

    def _chat_template(self, config):
        """The template's text: chat_template.jinja comes first; of a list of named templates, the one named default."""
        path, template = self.folder / "chat_template.jinja", config.get("chat_template")
        if path.is_file():
            with one_line(f"{path}: cannot be read", (OSError, UnicodeDecodeError)):
                return path.read_text(encoding="utf-8")
        if isinstance(template, list):
            named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
            config = {"chat_template": named.get("default")}
        return check_keys(config, {"text": "chat_template"}, self.folder / "tokenizer_config.json").get("chat_template")

    def render(self, prompt, generation=True):
        """The text before a response. prompt: text (one user turn), a dialogue, or chat messages. generation: False
        for whole dialogues, without the start of the next answer. Raises UserError when there is no chat template, or
        it refuses these messages."""
        return next(self.render_all([prompt], generation=generation))

    def render_all(self, prompts, rows=(), generation=True):
        """Yield `render` of each prompt, faster. rows: what errors call each of them, such as file:line."""
        if self.chat_template is None:
            raise UserError(f"{self.folder}: the tokenizer has no chat template; choose one with --template: "
                            f"{', '.join(TEMPLATES)}")
        named, dialogues, done = self.template in TEMPLATES, map(as_messages, prompts), 0
        variables = dict(bos_token=self.bos or "", eos_token=self.eos, add_generation_prompt=generation)
        texts = render_apart(self.chat_template, dialogues, variables) if not named else (
            compiled(self.chat_template).render(messages=messages, raise_exception=StrictUndefined, **variables)
            for messages in dialogues)  # when a StrictUndefined is written, it raises its message
        try:
            for done, text in enumerate(texts, 1):
                yield text
        except TemplateError as error:
            row = f"{rows[done]}: " if rows and rows[done] else ""
            who = f"--template {self.template}" if named else f"{self.folder}: the chat template"
            raise UserError(f"{row}{who} refuses a prompt: {first_line(error)}") from None

    @cached_property
    def turn(self):
        """(lead, end, ids of end): what the template puts before and after an answer of the assistant, found by
        rendering a dialogue with one. The end runs to the first special token and the white space after it. Without a
        special token, end is "" and its ids are EOS."""
        dialogue = [{"role": "user", "content": "1 b"}, {"role": "assistant", "content": "answer"}]
        try:
            before, answer, end = self.render(dialogue, generation=False).rpartition("answer")
        except UserError:  # a template for prompts alone
            before = answer = end = ""
        prompt = self.render(dialogue[:1])
        lead = before[len(prompt):] if answer and before.startswith(prompt) else ""
        found = re.match(rf".*?({'|'.join(map(re.escape, self.special))})\s*", end, re.DOTALL) if self.special else None
        return (lead, found[0], self.encode([found[0]])[0]) if found else (lead, "", [self.eos_id])

    @cached_property
    def special(self):
        """{text: id} of the special tokens."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def stop_ids(self):
        """EOS, and the special tokens with which the template ends an answer."""
        return {self.eos_id, *(set(self.special.values()) & set(self.turn[2]))}

    @cached_property
    def frame(self):
        """(head, tail): the template's tokens, with which every rendered prompt of one turn starts and ends."""
        prompts = self.encode([self.render("a"), self.render("1 b")])
        return commonprefix(prompts), commonprefix([ids[::-1] for ids in prompts])[::-1]

    def encode(self, texts):
        """list of texts -> list of lists of token ids, with no special token added."""
        encodings = self._ask(self.backend.encode_batch_fast, list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids):
        """Token ids -> text, without special tokens."""
        return self._ask(self.backend.decode, list(ids), skip_special_tokens=True)

    def answer(self, prompt, ids):
        """The text of token ids that continue those of a prompt. Template raw keeps the spaces at its ends."""
        if self.template != "raw":
            return self.decode(ids).strip()
        return self.decode([*prompt, *ids])[len(self.decode(prompt)):]
