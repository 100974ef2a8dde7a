"""The worker that renders the chat templates which come with models: chat.py starts it, as `python -I render.py`.

Such a template is somebody's program. Jinja's sandbox keeps it from Python's internals; this process has no environment
variables, writes no file and has MEMORY, where the system has such limits; chat.py ends it when a dialogue takes long.
Input: for each block of dialogues a line of JSON, [template, variables, local time, number of dialogues], then a line
of messages for each. Output: {"text": …} for each, up to {"error": …}, which ends it, as the end of its input does.
"""
import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import cache
from time import process_time

sys.path += sys.argv[1:]  # chat.py's: -I leaves a user's own site-packages out, where jinja2 may be
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY, LONGEST = 1 << 29, 4 << 20  # bytes: of addresses, of a text
CPU_SECONDS = 600  # of a block: if chat.py is killed while a template does not end, nobody else stops it


def raise_exception(message):
    raise TemplateError(message)


if __name__ == "__main__":
    def limit(name, soft, hard):
        with suppress(ImportError, ValueError, OSError):  # Windows has no limits, macOS none of memory
            import resource
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))

    limit("FSIZE", 0, 0)
    limit("AS", MEMORY, MEMORY)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    env.globals |= {"raise_exception": raise_exception, "tools": None, "documents": None}
    del env.globals["lipsum"]
    compiled = cache(env.from_string)
    try:
        for head in sys.stdin:
            limit("CPU", int(process_time()) + CPU_SECONDS, -1)
            template, variables, now, count = json.loads(head)
            variables["strftime_now"] = datetime.fromisoformat(now).strftime
            for messages in [sys.stdin.readline() for _ in range(count)]:  # chat.py writes all before it reads any
                text = compiled(template).render(messages=json.loads(messages), **variables)
                if len(text.encode()) > LONGEST:
                    raise_exception(f"it writes more than {LONGEST >> 20} MB")
                print(json.dumps({"text": text}), flush=True)
    except MemoryError:
        print(json.dumps({"error": f"it takes more than {MEMORY >> 20} MB of memory"}))
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError,
            RuntimeError, SyntaxError) as error:
        print(json.dumps({"error": str(error).strip()[:1000] or type(error).__name__}))
