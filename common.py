"""What any of the files may need: user errors, checked JSON, atomic files, hashes, and command-line flags."""
import argparse
import difflib
import hashlib
import json
import math
import operator
import os
import re
import shutil
import signal
import struct
import sys
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the person at the keyboard: shown as one line, without a traceback."""

    def __init__(self, message):  # text quoted from a file may be long, and hold control characters
        line = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(line if len(line) <= 1000 else f"{line[:700]} … {line[-200:]}")


def first_line(error):
    """The first line of an exception's message, or the exception's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_line(message, errors):
    """Raise UserError in the place of these errors: the message, with the first line of the error's own in brackets."""
    try:
        yield
    except errors as error:
        raise UserError(f"{message} ({first_line(error)})") from None


KINDS = {  # of values in files: what a message calls them, and whether a value is one
    "text": lambda v: isinstance(v, str) and not re.search("[\ud800-\udfff]", v),
    "a list": lambda v: isinstance(v, list), "an object": lambda v: isinstance(v, dict),
    "a list of objects": lambda v: isinstance(v, list) and all(map(KINDS["an object"], v)),
    "a list of two flags": lambda v: isinstance(v, list) and [*map(type, v)] == [bool, bool],
    "true or false": lambda v: isinstance(v, bool), "0 or 1": lambda v: type(v) is int and v in (0, 1),
    "a finite number": lambda v: type(v) in (int, float) and abs(v) < 1e300,
    "a number above 0": lambda v: type(v) in (int, float) and 0 < v < 1e300,
    "a whole number": lambda v: type(v) is int and 0 <= v < 2 ** 31,
    "a whole number from 1 to 512": lambda v: type(v) is int and 0 < v <= 512,
    "a whole number from 1 to a million": lambda v: type(v) is int and 0 < v <= 10 ** 6,
    "a list of texts": lambda v: isinstance(v, list) and all(map(KINDS["text"], v)),
    "text or a list of texts": lambda v: KINDS["text"](v) or KINDS["a list of texts"](v),
    "token ids": lambda v: all(map(KINDS["a whole number"], v if isinstance(v, list) else [v]))}
NOT_JSON = (ValueError, RecursionError)  # not UTF-8, not JSON, a number of thousands of digits, deeply nested
BROKEN = (SafetensorError, UnpicklingError, struct.error, RuntimeError, OSError, EOFError, AttributeError,
          ValueError, TypeError, LookupError, AssertionError, MemoryError)  # what reading damaged weights raises
HUB_FAILED = (HTTPError, OSError)  # also if it lacks the file, or is out of reach
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE = Path("out/cache")  # may be deleted at any time; a file's name has a hash of all that the file depends on


def check_keys(values, kinds, path):
    """The values; raises UserError for one that is not of its key's kind. null is of any. kinds: {kind: keys}."""
    for kind, keys in kinds.items():
        for key in keys.split():
            if values.get(key) is not None and not KINDS[kind](values[key]):
                raise UserError(f"{path}: {key} is {values[key]!r:.60}, expected {kind}")
    return values


def read_json(path, kinds={}, text=None):
    """The object in a JSON file, or in a text from one, checked by `check_keys`. Raises UserError naming the file."""
    try:
        with one_line(f"{path}: not JSON", NOT_JSON):
            values = json.loads(Path(path).read_text(encoding="utf-8") if text is None else text)
    except OSError as error:
        raise UserError(f"{path}: {str(error.strerror).replace(' or directory', '').lower()}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return check_keys(values, kinds, path)


def is_sharded(tensor):
    """True for a DTensor, of which each process holds some rows."""
    return hasattr(tensor, "full_tensor")


def gathered(value, keep=True, device=None):
    """The value with sharded tensors in one piece, on this device if given, or None in their place if not `keep`. The
    value is a tensor, a nested dictionary, or anything else, which stays. All processes call this together."""
    if isinstance(value, dict):
        return {name: gathered(item, keep, device) for name, item in value.items()}
    if not is_sharded(value):
        return value
    full = value.full_tensor()  # a view of padded rows
    return full.to(device or full.device, copy=True) if keep else None


def shard_like(tensor, like):
    """The tensor, sharded as `like` is, if that is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # None: nothing is sent


@contextmanager
def atomic_file(path):
    """Write a file atomically: yields a temporary path, which is renamed to `path` at the end."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two runs may write the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "posix" or Path(path).is_file():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def recover_folder(folder):
    """After a writer of `atomic_folder` was killed: put the folder back if it was between its two renames, and remove
    what else it left. Returns the paths for the next one: of what is being written, and of what it replaces."""
    temporary, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    return temporary, old


@contextmanager
def atomic_folder(folder):
    """Write a folder atomically: yields a temporary one, which is renamed to `folder` at the end."""
    folder = Path(folder)
    temporary, old = recover_folder(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        recover_folder(folder)


def whole_rows(path):
    """The objects on the whole lines of a .jsonl file, which may be half written; none without a file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []


@contextmanager
def appending(path):
    """Continue a .jsonl file, or begin one: yields the number of its rows, and a function that appends rows, each call
    in one piece, as other processes may append too. A line that a kill cut short is removed first."""
    def append(*rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write(text.encode("utf-8", "backslashreplace"))  # which writes a lone surrogate as JSON does

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file, open(path, "rb") as lines:
        lengths = [len(line) for line in lines if line.endswith(b"\n")]
        if sum(lengths) < lines.tell():
            file.truncate(sum(lengths))
        yield len(lengths), append


def hash_bytes(*pieces, size=16):
    """Hash of these bytes, one piece after the other, as hex digits; size: its bytes."""
    digest = hashlib.blake2b(digest_size=size)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def content_hash(*parts):
    """Hash of parts of any kind: 32 hex digits. A Path counts by the bytes of its file, an array or a tensor by type,
    shape and bytes, anything else by its repr."""
    def describe(part):
        if isinstance(part, Path):
            with open(part, "rb") as file:
                return hashlib.file_digest(file, "blake2b").digest()
        if hasattr(part, "__array__"):
            tensor = torch.as_tensor(gathered(part)).detach().cpu().contiguous()
            return tensor.dtype, tensor.shape, hash_bytes(tensor.flatten().view(torch.uint8).numpy())
        return part
    return hash_bytes(repr([describe(part) for part in parts]).encode())


def files_hash(path):
    """Hash of the names, sizes and times of a file or of a folder's files (hashing gigabytes of weights is slow)."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return content_hash(*((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


# Command lines of train.py and eval.py: a flag is declared once, as a field of a dataclass
BOUNDS = {"least": ("at least", operator.ge), "above": ("more than", operator.gt), "below": ("less than", operator.lt),
          "most": ("at most", operator.le)}  # of numbers: name -> (what a message says, what must hold)


def setting(default, help, heading="", choices=(), read=None, free=False, **bounds):
    """A field that is a flag. heading: starts a group of --help; read: flag's text -> value; free: may change when a
    run is resumed; bounds: by their names in BOUNDS, of each number where there are several."""
    return field(default=default, metadata=dict(help=help, heading=heading, choices=choices, read=read, free=free,
                                                bounds=bounds))


def numbers(text, expected="numbers"):
    """"0.5,1" -> (0.5, 1.0). expected: what a message about other text says."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected} with commas, not {text!r}") from None


def source_names(text):
    """"a,b" -> ("a", "b"); a path with a comma in it is one. Such a flag may also be given several times."""
    return (text,) if Path(text).exists() else tuple(text.split(","))


def weighted_names(text):
    """"help=2,harm" -> (("help", 2.0), ("harm", 1.0)); "help,harm" -> (("help", None), ("harm", None))."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    try:
        weights = {name: float(weight or 1) if "=" in text else None for name, _, weight in pairs}
    except ValueError:
        weights = {}
    if len(weights) < len(pairs) or not all(weight is None or 0 < weight < math.inf for weight in weights.values()):
        raise argparse.ArgumentTypeError(f"expected names, each once, with weights of more than 0 or without: {text}")
    return tuple(weights.items())


def as_typed(value):
    """A flag's value in the words of a command line, the inverse of the readers above; "" for None and False."""
    items = value if isinstance(value, tuple) else () if value is None or value is False else (value,)
    pairs = [item if isinstance(item, tuple) else (item, None) for item in items]
    return ",".join(str(name) if weight is None else f"{name}={weight:g}" for name, weight in pairs)


def check_values(settings, values):
    """Raise UserError for a value that is not one of its field's choices, or out of its bounds."""
    for flag in fields(settings):
        value, choices = values.get(flag.name), flag.metadata["choices"]
        if value is not None and choices and value not in choices:
            raise UserError(f"--{flag.name} {value}: choose from {', '.join(filter(None, choices))}")
        items = value if isinstance(value, tuple) else (value,)
        for number in [item for item in items if isinstance(item, (int, float))]:
            if not abs(number) < 1e300:
                raise UserError(f"--{flag.name} {number}: not a finite number")
            for name, bound in flag.metadata["bounds"].items():
                words, holds = BOUNDS[name]
                if not holds(number, bound):
                    raise UserError(f"--{flag.name} {number}: must be {words} {bound}")


def check_read(given, not_read):
    """Raise UserError for a given flag that would not be read. not_read: {flag: when or why}."""
    for flag in filter(not_read.get, given):
        raise UserError(f"--{flag}: not read {not_read[flag]}")


def check_device(device):
    """Raise UserError if torch has no such device here."""
    with one_line(f"--device {device}: cannot be used", (RuntimeError, AssertionError, NotImplementedError)):
        torch.empty(1, device=device).item()


THEIRS = {  # flags of transformers and TRL: what does the same here
    "gradient_accumulation_steps": "--grad_accum", "gradient_checkpointing": "--checkpointing", "lora_r": "--lora_rank",
    "lr_scheduler_type": "--warmup, then always a cosine", "overwrite_output_dir": "--overwrite", "output_dir": "--out",
    "per_device_train_batch_size": "--batch_size", "resume_from_checkpoint": "--resume", "num_train_epochs": "--epochs",
    "model_name_or_path": "--model", "logging_steps": "--log_every", "lora_target_modules": "--lora_targets",
    "eval_steps": "--eval_every", "max_grad_norm": "--grad_clip", "bf16": "--dtype bfloat16", "use_peft": "--lora_rank",
    "warmup_ratio": "--warmup", "save_steps": "--save_every", "dataset_name": "--data", "report_to": "--wandb PROJECT",
    "max_length": "--max_len", "max_seq_length": "--max_len", "torch_dtype": "--dtype", "learning_rate": "--lr"}


class Parser(argparse.ArgumentParser):
    """The parser of a dataclass of flags: its result has the given ones only. values: what --help shows as defaults;
    hidden: flags that --help leaves out."""

    def __init__(self, settings, program, description, values, hidden=()):
        super().__init__(prog=program, description=description, usage=f"{program} [flags]", allow_abbrev=False,
                         add_help=False, argument_default=argparse.SUPPRESS)
        groups, heading = {}, ""
        for flag in sorted(fields(settings), key=lambda flag: flag.name not in settings.__annotations__):  # shared last
            heading = flag.metadata["heading"] or heading
            group = groups[heading] = groups.get(heading) or self.add_argument_group(heading)
            choices, default = filter(None, flag.metadata["choices"]), as_typed(values.get(flag.name))
            help = ": ".join(filter(None, (flag.metadata["help"], ", ".join(choices))))
            help += f" (default: {default})" if default else ""
            help = argparse.SUPPRESS if flag.name in hidden else help.replace("%", "%%")
            read = flag.metadata["read"] or flag.type
            options = {"action": "store_true"} if read is bool else {
                "type": read, "action": "extend" if read is source_names else "store",
                "metavar": read.__name__ if read in (int, float) else "text"}
            group.add_argument(f"--{flag.name}", help=help, **options)
        self.add_argument("--help", "-h", action="store_true", help="show this text and stop")

    def error(self, message):
        """One line instead of argparse's page of usage: what a flag of others is called here, or the nearest one."""
        flag = re.split("[ =]", message.removeprefix("unrecognized arguments: "))[0]
        ours = THEIRS.get(name := flag.lstrip("-").replace("-", "_"), f"--{name}")
        near = difflib.get_close_matches(flag, self._option_string_actions, 1) if flag.startswith("-") else []
        if re.match("[-a-z_]*", ours)[0] in self._option_string_actions:
            raise UserError(f"unrecognized {flag}: here it is {ours}")
        raise UserError(message + (f"; did you mean {near[0]}?" if near else ""))


def progress(*rows, show=True, **settings):
    """A tqdm bar; it prints nothing unless `show`, and where there is no terminal (a file, a cluster's log)."""
    return tqdm(*rows, disable=None if show else True, **settings)


@contextmanager
def stop_signals():
    """Yield a list that is no longer empty once Ctrl-C or SIGTERM came; a second one ends the program at once."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt(number)
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_command(main, name, interrupted):
    """Run a program's main; one line ends it after a user's mistake (exit status 1), Ctrl-C (130) or SIGTERM (0). Does
    not return where there are several processes."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)
    name += f" (rank {rank})" if (rank := os.environ.get("RANK", "0")) != "0" else ""
    try:
        main()
    except (UserError, SafetensorError, OSError) as error:  # a full disk, a folder that may not be written, a long name
        sys.exit(f"{name}: {UserError(str(error))}")
    except KeyboardInterrupt as stopped:
        print(f"{name}: {interrupted}", file=sys.stderr)
        sys.exit(0 if stopped.args == (signal.SIGTERM,) else 130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            if sys.exc_info()[0] is None:  # torch may still keep the group's threads in a cache, and now and then they
                sys.stdout.flush()         # abort the interpreter at its end: end without it
                os._exit(0)
