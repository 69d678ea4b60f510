"""The usual peak learning rate, for the method and the objective, where none was asked for."""

from __future__ import annotations

from mst.workload import DataFacts

# LoRA wants about ten times the rate of full tuning (Schulman et al. 2025, "LoRA Without Regret").
LIKELIHOOD = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
# Preferences start from a model that is good already. TRL 1.16 has 1e-6 for DPO, KTO, ORPO and CPO,
# and its own DPO script ten times the rate with LoRA.
PREFERENCE = {"lora": 1e-5, "qlora": 1e-5, "full": 1e-6}
# A reward model has a new head: TRL's RewardTrainer has 1e-4.
REWARD = {"lora": 1e-4, "qlora": 1e-4, "full": 1e-5}


def usual_rate(data: DataFacts, tuner: str) -> float:
    """Return the usual peak.

    Args:
        data: knows what the objective asks for.
        tuner: "lora", "qlora" or "full".
    """
    if data.objective.scores:
        return REWARD[tuner]
    compares = data.objective.reference or data.sequences > 1
    return (PREFERENCE if compares else LIKELIHOOD)[tuner]
