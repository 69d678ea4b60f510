"""Which architectures of transformers does mst train? Each is tried, from a small random model.

    python -m benchmarks.model_coverage --output results.jsonl [--only NAME …] [--jobs N]

One JSON line an architecture, with each step's outcome; the last line has the shares. A file that
is there already is gone on with. With --families, writes what was learnt about their files' names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import logging
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
import traceback
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.shrunken import FIRST, SECOND, TEXT_IDS, shrunken
from mst.configuration import Configuration
from mst.data.encode import Example
from mst.data.rows import Row
from mst.memory import StepShape, forecast
from mst.model.facts import ModelFacts, on_disk
from mst.model.families import Family, header_facts, learn, missing_keys_that_matter
from mst.model.files import read_config, read_header, weight_files
from mst.model.sizes import Sizes, text_part
from mst.model.structure import (
    NOT_QUANTIZED,
    adaptable,
    auto_class,
    build_on_meta,
    config_sizes,
    describe,
)
from mst.request import TrainRequest
from mst.training.adapters import (
    load_model,
    lora_config,
    merge_and_unload,
    prepare_model,
    trained_parameters,
)
from mst.training.batches import Batch, collate
from mst.training.loss import accepts, logits_of, summed_loss
from mst.training.optimizers import make_optimizer

STEPS = ("build", "facts", "forecast", "lora", "merge", "reload", "qlora", "full")
SECONDS = 90
CPU = torch.device("cpu")
# Keys that hub files often leave out; what then holds is compared with transformers'.
OPTIONAL = (
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "n_inner",
    "num_experts_per_tok", "num_local_experts", "num_experts", "n_positions", "n_routed_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One architecture: its mapping ("causal" or "image-text"), model_type and class."""

    group: str
    model_type: str
    class_name: str


def cases() -> list[Case]:
    """Return every architecture that transformers registers in the two mappings."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [
        Case(group, kind, str(name))
        for group, mapping in (("causal", causal), ("image-text", image))
        for kind, name in mapping.items()
    ]


class _Trial:
    """The steps of one architecture; each leaves in `self` what the next ones use."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.root = root
        self.family: Family | None = None
        self.headers = ""
        self.request = TrainRequest(lora_rank=4)

    def _new_model(self, scale: Any, where: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        config = shrunken(CONFIG_MAPPING[self.case.model_type], scale)
        for each in (config, config.get_text_config(decoder=True)):
            if hasattr(each, "is_decoder"):
                each.is_decoder = True  # BERT and its kin look both ways otherwise
        torch.manual_seed(0)
        causal = self.case.group == "causal"
        auto: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        model = auto.from_config(config)
        model.save_pretrained(where)
        if model.config.model_type != config.model_type:  # the text part of a larger model
            config.save_pretrained(where)

    def build(self) -> None:
        self._new_model(FIRST, self.root / "first")
        self.directory = self.root / "first"

    def _load(self, directory: Path, quantization: str = "none") -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        auto = auto_class(AutoConfig.from_pretrained(directory))
        if auto is AutoModelForCausalLM and self.case.group == "causal":
            more: dict[str, Any] = {"quantization": quantization} if quantization != "none" else {}
            if not more or "quantization" in inspect.signature(load_model).parameters:
                return load_model(directory, "float32", "sdpa", CPU, **more)
        return _loaded_here(directory, self.case.group, quantization)

    def facts(self) -> None:
        self.traced = (
            describe(build_on_meta(self.directory))
            if self.case.group == "causal"
            else (describe(self._load(self.directory)))
        )
        model = self._load(self.directory)
        count = sum(each.numel() for each in model.parameters())
        self.facts_found = replace(self.traced.facts, **on_disk(_headers(self.directory)))
        _require(self.traced.facts.parameters == count, "the trace counts other weights")
        _require(self.traced.facts.linears != (), "no linear layer can be adapted")
        self._compare_headers()

    def _compare_headers(self) -> None:
        """Learn from one model what its tensors are, and see whether that holds for another."""
        config = read_config(self.directory)
        family = learn(
            self.traced.facts.architecture,
            self.traced.kinds,
            _headers(self.directory),
            self.traced.buffers,
            _ties_by_default(config),
            _needed(config),
        )
        self.headers = "equal"
        for scale, name in ((FIRST, "first"), (SECOND, "second")):
            directory = self.root / name
            try:
                if name == "second":
                    self._new_model(scale, directory)
                truth = describe(
                    build_on_meta(directory)
                    if self.case.group == "causal"
                    else self._load(directory)
                ).facts
            except Exception as error:
                self.headers = f"{name} model: {_reason(error)}"
                return
            found = header_facts(family, read_config(directory), _headers(directory))
            if found is None:
                self.headers = f"{name} model: tensors of unknown names"
                return
            if different := _differences(found, truth):
                self.headers = f"{name} model: {', '.join(different)}"
                return
        self.family = family

    def forecast(self) -> None:
        for tuner, quantization in (("lora", "none"), ("qlora", "nf4"), ("full", "none")):
            configuration = Configuration(tuner=tuner, quantization=quantization)
            peak = forecast(self.facts_found, configuration, StepShape(64, 16), None).peak_bytes
            _require(peak > 0, f"{tuner}: a forecast of {peak} bytes")

    def _step(self, model: Any) -> None:
        """Take one step with the project's own loss and optimizer; the weights must have moved."""
        optimizer = make_optimizer(model, self.request, 1e-2)
        before = [each.detach().clone() for _, each in trained_parameters(model)]
        batch = _batch()
        loss = summed_loss(model, batch, logits_of(model)) / batch.label_tokens
        _require(bool(torch.isfinite(loss)), f"the loss is {float(loss)}")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after = [each for _, each in trained_parameters(model)]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        finite = all(bool(torch.isfinite(each).all()) for each in after)
        _require(any(moved), "no weight has changed")
        _require(finite, "a weight is not finite after the step")

    def _adapted(self, quantization: str = "none") -> Any:
        model = self._load(self.directory, quantization)
        names = tuple(each.name for each in self.traced.facts.linears)
        _require(quantization != "none" or adaptable(model) == names, "other modules than traced")
        config = lora_config(replace(self.request, target_modules=names))
        return prepare_model(model, config)

    def lora(self) -> None:
        self.tuned = self._adapted()
        self._step(self.tuned)

    def merge(self) -> None:
        self.tuned.eval()
        before = _logits(self.tuned)
        self.merged: Any = merge_and_unload(self.tuned)
        _same(before, _logits(self.merged), "merging")

    def reload(self) -> None:
        expected = _logits(self.merged)
        self.merged.save_pretrained(self.root / "merged")
        again = self._load(self.root / "merged").eval()
        _same(expected, _logits(again), "saving and loading")

    def qlora(self) -> None:
        self._step(self._adapted("nf4"))

    def full(self) -> None:
        self._step(prepare_model(self._load(self.directory)))


def _loaded_here(directory: Path, group: str, quantization: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    untyped: Any = BitsAndBytesConfig
    auto: Any = AutoModelForCausalLM if group == "causal" else AutoModelForImageTextToText
    more: dict[str, Any] = {}
    if quantization == "nf4":
        kind = read_config(directory)["model_type"]
        skipped = NOT_QUANTIZED.get(kind, ())
        more["quantization_config"] = untyped(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=[*skipped, "lm_head"] if skipped else None,
        )
    return auto.from_pretrained(directory, dtype=torch.float32, local_files_only=True, **more)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _headers(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in weight_files(directory):
        found |= read_header(path)
    return found


def _without(config: dict[str, Any], key: str) -> Any:
    """Return the configuration that transformers reads when a key is left out of config.json."""
    from transformers import AutoConfig

    plain = json.loads(json.dumps(config))
    text_part(plain).pop(key, None)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(plain))
        return AutoConfig.from_pretrained(folder).get_text_config(decoder=True)


def _ties_by_default(config: dict[str, Any]) -> bool:
    return bool(getattr(_without(config, "tie_word_embeddings"), "tie_word_embeddings", False))


def _needed(config: dict[str, Any]) -> tuple[str, ...]:
    truths: dict[str, Sizes] = {}
    broken = []
    for key in OPTIONAL:
        if key in text_part(config):
            try:
                text = _without(config, key)
            except Exception:
                broken.append(key)  # the class refuses it without
                continue
            truths[key] = config_sizes(text)
    return tuple(sorted({*broken, *missing_keys_that_matter(config, truths)}))


def _differences(found: ModelFacts, truth: ModelFacts) -> list[str]:
    ignored = ("path", "source", "weight_bytes", "dtype")
    these, those = asdict(found), asdict(truth)
    for each in (these, those):
        each["linears"] = sorted(each["linears"], key=lambda one: one["name"])
    return [key for key in these if key not in ignored and these[key] != those[key]]


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (24, 17):
        ids = torch.randint(10, TEXT_IDS, (length,), generator=generator).tolist()
        labels = array("i", [-100] * 4 + ids[4:])
        rows.append(Example(array("i", ids), labels, Row((), "", 1)))
    return collate(rows, 0, "padded")


def _logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, TEXT_IDS, (2, 16), generator=generator)
    no_cache = {"use_cache": False} if accepts(model, "use_cache") else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **no_cache).logits.float()
    return found


def _same(before: torch.Tensor, after: torch.Tensor, what: str) -> None:
    largest = float((before - after).abs().max())
    scale = max(1.0, float(before.abs().max()))
    _require(largest <= 1e-4 * scale, f"{what} changed a logit by {largest:.2g} (of {scale:.2g})")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}"


# What can't be tried once another step has failed.
_NEEDS = {
    "build": (), "facts": ("build",), "forecast": ("facts",), "lora": ("facts",),
    "merge": ("lora",), "reload": ("merge",), "qlora": ("facts",), "full": ("build",),
}  # fmt: skip


def try_case(case: Case, trace: bool = False) -> dict[str, Any]:
    """Return one architecture's line: "ok" or the failure's reason for every step."""
    began = time.perf_counter()
    outcome: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(case, Path(folder))
        for step in STEPS:
            missing = [each for each in _NEEDS[step] if outcome[each] != "ok"]
            if missing:
                outcome[step] = f"not reached: {missing[0]} failed"
                continue
            try:
                getattr(trial, step)()
                outcome[step] = "ok"
            except Exception as error:
                outcome[step] = _reason(error)
                if trace:
                    traceback.print_exc()
    line: dict[str, Any] = asdict(case)
    line["passed"] = all(each == "ok" for each in outcome.values())
    line["steps"] = outcome
    line["headers"] = trial.headers
    line["seconds"] = round(time.perf_counter() - began, 1)
    if trial.family is not None:
        line["family"] = asdict(trial.family)
    return line


def _child(case: Case, pipe: Any, trace: bool) -> None:
    _quiet()
    try:
        pipe.send(try_case(case, trace))
    finally:
        pipe.close()


def _quiet() -> None:
    from transformers.utils import logging as hf_logging

    untyped: Any = hf_logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def sweep(chosen: Sequence[Case], jobs: int, done: Callable[[dict[str, Any]], None],
          trace: bool = False) -> None:  # fmt: skip
    """Try each case in a process of its own, forked from this one so that imports are paid once."""
    _preload()
    context = multiprocessing.get_context("fork")
    waiting = list(chosen)
    running: dict[Any, tuple[Case, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(case, theirs, trace))
            process.start()
            theirs.close()
            running[mine] = (case, process, time.monotonic())
        ready: list[Any] = list(multiprocessing.connection.wait(list(running), timeout=1))
        for pipe in ready:
            case, process, _ = running.pop(pipe)
            try:
                line = pipe.recv()
            except EOFError:
                process.join()
                line = _lost(case, f"the process ended with code {process.exitcode}")
            process.join()
            done(line)
        for pipe, (case, process, began) in list(running.items()):
            if time.monotonic() - began > SECONDS:
                process.kill()
                process.join()
                del running[pipe]
                done(_lost(case, f"not done after {SECONDS} s"))


def _lost(case: Case, why: str) -> dict[str, Any]:
    steps = dict.fromkeys(STEPS, why)
    return {**asdict(case), "passed": False, "steps": steps, "headers": "", "seconds": 0.0}


def _preload() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last line: shares that pass, in all and by step, for each mapping."""
    found: dict[str, Any] = {
        "versions": {
            each: importlib.metadata.version(each)
            for each in ("torch", "transformers", "peft", "bitsandbytes")
        },
        "headers_equal": sum(each["headers"] == "equal" for each in lines),
    }
    for group in ("causal", "image-text"):
        own = [each for each in lines if each["group"] == group]
        if own:
            found[group] = {
                "architectures": len(own),
                "passed": sum(each["passed"] for each in own),
                "share": round(sum(each["passed"] for each in own) / len(own), 4),
                "steps": {
                    step: round(sum(each["steps"][step] == "ok" for each in own) / len(own), 4)
                    for step in STEPS
                },
            }
    return {"summary": found}


def families(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the contents of families.json: the causal architectures whose headers were right."""
    return {
        each["model_type"]: each["family"]
        for each in sorted(lines, key=lambda one: str(one["model_type"]))
        if each["group"] == "causal" and "family" in each and each["steps"]["facts"] == "ok"
    }


def main() -> int:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="model types")
    parser.add_argument("--group", choices=("causal", "image-text"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--families", type=Path)
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    work = options.output.with_suffix(".part")
    lines = [json.loads(each) for each in work.read_text().splitlines()] if work.is_file() else []
    seen = {(each["group"], each["model_type"]) for each in lines}
    chosen = [
        each
        for each in cases()
        if (each.group, each.model_type) not in seen
        and (not options.only or each.model_type in options.only)
        and options.group in (None, each.group)
    ]

    def done(line: dict[str, Any]) -> None:
        lines.append(line)
        with work.open("a") as file:
            file.write(json.dumps(line) + "\n")
        bad = {step: why for step, why in line["steps"].items() if why != "ok"}
        print(line["group"], line["model_type"], line["seconds"], bad or "ok", line["headers"],
              file=sys.stderr, flush=True)  # fmt: skip

    sweep(chosen, options.jobs, done, options.trace)
    order = {(each.group, each.model_type): i for i, each in enumerate(cases())}
    lines.sort(key=lambda line: order[line["group"], line["model_type"]])
    if options.families:
        compact = (
            f" {json.dumps(name)}: {json.dumps(each, separators=(',', ':'))}"
            for name, each in families(lines).items()
        )
        options.families.write_text("{\n" + ",\n".join(compact) + "\n}\n")
    with options.output.open("w") as file:
        for line in [*lines, summary(lines)]:
            file.write(json.dumps({k: v for k, v in line.items() if k != "family"}) + "\n")
    print(json.dumps(summary(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
