"""A global batch as one rank's micro-batches, and their passes through the model.

What is summed over a step is summed over ranks too, so none of it depends on how the step was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, SupportsFloat

from mst.data.encode import Example
from mst.objective import Micro, Objective, Part, Passes, Scored, sequence_means, totals
from mst.training import parallel
from mst.training.loss import compute_in
from mst.training.order import Arrange
from mst.training.prefixes import beginnings
from mst.training.reference import reference_scores
from mst.training.sampling import sampled, text_of
from mst.training.scoring import Laid, lay_out, scored
from mst.training.shared_lines import kindred_shares

if TYPE_CHECKING:
    import torch

    from mst.training.session import Session

# Beside the metrics' names in what is summed up.
LOSS = "loss"
TOKENS = "tokens read"
Items = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Share:
    """This rank's share of a global batch.

    Attributes:
        step: all rows of the global batch, in their order.
        micros: places in `step` of each micro-batch's rows, block by block with `--packing`, else
            row by row.
        own: how many micro-batches count; the others only keep DeepSpeed's ranks in step.
        everyone: every rank has one that counts.
    """

    step: Sequence[Example] = field(repr=False)
    micros: Sequence[Items]
    own: int
    everyone: bool = True


def share_of(session: Session, step: Sequence[Example], every: Sequence[Items]) -> Share:
    """Return this rank's micro-batches of a global batch.

    DeepSpeed wants as many passes of every rank: those with fewer rows repeat some of another's,
    which count for nothing.

    Args:
        session: has this rank's place.
        step: its rows.
        every: the micro-batches of all ranks, as `Share.micros`.
    """
    group = session.group
    mine = list(every[group.rank :: group.world_size])
    own = len(mine)
    if session.zero is not None:
        mine += [every[0]] * (-(-len(every) // group.world_size) - own)
    return Share(step, mine, own, len(every) >= group.world_size)


def kindred(rows: Sequence[Example], objective: Objective) -> Arrange:
    """Return how rows that share their beginnings meet.

    Args:
        rows: that are trained on.
        objective: says which sequences of a row the model reads.
    """

    def arranged(chosen: Sequence[tuple[int, ...]], most: int) -> list[list[int]]:
        read = objective.sequences
        parts = [[one for row in item for one in read(rows[row])] for item in chosen]
        sequences = [one.input_ids for each in parts for one in each]
        numbers = iter(range(len(sequences)))
        of_rows = [[next(numbers) for _ in each] for each in parts]
        return kindred_shares(of_rows, list(map(len, sequences)), beginnings(sequences), most)

    return arranged


def _laid(
    session: Session, sequences: Sequence[Example], lines: Sequence[Sequence[int]] | None = None
) -> Laid:
    laid = lay_out(
        sequences, session.pad_token_id, session.layout, lines, session.processor, session.shares
    )
    return laid.to(session.device)


def block_lines(
    objective: Objective, examples: Sequence[Example], blocks: Sequence[int]
) -> list[list[int]]:
    """Return which sequences lie in each line where every block of rows has one of its own.

    Args:
        objective: says which sequences of a row the model reads.
        examples: rows of all blocks, block by block.
        blocks: how many rows each has.
    """
    read = [len(objective.sequences(each)) for each in examples]
    counts, numbers = iter(read), iter(range(sum(read)))
    return [list(islice(numbers, sum(islice(counts, rows)))) for rows in blocks]


def _own_lines(
    session: Session, examples: Sequence[Example], blocks: Sequence[int]
) -> list[list[int]] | None:
    """Return `block_lines` where blocks have lines of their own."""
    if (
        session.sizes.block is None
        or session.layout not in ("lines", "alike")
        or sum(blocks) != len(examples)
    ):
        return None
    return block_lines(session.objective, examples, blocks)


def _scored(session: Session, laid: Laid) -> Scored:
    with compute_in(session.model, session.device.type, session.dtype):
        return scored(
            session.model,
            laid,
            session.logits,
            session.objective.scores,
            session.objective.temperature,
        )


@dataclass(frozen=True)
class Ready:
    """A micro-batch whose gradients come next: its rows, and how many of them fill each block."""

    examples: Sequence[Example] = field(repr=False)
    blocks: Sequence[int] = ()


def preludes(session: Session, share: Share, step: int) -> tuple[list[Ready], dict[str, float]]:
    """Return what each micro-batch's gradients are taken of, and this rank's sums from before.

    No rank waits for another in here, so that one may run out of memory.

    Args:
        session: model, objective, reference.
        share: this rank's micro-batches.
        step: optimizer steps taken before.
    """
    import torch

    before = session.objective.before
    if before is None:
        return [
            Ready([share.step[i] for item in items for i in item], [len(item) for item in items])
            for items in share.micros
        ], {}

    def score(sequences: Sequence[Example]) -> tuple[Scored, Scored | None]:
        laid = _laid(session, sequences)
        with torch.no_grad():
            reference = None
            if session.reference is not None:
                reference = reference_scores(session, sequences, laid)
            return _scored(session, laid), reference

    passes = Passes(
        session.model, score, partial(sampled, session), partial(text_of, session), step
    )
    found = [
        before(share.step, [i for item in items for i in item], passes) for items in share.micros
    ]
    sums: dict[str, float] = {}
    for each in found[: share.own]:
        add(sums, each.sums)
    blocks = [[len(item) for item in items] for items in share.micros]
    return [Ready(each.examples, own) for each, own in zip(found, blocks, strict=True)], sums


def counted(session: Session, share: Share, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the totals of the global batch: its counts, and all ranks' sums.

    Every rank knows all rows, so only the sums are talked about.
    """
    return totals(session.objective, share.step) | summed_names(session, share, sums)


def summed_names(session: Session, share: Share, values: Mapping[str, float]) -> dict[str, float]:
    """Return named values summed over all ranks; a rank without rows has no names."""
    if session.group.world_size == 1:
        return dict(values)
    names = sorted(values) if share.everyone else parallel.all_names(session.group, values)
    found = parallel.summed(session.group, [values.get(name, 0.0) for name in names])
    return dict(zip(names, found, strict=True))


def part_of(session: Session, ready: Ready, known: Mapping[str, float]) -> Part:
    """Return the part of a micro-batch in the global batch's loss and metrics.

    Among the metrics is the number of tokens that the model read, padding not counted.

    Args:
        session: model, objective, reference.
        ready: the micro-batch.
        known: the global batch's totals.
    """
    examples = ready.examples
    sequences = [part for each in examples for part in session.objective.sequences(each)]
    laid = _laid(session, sequences, _own_lines(session, examples, ready.blocks))
    # First: it leaves nothing behind, while the policy's pass keeps all that gradients need.
    reference = None
    if session.reference is not None:
        reference = reference_scores(session, examples, laid)
    policy = _scored(session, laid)
    part = session.objective.loss(Micro(examples, policy, reference, known))
    tokens = policy.log_probs.new_tensor(sum(len(each.input_ids) for each in sequences))
    return Part(part.loss, {**part.metrics, TOKENS: tokens})


def row_losses(session: Session, examples: Sequence[Example]) -> torch.Tensor:
    """Return each row's mean loss over its labelled tokens, (rows,), with its graph."""
    return -sequence_means(_scored(session, _laid(session, examples)))


def add(sums: dict[str, float], values: Mapping[str, SupportsFloat]) -> None:
    """Add named values to sums."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + float(value)
