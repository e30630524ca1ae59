"""The `liar` command: arguments -> Recipe -> calls -> output. Nothing is computed here."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from liar_ext._version import __version__
from liar_ext.cli import (
    batch,
    bench,
    compare,
    completion,
    demo,
    env,
    evaluate,
    export,
    fuse,
    grow,
    layers,
    merge,
    plan,
    prune,
    recover,
    replace,
    report,
    trace,
)
from liar_ext.cli.parser import USAGE, Commands, Root, add_output_options
from liar_ext.errors import InputError, LiarError, is_out_of_memory

# what `liar --help` shows, and in what order; a command is a module with `add_parser`
GROUPS: dict[str, tuple[Any, ...]] = {
    "make a model smaller": (prune, merge, fuse, batch),
    "train a little": (recover, replace, grow),
    "look before": (plan, layers, trace, compare),
    "measure, show and serve": (evaluate, bench, report, export),
    "about this program": (demo, env, completion),
}
FAILURE = 1
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def build_parser(arguments: list[str]) -> Root:
    """All commands; those of `bench` with their options only if `arguments` are about it."""
    parser = Root(
        "Shrink Hugging Face transformers without retraining: whole neurons, heads or layers are "
        "removed, and the damage is repaired in closed form."
    )
    parser.add_argument("--version", action="version", version=f"liar-ext {__version__}")
    commands = Commands(parser)
    for title, modules in GROUPS.items():
        commands.group(title)
        for command in modules:
            if command is bench:
                bench.add_parser(commands, wanted="bench" in arguments)
            else:
                command.add_parser(commands)
    add_output_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 2 bad usage, bad input or interrupted, with one line on standard error; 1 anything
        else.
    """
    argv = sys.argv[1:] if argv is None else argv
    if (words := completion.asked_about()) is not None:
        completion.answer(build_parser(words))
    arguments = build_parser(argv).parse_args(argv)
    if not arguments.verbose:
        _quiet_libraries()
    started = time.perf_counter()
    # a closed terminal and SIGTERM clean up as Ctrl-C does: temporary folders are removed
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        result = arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        return _fail(USAGE, str(error))
    except KeyboardInterrupt as error:
        return _fail(USAGE, str(error) or "interrupted; nothing was written")
    except LiarError as error:
        return _fail(FAILURE, str(error))
    except BrokenPipeError:
        # whoever read the output has enough, as `head` does; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (MemoryError, RuntimeError) as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            # while libraries were imported, which may wrap what they do not expect
            return _fail(USAGE, "interrupted; nothing was written")
        if not is_out_of_memory(error):
            raise
        return _fail(FAILURE, "out of memory; lower --batch-size, --samples or --seq-len")
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, handler)
    if arguments.verbose:
        print(f"took {time.perf_counter() - started:.2f} s", file=sys.stderr, flush=True)
    if result is not None and getattr(arguments, "json", False):
        sys.stdout.flush()
        print(json.dumps(result, allow_nan=False), flush=True)
    return 0


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """An interrupt while something is finalised goes nowhere, and would be told as a traceback: it
    comes again in a moment. Under torchrun, whose processes end together, it does not."""
    if isinstance(found.exc_value, KeyboardInterrupt):
        # a signal, which also ends a wait
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(found)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Interrupt, as Ctrl-C does. Under torchrun only once: a Ctrl-C reaches this process and also
    torchrun, which passes it on, and that must not interrupt the cleaning up."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        for each in (signal.SIGINT, *SIGNALS):
            signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(code: int, message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _quiet_libraries() -> None:
    """Their progress bars and notices would mix with ours; errors still come as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
