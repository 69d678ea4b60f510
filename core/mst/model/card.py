"""The model card of a merged model: where it came from and what was measured; never a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mst.rundir import RunManifest

if TYPE_CHECKING:
    from mst.merge import MergeReport
    from mst.plan import Plan, PrivacyBudget
    from mst.request import TrainRequest

_KINDS = {"nf4": "NF4 (double-quantized)", "int8": "int8"}
# In the order of the card; other figures of a run are of no interest to who loads the model.
_FIGURES = {
    "accuracy_before_restricted": ("accuracy before, best of the answers", "{:.1%}"),
    "accuracy_after_restricted": ("accuracy after, best of the answers", "{:.1%}"),
    "accuracy_before_free": ("accuracy before, free generation", "{:.1%}"),
    "accuracy_after_free": ("accuracy after, free generation", "{:.1%}"),
    "accuracy_baseline": ("accuracy of TF-IDF + logistic regression", "{:.1%}"),
    "accuracy_rows": ("held-out rows asked", "{:.0f}"),
    "best_eval_loss": ("best held-out loss", "{:.4f}"),
    "best_eval_reward": ("best mean reward, held out", "{:.4f}"),
    "steps": ("optimizer steps", "{:.0f}"),
    "tokens": ("tokens trained on", "{:.0f}"),
}


def model_card(
    report: MergeReport, manifest: RunManifest, request: TrainRequest, plan: Plan
) -> str:
    """Return the README.md of a merged model.

    Data files are named by their hashes alone: a card is often passed on, and a file's name can
    say whose records it holds.
    """
    method = "all weights"
    if plan.tuner != "full":
        method = f"LoRA, rank {request.lora_rank}, alpha {request.lora_alpha:g}, merged"
    if plan.quantization != "none":
        kind = _KINDS[plan.quantization]
        method = f"Q{method} into the base's weights in {kind}, dequantized"
    facts = {
        "base model": f"{manifest.model} (fingerprint `{manifest.model_sha256}`)",
        "tuned": method,
        "learning rate": f"{plan.learning_rate:g}, {request.lr_scheduler_type}",
        "longest row": f"{plan.max_length} tokens",
        "run": f"`{report.run}`, step {report.step}, begun {manifest.created}",
        "weights": f"{report.dtype}, safetensors",
        "made by": f"mst {report.mst_version}, {_listed(manifest.versions)}",
    }
    if manifest.privacy is not None:
        facts["differential privacy"] = _privacy(manifest.privacy)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {Path(manifest.model).name}, tuned with MST",
        "The licence of the base model holds for this one too.",
        "## Provenance\n\n" + _table(facts),
        "## Training data\n\n" + _data(manifest),
        "## Figures of the run, at its end\n\n" + _table(_results(manifest.results)),
        "## Merge\n\n" + _merge(report),
    ]
    return "\n\n".join(parts) + "\n"


def _privacy(budget: PrivacyBudget) -> str:
    return (
        f"of the tuned weights, for each {budget.unit}: ε = {budget.epsilon:.3f} at"
        f" δ = {budget.delta:.2g} (experimental; {budget.accountant})"
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {rows[name]} |" for name in rows)])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _data(manifest: RunManifest) -> str:
    lines = ["| use | rows | SHA-256 |", "|---|---|---|"]
    for use, files in (("training", manifest.data), ("held out", manifest.val_data)):
        lines += [f"| {use} | {each.rows} | `{each.sha256}` |" for each in files]
    return "\n".join(lines)


def _results(results: Mapping[str, float]) -> dict[str, str]:
    return {
        words: form.format(results[name])
        for name, (words, form) in _FIGURES.items()
        if name in results
    }


def _merge(report: MergeReport) -> str:
    merged, stored = report.merged, report.stored
    return (
        f"Logits of the merged model were compared with those of its source after"
        f" {merged.positions} random tokens. Both in float32: the same most likely token at"
        f" {merged.argmax_agreement:.2%}, largest difference {merged.max_abs_difference:.2g}."
        f" As stored, in {report.dtype}: {stored.argmax_agreement:.2%},"
        f" {stored.max_abs_difference:.2g}."
    )
