"""A function of the user's own, from a Python file that the user names; failures quote nothing."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import MstError


@dataclass(frozen=True)
class UserFunction:
    """A loaded function.

    Attributes:
        name: of the function.
        file: that it came from.
        option: that named the file.
        error: what is raised where it fails.
        call: the function itself.
    """

    name: str
    file: str
    option: str
    error: type[MstError]
    call: Callable[..., Any]


def split_spec(spec: str, default: str) -> tuple[str, str]:
    """Return the absolute file and the function's name of FILE[:FUNCTION]."""
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        file, name = spec, default
    return str(Path(file).expanduser().absolute()), name


def load_function(spec: str, option: str, default: str, error: type[MstError]) -> UserFunction:
    """Run a Python file and return the function that it defines.

    Args:
        spec: FILE.py or FILE.py:FUNCTION.
        option: that was given.
        default: name of the function where none is given.
        error: what to raise.

    Raises:
        MstError: the file is not there, fails, or defines no such function. It names the line, and
            quotes nothing.
    """
    file, name = split_spec(spec, default)
    try:
        source = Path(file).read_bytes()
    except OSError as problem:
        raise error(
            f"{option} {file} cannot be read: {problem.strerror}. Pass a Python file, and"
            " after a colon the function's name."
        ) from None
    names: dict[str, Any] = {"__name__": f"mst_{default}_file", "__file__": file}
    failed = ""
    try:
        exec(compile(source, file, "exec"), names)
    except SyntaxError as problem:
        failed = f"SyntaxError in line {problem.lineno}"
    except Exception as problem:
        failed = _where(problem, file)
    if failed:
        raise error(f"{option} {file} failed as it was loaded: {failed}. Mend it.")
    function = names.get(name)
    if not callable(function):
        here = [key for key, each in names.items() if callable(each) and key[0] != "_"]
        raise error(
            f"{option} {file} defines no function {name} (found:"
            f" {', '.join(here) or 'none'}). Name it: {option} {Path(file).name}:FUNCTION"
        )
    return UserFunction(name, file, option, error, function)


def _where(error: BaseException, file: str) -> str:
    """Return an exception's type and the innermost line of the user's file: never its text."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__)
             if each.filename == file]  # fmt: skip
    return type(error).__name__ + (f" in line {lines[-1]}" if lines else "")


def result_of(function: UserFunction, *arguments: object) -> Any:
    """Return what the function makes of its arguments.

    Raises:
        MstError: it raises; the type and the line are told.
    """
    failed = ""
    result: Any = None
    try:
        result = function.call(*arguments)
    except Exception as problem:
        failed = _where(problem, function.file)
    # Raised outside the handler, because the exception may hold a row.
    if failed:
        raise function.error(
            f"{function.name} of {function.option} {function.file} raised {failed} (its text is"
            " withheld, it might quote a row). Mend it there."
        )
    return result


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def numbers_of(function: UserFunction, result: Any, count: int, wanted: str) -> list[float]:
    """Return a function's result as a list of numbers.

    Args:
        function: that gave it.
        result: a list, a tuple or an array.
        count: how many numbers there must be.
        wanted: what it should have returned, in words.

    Raises:
        MstError: it is something else.
    """
    plain = result.tolist() if hasattr(result, "tolist") else result
    values: list[Any] = list(plain) if isinstance(plain, (list, tuple)) else []
    if len(values) != count or not all(map(is_number, values)):
        raise function.error(
            f"{function.name} of {function.option} {function.file} returned"
            f" {_described(result, values)}; it must return {wanted}. Mend it there."
        )
    return [float(each) for each in values]


def _described(result: object, values: Sequence[object]) -> str:
    if not values:
        return f"{type(result).__name__}, which is no finite number" if isinstance(
            result, numbers.Real) else type(result).__name__  # fmt: skip
    odd = next((type(each).__name__ for each in values if not is_number(each)), "number")
    return f"a {type(result).__name__} of {len(values)} with {odd} in it"
