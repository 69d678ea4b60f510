"""`mst config import`: another trainer's configuration, as ours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mst.errors import EXIT_FAILED, UsageError

_TOOLS = ("auto", "ms-swift", "llama-factory", "axolotl", "trl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the one action and its options."""
    actions = parser.add_subparsers(dest="action", metavar="import", required=True)
    imported = actions.add_parser(
        "import",
        help="translate a file of ms-swift, LLaMA-Factory, axolotl or TRL",
        allow_abbrev=False,
    )
    imported.add_argument(
        "file", metavar="FILE", help="YAML or JSON with the options, or a script with the command"
    )
    imported.add_argument(
        "--from",
        dest="tool",
        default="auto",
        choices=_TOOLS,
        help="the tool that the file is of (auto: by its command or its keys)",
    )
    imported.add_argument("--output", metavar="FILE", help="write the YAML there (standard output)")
    imported.add_argument("--force", action="store_true", help="replace the output's file")
    imported.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 when a setting that changes the result is not carried over",
    )
    imported.add_argument("--json", action="store_true", help="options and report as JSON")


def run(args: argparse.Namespace) -> int:
    """Translate; the YAML goes to standard output, the report to standard error."""
    from mst.foreign import report
    from mst.foreign.source import read_source
    from mst.foreign.translate import TOOLS, translate, which_tool

    path = Path(args.file)
    source = read_source(path)
    tool = which_tool(source, args.tool, path)
    translation = translate(source, tool, path.parent)
    text = report.to_yaml(translation, tool.title)
    if args.output is not None:
        _write(Path(args.output), text, args.force)
    if args.json:
        print(json.dumps(report.to_json(translation), indent=2, ensure_ascii=False))
    else:
        for line in report.lines(translation):
            print(line, file=sys.stderr)
        print(f"{path}, {TOOLS[tool.name].title}: {report.summary(translation)}", file=sys.stderr)
        if args.output is None:
            print(text, end="")
        else:
            print(f"wrote {args.output}. Next: mst plan {args.output}", file=sys.stderr)
    differs = translation.unknown or any(each.effect == "changes" for each in translation.left)
    return EXIT_FAILED if args.strict and differs else 0


def _write(path: Path, text: str, force: bool) -> None:
    from mst.durable import write_text

    if path.exists() and not force:
        raise UsageError(f"{path} exists. Name another file with --output, or pass --force.")
    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}. Name another file with --output."
        ) from None
