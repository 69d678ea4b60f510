"""YAML that a stranger may have written: plain values, and no more of them than its text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mst.errors import UsageError

# The largest of 800 configurations of other trainers nests six levels.
MOST_LEVELS = 50
# What PyYAML quotes of a text that it can't read.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
# One character, or one of its own names for a part.
_HARMLESS = re.compile(r"""['"](?:\\?.|<[a-z ]+>)['"]""")


def load_yaml(text: str, path: Path) -> Any:
    """Return the plain values that a YAML text holds; no tag makes an object of Python.

    Args:
        text: of at most a few MiB.
        path: of the file, for the errors.

    Raises:
        UsageError: it repeats values by aliases or nests them too deeply. No text of it is quoted.
        yaml.YAMLError: it is no YAML, or has a tag for an object.
    """
    import yaml

    level = 0
    opens = (
        yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken,
        yaml.BlockMappingStartToken,
    )  # fmt: skip
    closes = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    # Told token by token: the scanner needs time that grows with the square of open brackets.
    for token in yaml.scan(text):
        # An alias may repeat what it names again and again: 1 KB of text becomes gigabytes.
        if isinstance(token, yaml.AliasToken):
            raise UsageError(
                f"{path} repeats values with YAML aliases (`*name`), which are not followed. Write"
                " the values out."
            )
        level += isinstance(token, opens) - isinstance(token, closes)
        if level > MOST_LEVELS:
            raise UsageError(
                f"{path} nests values too deeply to be a configuration. Give the file with the"
                " options, as lines of `key: value`."
            )
    return yaml.safe_load(text)


def problem_of(error: Exception) -> str:
    """Return what PyYAML says is wrong, without the words of the text that it quotes.

    A tag or an anchor may be the beginning of a row, where a file of rows is taken for options.
    """
    said = str(getattr(error, "problem", None) or "malformed")
    return _QUOTED.sub(lambda each: each[0] if _HARMLESS.fullmatch(each[0]) else "…", said)
