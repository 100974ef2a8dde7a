"""The tokenizer, and the chat templates that turn a dialogue into text."""
import json
import math
import re
from collections.abc import Collection, Iterator
from datetime import datetime
from functools import cached_property, wraps
from os.path import commonprefix
from pathlib import Path

import tokenizers
from jinja2 import TemplateError, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common import KINDS, UserError, check_keys, first_line, read_json


# Tokens


def as_messages(prompt):
    """A prompt as chat messages: text is one turn of the user, unless it is a dialogue in hh-rlhf's notation."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    messages, turns = [], re.split(r"\n\n(Human|Assistant):", prompt)[1:]  # speaker, text, speaker, text, …
    for speaker, text in zip(turns[::2], turns[1::2]):
        role, content = "user" if speaker == "Human" else "assistant", text.strip()
        if messages and messages[-1]["role"] == role:  # templates want the two to take turns
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
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
        bos_id = self.backend.token_to_id(self.bos) if self.bos else None
        if template in TEMPLATES:
            self.chat_template, adds_bos = TEMPLATES[template], self._ask(self.backend.encode, "").ids[:1] == [bos_id]
            if not (self.bos and config.get("add_bos_token", adds_bos)):
                # Many tokenizers name a BOS that the model never saw in training; only a chat template knows
                self.chat_template = self.chat_template.replace("{{ bos_token }}", "")
        else:
            self.chat_template = self._chat_template(config)

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
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
        if isinstance(template, list):
            named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
            config = {"chat_template": named.get("default")}
        return check_keys(config, {"text": "chat_template"}, self.folder / "tokenizer_config.json").get("chat_template")

    @cached_property
    def compiled_template(self):
        return Sandbox().from_string(self.chat_template)

    def render(self, prompt, generation=True):
        """The text before a response. prompt: text (one user turn), a dialogue, or chat messages. generation: False
        for whole dialogues, without the start of the next answer.

        Raises UserError when there is no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise UserError(f"{self.folder}: the tokenizer has no chat template; choose one with --template: "
                            f"{', '.join(TEMPLATES)}")
        try:
            self.compiled_template.environment.left = BUDGET
            return self.compiled_template.render(messages=as_messages(prompt), add_generation_prompt=generation,
                                                 bos_token=self.bos or "", eos_token=self.eos)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError,
                RuntimeError, SyntaxError, MemoryError) as error:  # a template is somebody's program
            who = f"--template {self.template}" if self.template in TEMPLATES else f"{self.folder}: the chat template"
            raise UserError(f"{who} refuses a prompt: {first_line(error)}") from None

    @cached_property
    def turn(self):
        """(lead, end, ids of end): what the template puts before and after an answer of the assistant, found by
        rendering a dialogue with one; the end is all up to the first special token and the white space after it. Where
        no special token ends it, end is "" and its ids are EOS."""
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


# Chat templates in a sandbox: data.py's Tokenizer renders prompts with them

BUDGET, STEP = 1 << 28, 1000  # characters that a template may read and write for one prompt; what a part counts as
QUICK = {"count", "default", "defined", "first", "last", "length", "none", "string"}  # filters and tests: they are free
PAID = {nodes.Output: "nodes", nodes.Concat: "nodes", nodes.List: "items", nodes.Tuple: "items", nodes.Pair: "value",
        nodes.Compare: "expr", nodes.Operand: "expr", nodes.For: "iter", nodes.Getitem: "node"}  # what reads this field
FORMAT_WIDTH = re.compile(r"%[^a-zA-Z%]*[\d*]|\{[^}]*:")  # in a format


def size(value, limit=BUDGET):
    """The characters of a text, or of all parts of a container and STEP for each; not counted on beyond the limit."""
    if isinstance(value, (str, bytes)):
        return len(value)
    total, parts = 1, value.items() if isinstance(value, dict) else value
    for part in parts if isinstance(parts, Collection) else ():
        total += STEP + size(part, limit - total)
        if total > limit:
            break
    return total


class Sandbox(ImmutableSandboxedEnvironment):
    """Where chat templates run. Jinja's sandbox keeps them from Python's internals, and a budget makes them end: what
    takes more than a moment is paid for, before it is done, by the size of what it reads and may write."""
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

        def raise_exception(message):
            raise TemplateError(message)

        self.filters |= {"tojson": lambda value, **options: json.dumps(value, ensure_ascii=False, **options),
                         "format": lambda text, *values, **named: self.call_binop(None, "%", text, values or named)}
        for table in (self.filters, self.tests):
            table.update({name: self.paying(function) for name, function in table.items() if name not in QUICK})
        self.filters["paid"] = self.paid
        self.globals |= {"raise_exception": raise_exception, "tools": None, "documents": None,
                         "strftime_now": lambda form: datetime.now().strftime(form)}
        del self.globals["lipsum"]

    def from_string(self, source):
        tree, self.step, self.left = self.parse(source), STEP + len(source), BUDGET
        for node in tree.find_all(tuple(PAID)):
            one_part = isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice)
            if one_part or isinstance(node, nodes.Tuple) and node.ctx == "store":
                continue
            values, turns = getattr(node, PAID[type(node)]), [nodes.Const(True)] * isinstance(node, nodes.For)
            paid = [nodes.Filter(value, "paid", turns, [], None, None, lineno=node.lineno)
                    for value in (values if isinstance(values, list) else [values])]
            setattr(node, PAID[type(node)], paid if isinstance(values, list) else paid[0])
        return super().from_string(tree)

    def pay(self, *values, steps=0):
        """Take the product of these sizes from the budget, that of a whole number being itself, and so many steps."""
        sizes = (abs(value) if isinstance(value, int) else size(value, self.left) for value in values)
        self.left -= math.prod(max(1, one) for one in sizes) + steps * self.step
        if self.left < 0:
            raise TemplateError("it does not end, or writes more than a prompt can have")

    @pass_context  # such a filter is never called while compiling
    def paid(self, context, value, turns=False):
        self.pay([value], steps=len(value) if turns else 0)
        return value

    def paying(self, function):
        """A filter or test that pays for the product of its arguments: what replace, join or center may write."""
        @wraps(function)
        def pay_and_call(*values, **named):
            self.pay(*values[hasattr(function, "jinja_pass_arg"):], *named.values())  # without Jinja's own
            result = function(*values, **named)
            return list(result) if isinstance(result, Iterator) else result
        return pay_and_call

    def call_binop(self, context, operator, left, right):
        if operator == "%" and not isinstance(left, (int, float)) and FORMAT_WIDTH.search(left):
            raise TemplateError("a width in a format")
        self.pay(*([[left, right]] if operator == "+" else [left, right]))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __function, *values, **named):  # the names of Jinja's, which no template can pass
        owner = getattr(getattr(__function, "__wrapped__", __function), "__self__", None)  # Jinja wraps str.format
        if isinstance(owner, str) and "format" in __function.__name__ and FORMAT_WIDTH.search(owner):
            raise TemplateError("a width in a format")
        arguments = [*values, *named.values()]
        __self.pay(*([owner, *arguments] if isinstance(owner, (str, bytes, int)) else [arguments]), steps=1)
        return super().call(__context, __function, *values, **named)
