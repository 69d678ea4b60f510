"""The command `mst`: one module a subcommand, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from mst.cli.options import Parser, nearest, refuse_unknown
from mst.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, MstError, UsageError
from mst.request import TASKS, alias_names
from mst.seal.audit.command import add_option, run_logged
from mst.seal.jail import command as jail
from mst.seal.memory import core_dumps_off
from mst.seal.redaction import bug_report, quiet, quieten

# Command, then the module in this package and the one line of help that `mst --help` shows.
COMMANDS = {
    "menu": ("menu", "everything below by choosing from lists, in English or Chinese"),
    "train": ("train", "tune a model: plan it, train it, measure it"),
    "plan": ("plan", "say what `mst train` would do here, and why"),
    "preview": ("preview", "which tokens of the rows carry loss"),
    "data": ("data", "check data files, and encrypt or decrypt them"),
    "devices": ("devices", "the devices that are here, with the source of every figure"),
    "doctor": ("doctor", "check this machine, and say what to mend"),
    "plugins": ("plugins", "the plugins that were found, and why any was refused"),
    "models": ("models", "list the models that are here; add, verify, convert or pull one"),
    "merge": ("merge", "write a run's adapter into its base model"),
    "export": ("export", "write a run for serving engines, compared with what was trained"),
    "bundle": ("bundle", "make and verify an air-gap kit: wheels, models, an installer"),
    "sign": ("sign", "sign a model directory with your own key, offline"),
    "eval": ("eval", "judge a run or a model on rows it has not seen, beside its base"),
    "chat": ("chat", "talk to a model or a run, in the terminal"),
    "serve": ("serve", "serve a model or a run as OpenAI's API, on this machine, in the jail"),
    "ui": ("ui", "a page on this machine that shows runs live, and starts and stops them"),
    "apikeys": ("apikeys", "make, list and remove the keys of callers of `mst serve`"),
    "audit": ("audit", "show, verify and keep the log of who did what with which data and model"),
    "runs": ("runs", "list, show and compare runs"),
    "config": ("config", "translate the configuration of another trainer"),
    "bench": ("bench", "measure models, methods and devices, and put them into one table"),
    "backend": ("backend", "check a chip's backend against every promise"),
    "completion": ("completion", "print the completion of commands and options for a shell"),
    "man": ("man", "print the manual page"),
    "bug-report": ("bug_report", "write an archive for a bug report, without anybody's data"),
}

# Other names of commands.
ALIASES = {"model": "models"}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mst COMMAND [YAML] [--option value …]",
            "",
            "Fine-tune language models on the hardware you own.",
            "",
            *lines,
            "",
            f"mst {', mst '.join(TASKS)} are mst train with that --task.",
            "`mst COMMAND --help` lists a command's options. `mst train --device auto` with",
            "nothing else tunes a small embedded model on a small embedded data set.",
            "`mst --version` lists the versions of all parts; with --json as JSON.",
            "`mst` alone on a terminal is a menu.",
        ]
    )


def _dispatch(argv: Sequence[str], own_process: bool) -> int:
    if not argv and sys.stdin.isatty() and sys.stdout.isatty():
        argv = ["menu"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else EXIT_USAGE
    if argv[0] in ("-V", "--version"):
        return _show_versions(argv[1:])
    name, rest = ALIASES.get(argv[0], argv[0]), argv[1:]
    if name in TASKS:
        return _dispatch(["train", *rest, "--task", _only_task(name, rest)], own_process)
    if name not in COMMANDS:
        raise UsageError(
            f"mst: unknown command {name!r}.{nearest(name, [*COMMANDS, *TASKS])}"
            " `mst --help` lists them."
        )
    parser = Parser(prog=f"mst {name}", description=COMMANDS[name][1], allow_abbrev=False)
    module = add_arguments(name, parser)
    args, unknown = parser.parse_known_args(rest)
    refuse_unknown(parser, unknown)
    outside, unsealed = getattr(module, "outside", None), getattr(module, "unsealed", None)
    run = jail.inside(name, os.environ, module.run, own_process, outside, unsealed)
    return run_logged(name, parser, args, run)


def add_arguments(name: str, parser: argparse.ArgumentParser) -> ModuleType:
    """Add a command's options to a parser, and return the module that runs it."""
    module: ModuleType = importlib.import_module(f"mst.cli.{COMMANDS[name][0]}")
    module.add_arguments(parser)
    add_option(name, parser)
    jail.add_arguments(name, parser)
    return module


def _show_versions(rest: Sequence[str]) -> int:
    from mst import serial
    from mst.versions import lines, versions

    if list(rest) not in ([], ["--json"]):
        raise UsageError(f"mst --version: takes --json or nothing; found {' '.join(rest)!r}.")
    found = versions()
    print(serial.dumps(found) if rest else "\n".join(lines(found)) + "\n", end="")
    return 0


def _only_task(name: str, rest: Sequence[str]) -> str:
    """Return the task that the command names.

    Raises:
        UsageError: an option names one too.
    """
    flags = ("--task", *(f"--{alias}" for alias, of in alias_names().items() if of == "task"))
    for each in rest:
        if each.partition("=")[0].replace("_", "-") in {flag.replace("_", "-") for flag in flags}:
            raise UsageError(f"mst {name} has a task already; leave {each} out, or use mst train.")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's error prints no traceback.

    A bug is shown by its places and types alone: its text might quote a row.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by a rule of the seal, 6 the seal leaks,
    130 interrupted.

    Args:
        argv: the command line of a Python program, which isn't sealed itself; what it starts is.
            None for this process's own.
    """
    if argv is not None:
        with quiet():
            return _guarded(argv, own_process=False)
    # The process is this command's own; its last threads and exit handlers are quiet too.
    quieten()
    return _guarded(sys.argv[1:], own_process=True)


def _guarded(argv: Sequence[str], own_process: bool) -> int:
    core_dumps_off()
    try:
        return _dispatch(argv, own_process)
    except MstError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "Interrupted. A run that had begun can go on: mst train --output-dir RUN --resume",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `mst runs list | head` closes our output; that is no error of the user's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, SystemExit) as error:
        # A text given to sys.exit would be printed as it is.
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            raise
        sys.stderr.write(bug_report(error))
        return EXIT_FAILED
