"""Run as `python -m mst.merge_worker JOB [KEYS]`: merge, cast, write, reload and compare."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mst
from mst import rundir, serial
from mst.data.rows import Message
from mst.data.template import ChatTemplate, load_template, render
from mst.data.tokens import TOKENIZER_FILES, TextTokenizer, load_tokenizer
from mst.durable import why_unwritten
from mst.errors import Interrupted, ModelError, RunError
from mst.extensions import hide_extensions, hide_packages
from mst.merge import REPORT, Agreement, MergeJob, MergeReport
from mst.model.card import model_card
from mst.model.processor import PROCESSOR_FILES
from mst.plan import Plan
from mst.request import TrainRequest
from mst.seal.keys.ring import NO_KEYS, KeyRing, inherited
from mst.seal.supply.bill import write_bill
from mst.training.adapters import load_model, merge_and_unload
from mst.training.checkpoint import write_weights
from mst.training.quantization import compute_in_float32
from mst.training.sealed_directory import empty, seal
from mst.tuned import load, load_dequantized
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    import torch

# SmolLM2-135M in float32: 100 % of the positions agree, logits differ by 5e-5 at most. With a base
# in NF4 or int8, too: dequantizing is exact in float32, so that such a merge rounds no more.
FLOAT32_AGREEMENT = 0.999
# Written and read again, the weights are bitwise the same; kernels may still round differently.
RELOADED_AGREEMENT = 0.99
_SEQUENCES, _LENGTH = 16, 64


def work(job: MergeJob, keys: KeyRing = NO_KEYS) -> None:
    """Write the merged model to the job's output directory, or leave nothing.

    Raises:
        MstError: it can't be read or written, or it does not agree with its source.
        Interrupted: the user stopped it.
    """
    from safetensors import SafetensorError

    target = Path(job.output_dir)
    part = target.with_name(f".{target.name}.part")
    try:
        empty(part)
        _fill(part, job, keys)
        seal(part, target, NO_KEYS)
    except (OSError, SafetensorError) as error:
        reason = why_unwritten(error) or getattr(error, "strerror", None) or str(error)[:200]
        raise RunError(
            f"cannot write {job.output_dir}: {reason}. Nothing was left there. Free some space, or"
            " pass another --output-dir."
        ) from None
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(directory: Path, job: MergeJob, keys: KeyRing) -> None:
    import torch

    torch.set_num_threads(job.threads)
    device = torch.device("cpu")
    source, tokenizer_dir = job.source, Path(job.source.tokenizer)
    tokenizer = load_tokenizer(tokenizer_dir)
    template = load_template(tokenizer_dir, source.template)
    tokens = _tokens(tokenizer)
    model, before, after = _merged(job, tokens, keys)
    merged = compare(before, after)
    _check(merged, FLOAT32_AGREEMENT, "the merged model", "its source, both in float32")
    # Not `model.to`: it would round buffers too, such as the rotary frequencies, which stay
    # float32 when the model is loaded again.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, job.dtype))
    cast = logits(model, tokens)
    _set_stop_tokens(model, template, tokenizer)
    write_weights(model, directory)
    _copy_tokenizer(tokenizer_dir, directory, template)
    del model
    reloaded = logits(load_model(directory, job.dtype, job.attention, device), tokens)
    _check(compare(cast, reloaded), RELOADED_AGREEMENT, "the written model", "the one in memory")
    _describe(directory, job, merged, compare(before, reloaded))


def _merged(
    job: MergeJob, tokens: torch.Tensor, keys: KeyRing
) -> tuple[torch.nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """Return the merged model in float32, and the logits before and after merging.

    An adapter that was trained on quantized weights is added into what those weights hold, not
    into the original ones: it has learnt to make up for their rounding too. After 60
    steps of the demo (SmolLM2-135M, NF4) the held-out loss was 0.0301 before the merge, 0.0298 so,
    and 0.0430 with the original weights (benchmarks/qlora_quality.py).
    """
    import torch

    cpu = torch.device("cpu")
    model = load(job.source, "float32", job.attention, cpu, keys)
    if job.source.quantization != "none":
        compute_in_float32(model)
    before = logits(model, tokens)
    if job.source.adapter is None:
        return model, before, before
    if job.source.quantization != "none":
        del model
        model = load_dequantized(job.source, job.attention, cpu, keys=keys)
    model = merge_and_unload(model)
    return model, before, logits(model, tokens)


def _tokens(tokenizer: TextTokenizer) -> torch.Tensor:
    """Return token ids (sequences, length) drawn evenly from the vocabulary: no text is needed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(tokenizer.vocab_size, (_SEQUENCES, _LENGTH), generator=generator)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return the float32 logits (length, vocabulary) of each sequence."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=row[None], use_cache=False).logits[0].float() for row in tokens]


def compare(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> Agreement:
    """Return how far logits agree; a model that answers NaN agrees with nothing."""
    pairs = list(zip(these, those, strict=True))
    positions = sum(len(each) for each in these)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs if b.isfinite().all())
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    finite = all(bool(b.isfinite().all()) for _, b in pairs)
    return Agreement(positions, largest if finite else math.inf, same / positions)


def _check(found: Agreement, at_least: float, what: str, other: str) -> None:
    if found.argmax_agreement < at_least or not math.isfinite(found.max_abs_difference):
        raise ModelError(
            f"{what} does not agree with {other}: the same most likely token at"
            f" {found.argmax_agreement:.2%} of {found.positions} positions (needed {at_least:.1%}),"
            f" largest difference of a logit {found.max_abs_difference:.3g}. Nothing was written."
            " Try --dtype float32; if that fails too, please report the model's architecture."
        )


def turn_end(template: ChatTemplate, tokenizer: TextTokenizer) -> int | None:
    """Return the special token that the template puts after an answer, or None."""
    answer = "okay"
    text = render(template, (Message("user", "hello"), Message("assistant", answer)))
    end = text.rindex(answer) + len(answer)
    encoded = tokenizer.encode(text)
    special = {
        token
        for token, added in tokenizer.tokenizer.get_added_tokens_decoder().items()
        if added.special or token in tokenizer.eos_token_ids
    }
    found = zip(encoded.ids, encoded.offsets, strict=True)
    return next((token for token, (start, _) in found if start >= end and token in special), None)


def _set_stop_tokens(
    model: torch.nn.Module, template: ChatTemplate, tokenizer: TextTokenizer
) -> None:
    """Let the model stop where its answers were trained to end, beside where it stopped before."""
    whole: Any = model
    known = whole.generation_config.eos_token_id
    before = known if isinstance(known, list) else [] if known is None else [known]
    end = turn_end(template, tokenizer)
    stop = [*before, *([] if end is None or end in before else [end])] or tokenizer.eos_token_ids[
        :1
    ]
    whole.generation_config.eos_token_id = stop[0] if len(stop) == 1 else list(stop)


def _copy_tokenizer(source: Path, directory: Path, template: ChatTemplate) -> None:
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    # Written even where it is also in tokenizer_config.json, or is our own for a model that has
    # none: the prompts must stay those of the training.
    (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def _describe(directory: Path, job: MergeJob, merged: Agreement, stored: Agreement) -> None:
    run = Path(job.run)
    manifest = rundir.read_manifest(run)
    report = MergeReport(
        mst_version=mst.__version__,
        created=rundir.now(),
        run=run.name,
        model=manifest.model,
        model_sha256=manifest.model_sha256,
        step=job.source.step,
        dtype=job.dtype,
        base=job.source.quantization,
        data_sha256=tuple(each.sha256 for each in manifest.data),
        merged=merged,
        stored=stored,
    )
    (directory / REPORT).write_text(serial.dumps(report), encoding="utf-8")
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    (directory / "README.md").write_text(
        model_card(report, manifest, request, plan), encoding="utf-8"
    )
    adapter = None if job.source.adapter is None else Path(job.source.adapter)
    base = None if adapter is None else Path(job.source.weights)
    name = f"{Path(manifest.model).name}, tuned with MST"
    write_bill(directory, name, job.source.step, base, adapter, manifest, request, plan)


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    stop = StopAsked()
    hide_extensions()
    job = serial.from_json(MergeJob, json.loads(argv[0]))
    hide_packages(keep=() if job.source.quantization == "none" else ("bitsandbytes",))
    keys = inherited(int(argv[1]) if len(argv) > 1 else None)
    return guarded(lambda: work(job, keys), stop=stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
