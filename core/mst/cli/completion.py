"""`mst completion`: the completion of commands, options and values for a shell, as a script."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from mst.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
# What a value is, by what the help calls it.
_FILES = frozenset({"FILE", "YAML", "PATH", "OUT", "MATRIX", "REPORT"})
_DIRECTORIES = frozenset({"DIR", "MODEL"})
_RUNS = frozenset({"RUN"})
# Names of runs: directories below ./runs, and any path to one. shtab has bash quote what a function
# with "_dir" in its name answers, so that a name with a blank or a ";" stays one word.
_PREAMBLE = {
    "bash": """\
_mst_run_dirs() {
  [ -d runs ] && (cd ./runs && compgen -d -- "$1")
  compgen -d -- "$1"
}
""",
    "zsh": """\
_mst_run_dirs() {
  local -a found
  found=(runs/*(/N:t))
  compadd -a found
  _files -/
}
""",
}
# fish's "path" takes a pattern that nothing fits; a "$" would be read when the script is loaded.
_RUN = {
    "bash": "_mst_run_dirs",
    "zsh": "_mst_run_dirs",
    "fish": "(path basename runs/*/ 2>/dev/null; __fish_complete_directories)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst completion`."""
    parser.add_argument("shell", choices=SHELLS, help="whose completion it is")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    sys.stdout.write(script(args.shell))
    return 0


def script(shell: str) -> str:
    """Return a shell's completion script, which starts no Python.

    Args:
        shell: of `SHELLS`.

    Raises:
        UsageError: what makes the script is not installed.
    """
    if importlib.util.find_spec("shtab") is None:
        raise UsageError(
            "mst completion needs shtab, which is not installed here. Install it:"
            " python -m pip install 'mst-train[shell]'"
        )
    import shtab

    from mst.cli.whole import whole_parser

    whole = whole_parser()
    for action in _actions(whole):
        words = set(action.metavar.split("|")) if isinstance(action.metavar, str) else set()
        # Of a value that may be several things, the one whose completion has most to offer.
        kinds = [(_FILES, shtab.FILE), (_RUNS, _RUN), (_DIRECTORIES, shtab.DIRECTORY)]
        kind = next((kind for names, kind in kinds if words & names), None)
        if kind is not None and action.choices is None:
            action.complete = kind  # type: ignore[attr-defined]
    return str(shtab.complete(whole, shell=shell, preamble=_PREAMBLE.get(shell, "")))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found += _actions(inner)
        else:
            found.append(action)
    return found
