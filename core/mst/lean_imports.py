"""What transformers imports beside any model and answers don't need, left out until it is used.

Of 352 MB that a process took once it had imported Llama from transformers 5.23, with torch 2.13,
torch's compiler and its tensors over many processes took 44, and sympy, which both import, 30. The
part of torch that makes an empty model imports sympy too, to ask whether sizes are symbols.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
# Masks of transformers import it; it needs nothing else of the compiler.
_ALONE = f"{_COMPILER}._trace_wrapped_higher_order_op"
# Decorators that only tell the compiler how to go about a function.
_MARKS = ("disable", "assume_constant_result", "allow_in_graph", "nonstrict_trace")


def _as_it_is(fn: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Mark nothing: as long as the compiler is not loaded, nothing is compiled."""
    return fn if fn is not None else lambda given: given


class _Compiler(ModuleType):
    """Stands in for torch's compiler until something of it is used; then the real one is loaded."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._finder = _Finder(self)
        sys.meta_path.insert(0, self._finder)

    def __getattr__(self, name: str) -> Any:
        # Python's import system looks for these before it runs a module.
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            if name in _MARKS:
                return _as_it_is
            self.give_way()
        return getattr(sys.modules[_COMPILER], name)

    def give_way(self) -> None:
        """Put the real compiler in this one's place."""
        sys.meta_path[:] = [each for each in sys.meta_path if each is not self._finder]
        del sys.modules[_COMPILER]
        try:
            real = importlib.import_module(_COMPILER)
        except BaseException:
            sys.modules[_COMPILER] = self
            sys.meta_path.insert(0, self._finder)
            raise
        if _ALONE in sys.modules:
            setattr(real, _ALONE.rpartition(".")[2], sys.modules[_ALONE])


class _Finder:
    """Loads the real compiler before a module of it is."""

    def __init__(self, stand_in: _Compiler) -> None:
        self._stand_in = stand_in

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where such a module is, once the compiler is loaded; None for any other."""
        if not name.startswith(f"{_COMPILER}.") or name == _ALONE:
            return None
        self._stand_in.give_way()
        module = sys.modules.get(name)
        if module is None:
            return importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.machinery.ModuleSpec(name, _Loaded(module))


class _Loaded(importlib.abc.Loader):
    """Gives the import system a module that was loaded while it looked for it."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""
        module.__spec__ = self._spec


def _all(*conditions: Any) -> bool:
    return all(map(bool, conditions))


def _any(*conditions: Any) -> bool:
    return any(map(bool, conditions))


# What torch's shape functions ask about sizes, where all of them are numbers.
_SYMBOLIC: Mapping[str, Mapping[str, Any]] = {
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(
            ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious",
             "statically_known_true"), bool
        ),
        "sym_and": _all,
        "sym_or": _any,
        "sym_eq": lambda one, other: bool(one == other),
        "is_nested_int": lambda _: False,
        "has_guarding_hint": lambda _: True,
        "guarding_hint_or_throw": lambda number: number,
        "free_unbacked_symbols": lambda *_: set(),
    },
    "sympy": {"Basic": type("Basic", (), {})},
}  # fmt: skip


class _Numbers(ModuleType):
    """Stands in for a module about symbols; what it lacks, it has from the real one."""

    def __getattr__(self, name: str) -> Any:
        # sympy alone has modules of its own. Python asks for the path of whatever names come from.
        if name.startswith("__") and (name != "__path__" or "." in self.__name__):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def without_symbols() -> Iterator[None]:
    """Make models in here without sympy, as long as nothing but numbers is asked about."""
    made = []
    for name, known in _SYMBOLIC.items():
        if name not in sys.modules:
            sys.modules[name] = one = _Numbers(name)
            vars(one).update(known)
            made.append(one)
    try:
        yield
    finally:
        for one in made:
            if sys.modules.get(one.__name__) is one:
                del sys.modules[one.__name__]


def import_lean() -> None:
    """Import transformers without what only compiling and jobs of many processes need.

    For a process that answers and does nothing else: torch says in it that there are no others.
    Where transformers or torch's compiler has been imported already, nothing is changed.
    """
    import torch
    import torch.distributed

    if "transformers" in sys.modules or _COMPILER in sys.modules:
        return
    spec = importlib.util.find_spec(_COMPILER)
    if spec is None or spec.submodule_search_locations is None:
        return
    stand_in = _Compiler(_COMPILER)
    stand_in.__path__, stand_in.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[_COMPILER] = stand_in
    untyped: Any = torch
    untyped._dynamo = stand_in
    untyped.distributed.is_available = lambda: False
    importlib.import_module("transformers.modeling_utils")
