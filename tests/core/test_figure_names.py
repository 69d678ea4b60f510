"""Every figure that mst measures itself is named in both languages, and shares are shares."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mst import rundir
from mst.evaluate.text_metrics import LIBRARIES, TEXT_METRICS
from mst.figure_names import figure_names, shares


def test_every_figure_of_an_evaluation_and_a_run_has_a_name(finished_run: Path) -> None:
    here = [name for name in TEXT_METRICS if find_spec(LIBRARIES.get(name, "json")) is not None]
    texts = ['{"a": 1}', "to be or not"]
    measured = {each.name for name in here for each in TEXT_METRICS[name](texts, texts)}
    measured |= rundir.read_manifest(finished_run).results.keys()

    assert {"exact_match", "json_equal", "peak_memory_bytes"} <= measured
    for language in ("en", "zh"):
        assert measured - figure_names(language).keys() == set()
        assert all(each.strip() for each in figure_names(language).values())


def test_shares_are_named_and_no_amount_is_one() -> None:
    assert shares() <= figure_names("en").keys()
    assert {"label_accuracy", "exact_match"} <= shares()
    assert not {"loss", "steps", "peak_memory_bytes", "rouge1"} & shares()
