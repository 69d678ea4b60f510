"""A template that runs for ever or writes without end is stopped, and says so."""

from __future__ import annotations

import resource
import time

import pytest

from mst.data import limits
from mst.data.rows import Message
from mst.data.template import ChatTemplate, render
from mst.errors import ModelError

SECRET = "patient 4711 has gout"
LONG = {
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a loop over its own list": (
        "{% set ns = namespace(x=0) %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% set ns.x = ns.x + 1 %}{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
}
LARGE = {
    "repeated": "{{ 'a' * 10**9 }}",
    "repeated list": "{{ [0] * 10**9 }}",
    "doubled": (
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "padded": "{{ '%0999999999d' | format(1) }}",
    "joined": "{{ (['a' * 999999] * 999999) | join }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "written": "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}


def rendered(source: str) -> str:
    return render(ChatTemplate(source, {}, ("</s>",), "evil.jinja"), (Message("user", SECRET),))


@pytest.mark.parametrize("name", LONG)
def test_a_template_that_runs_for_ever_is_stopped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = (0.5, limits.CHARACTERS)
    monkeypatch.setattr(limits.limited.__wrapped__, "__defaults__", defaults)  # type: ignore[attr-defined]
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"evil\.jinja") as caught:
        rendered(LONG[name])

    assert time.monotonic() - began < 5
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_makes_too_much_is_stopped_before_memory_is_full(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"evil\.jinja") as caught:
        rendered(LARGE[name])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert grown * 1024 < 8 * limits.CHARACTERS
    assert SECRET not in str(caught.value)


def test_what_templates_do_every_day_is_allowed() -> None:
    source = (
        "{% macro line(m) %}{{ '%-12s' | format(m.role) }}{{ m.content | indent(4) }}{% endmacro %}"
        "{% for m in messages %}{{ line(m) + '-' * 40 }}{% endfor %}"
    )

    assert SECRET in rendered(source)
