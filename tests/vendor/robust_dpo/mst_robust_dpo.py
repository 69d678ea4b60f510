"""An objective that mst does not have: what a package looks like that adds one."""

from mst.hookspecs import hookimpl
from mst.objective import Micro, Objective, Part, sequence_sums
from mst.request import TrainRequest


@hookimpl
def mst_objective_name() -> str:
    return "robust-dpo"


@hookimpl
def mst_objective(request: TrainRequest) -> Objective:
    beta, flipped = request.beta or 0.1, request.label_smoothing

    def loss(micro: Micro) -> Part:
        # Chowdhury et al. 2024, "Provably Robust DPO", equation 12.
        import torch.nn.functional as functional

        assert micro.reference is not None
        ratios = sequence_sums(micro.policy) - sequence_sums(micro.reference)
        margins = beta * (ratios[0::2] - ratios[1::2])
        clean = -functional.logsigmoid(margins) * (1 - flipped)
        wrong = functional.logsigmoid(-margins) * flipped
        losses = (clean + wrong) / (1 - 2 * flipped)
        pairs = micro.totals["pairs"]
        return Part(losses.sum() / pairs, {"rewards/margins": margins.detach().sum() / pairs})

    return Objective(
        name="robust-dpo",
        lacks=lambda row: "" if row.rejected else "has no worse answer: pass --task sft",
        counts=lambda example: {"pairs": 1.0},
        loss=loss,
        sequences=lambda example: (example, example.rejected) if example.rejected else (example,),
        usable=lambda example: example.rejected is not None,
        reference=True,
    )
