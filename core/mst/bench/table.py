"""Results on a terminal: a line a cell, forecasts apart, and what a comparison found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mst.bench import figures
from mst.bench.compare import Comparison
from mst.bench.figures import Prices, Spread
from mst.bench.lines import in_order, plan_words, rate, seconds, speed, trainer
from mst.bench.results import DONE, FORECAST, Measured, Results
from mst.quantities import duration, gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

_HEADINGS = ("cell", "on", "tokens/s", "a step", "MFU", "memory", "loss")
_CHANGES = ("cell", "on", "figure", "before", "after", "ratio (95 %)", "")
# What may be cut into lines where the terminal is narrow.
_WRAPPED = 2
_NOTE = (
    "±: half the way from the slowest to the fastest repeat. MFU: of the catalogue's peak / of the"
    " measured product's. Memory: the peak, and by how much the forecast was off."
)


def show_results(console: Console, results: Results, prices: Prices) -> None:
    """Print all cells: what was measured, why the rest was not, and forecasts apart."""
    measured, forecast = in_order(results.cells)
    console.print(f"{results.name}, {results.created}: {len(measured)} cells")
    console.print(cell_table(measured))
    _show_products(console, measured)
    _show_costs(console, results.cells, prices)
    if any(each.repeats for each in measured):
        console.print(_NOTE)
    for each in measured:
        _show_reasons(console, each)
    _show_energy_reasons(console, measured)
    if forecast:
        console.print("\nforecast, not measured (mst plan --on):")
        console.print(cell_table(forecast))
        for each in forecast:
            _show_reasons(console, each)
    for note in results.notes:
        console.print(f"note    {note}", soft_wrap=True)


def cell_table(cells: Sequence[Measured]) -> Table:
    """Return a table with a row a cell."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, no_wrap=number >= _WRAPPED)
    for each in cells:
        table.add_row(*cell_texts(each))
    return table


def cell_texts(each: Measured) -> tuple[str, ...]:
    """Return a cell's texts under the headings."""
    machine = each.machine
    where = each.cell.device if machine is None else machine.device
    if machine is not None and machine.node:
        where = f"{machine.device} {machine.chip}"
    found = speed(each)
    if found is None:
        status = "does not fit" if each.status == FORECAST else each.status
        return (short(each), where, status)
    took, memory = seconds(each), figures.peak_memory(each)
    loss = figures.over_repeats(each, lambda one: one.loss)
    expected = gib(each.forecast.memory_bytes) if each.forecast else ""
    return (
        short(each),
        where,
        _spread(found),
        duration(took.median) if took else "",
        " / ".join(_share(figures.mfu(each, one)) for one in _peaks(each)),
        f"{gib(memory.median)}{_error(each, memory)}" if memory else expected,
        f"{loss.median:.4f}" if loss else "",
    )


def _peaks(each: Measured) -> tuple[float | None, float | None]:
    return each.peak.catalogue_tflops, each.peak.measured_tflops


def _spread(found: Spread) -> str:
    """Return a speed with half of the way from its slowest to its fastest repeat.

    Of a forecast the ends are those of its uncertainty.
    """
    if found.low == found.high:
        return rate(found.median)
    if not found.count:
        return f"{rate(found.median)} ({rate(found.low)}–{rate(found.high)})"
    return f"{rate(found.median)} ±{found.relative / 2:.1%}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.1%}"


def _error(each: Measured, memory: Spread) -> str:
    """Return by how much the forecast of the memory was off; of peers there is none."""
    if each.forecast is None or not memory.median:
        return ""
    return f" ({each.forecast.memory_bytes / memory.median - 1:+.0%})"


def _show_products(console: Console, cells: Sequence[Measured]) -> None:
    """Print exports and servers, where there are any."""
    from rich.table import Table

    exports = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("export of", "format", "gate", "seconds", "perplexity", "KL", "agreement"):
        exports.add_column(heading, no_wrap=heading != "export of")
    servers = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("server of", "target", "streams", "tokens/s", "first token", "p95", "lost"):
        servers.add_column(heading, no_wrap=heading != "server of")
    for each in cells:
        for made in each.exported:
            exports.add_row(
                short(each), made.format, made.status, f"{made.seconds:.1f}",
                _number(made.perplexity_ratio, ".4f"), _number(made.mean_kl, ".2g"),
                _number(made.agreement, ".1%"),
            )  # fmt: skip
        for one in each.served:
            servers.add_row(
                short(each), one.target, str(one.streams),
                _number(one.tokens_per_second, ".4g"),
                "-" if one.first_token_seconds is None else duration(one.first_token_seconds),
                "-" if one.first_token_p95_seconds is None
                else duration(one.first_token_p95_seconds),
                f"{one.lost} of {one.requests}",
            )  # fmt: skip
    for table in (exports, servers):
        if table.row_count:
            console.print()
            console.print(table)


def short(each: Measured) -> str:
    """Return a cell in a few words; of a model's path the last part."""
    cell = each.cell
    words = f"{Path(cell.model).name or cell.model}, {cell.method}, {cell.length}, {cell.batch}"
    return f"{words}, {trainer(each)}" if cell.peer else words


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _show_costs(console: Console, cells: Sequence[Measured], prices: Prices) -> None:
    """Print money and energy of a million tokens, where any of it is known; the cheapest first."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("a million tokens of", "on", f"{prices.currency or 'price'}", "kWh", ""):
        table.add_column(heading, no_wrap=heading not in ("a million tokens of", "on"))
    costs = [(figures.million_tokens_cost(each, prices), each) for each in cells]
    costs.sort(key=lambda pair: (pair[0] is None, pair[0] or 0.0))
    for cost, each in costs:
        energy = figures.million_tokens_kwh(each)
        if cost is not None or energy is not None:
            table.add_row(
                short(each), each.machine.chip if each.machine else "", _number(cost, ".4g"),
                _number(energy, ".3g"), "forecast" if each.status == FORECAST else "",
            )  # fmt: skip
    if table.row_count:
        console.print()
        console.print(table)


def _show_reasons(console: Console, each: Measured) -> None:
    """Print why a cell is not done, what is amiss with its exports and servers, and its notes."""
    if each.reason and each.status != DONE:
        console.print(f"{each.status}: {short(each)}: {each.reason}", soft_wrap=True)
    for made in each.exported:
        if made.reason:
            console.print(f"{made.format}: {short(each)}: {made.reason}", soft_wrap=True)
    for one in each.served:
        if one.reason:
            console.print(f"server of {one.target}: {short(each)}: {one.reason}", soft_wrap=True)
    for note in each.notes:
        console.print(f"note    {short(each)}: {note}", soft_wrap=True)


def _show_energy_reasons(console: Console, cells: Sequence[Measured]) -> None:
    """Print why energies are not known, once for all cells of one reason."""
    counted = Counter(each.energy_reason for each in cells if each.energy_reason)
    for reason, count in counted.items():
        console.print(f"energy  not known of {count} cells: {reason}", soft_wrap=True)


def show_cell(console: Console, each: Measured) -> None:
    """Print one cell as it has just been measured."""
    found = speed(each)
    if found is None:
        console.print(f"{short(each)}: {each.status}: {each.reason}", soft_wrap=True)
        return
    console.print(f"{short(each)}: {_spread(found)} tokens/s ({plan_words(each)})", soft_wrap=True)


def show_comparison(console: Console, found: Comparison) -> None:
    """Print what got worse, what else has changed, and what could not be compared."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(_CHANGES):
        table.add_column(heading, no_wrap=number >= _WRAPPED)
    notes = Counter(each.note for each in found.changes if each.note)
    for each in sorted(found.changes, key=lambda one: not one.worse):
        chip = each.cell.machine.chip if each.cell.machine else ""
        between = "" if each.low == each.high else f" ({each.low:.3f}–{each.high:.3f})"
        table.add_row(
            short(each.cell), chip, each.figure, each.old, each.new, f"{each.ratio:.3f}{between}",
            "WORSE" if each.worse else "",
        )  # fmt: skip
    console.print()
    console.print(table)
    for note, count in notes.items():
        console.print(f"note    {count} figures: {note}", soft_wrap=True)
    for words, cells in (("only before", found.only_old), ("only after", found.only_new)):
        if cells:
            console.print(f"{words}: {len(cells)} cells, such as {short(cells[0])}")
    console.print(f"{len(found.regressions)} figures got worse by more than the noise")
