"""Run as `python -m mst.chat_worker JOB [KEYS]`: load a model and talk; write nothing to disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst import serial
from mst.chat import ChatJob
from mst.chat_terminal import ask_once, converse, edit_lines
from mst.data.rows import Message
from mst.data.template import ChatTemplate, load_template, render
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.errors import DataError, Interrupted
from mst.extensions import NOT_FOR_ANSWERS, hide_packages
from mst.generate import as_text, generate
from mst.seal.keys.ring import NO_KEYS, KeyRing, inherited
from mst.tuned import load, load_dequantized
from mst.worker_process import die_with_parent, guarded

if TYPE_CHECKING:
    import torch


class Talker:
    """A loaded model that answers conversations."""

    def __init__(self, job: ChatJob, keys: KeyRing = NO_KEYS) -> None:
        """Load the model onto the job's device; `keys` are the user's, for an encrypted run."""
        from mst.probe import activate
        from mst.registry import load as load_plugins

        activate(load_plugins(), job.backend)
        import torch

        device = torch.device(job.torch_device)
        if device.type == "cpu":
            torch.set_num_threads(job.threads)
        directory = Path(job.model.tokenizer)
        self._job = job
        self._tokenizer: TextTokenizer = load_tokenizer(directory)
        self._template: ChatTemplate = load_template(directory, job.model.template)
        self._model: torch.nn.Module = (
            load_dequantized(job.model, job.attention, device, job.dtype, keys)
            if job.dequantized
            else load(job.model, job.dtype, job.attention, device, keys)
        )

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the next answer's text as it comes.

        Raises:
            DataError: the conversation is longer than the model's context, or its template
                refuses it.
        """
        import torch

        from mst.training.loss import compute_in

        job, text = self._job, render(self._template, messages, add_generation_prompt=True)
        prompt = self._tokenizer.encode(text).ids
        room = job.sampling.max_new_tokens
        if job.context is not None:
            room = min(room, job.context - len(prompt))
        if room < 1:
            raise DataError(
                f"the conversation has {len(prompt)} tokens, and the model reads {job.context} at"
                " most. Begin a shorter one: /reset."
            )
        sampling = replace(job.sampling, max_new_tokens=room)
        # Only an adapter's float32 weights need casting on the way.
        dtype = torch.float32 if job.model.adapter is None else getattr(torch, job.dtype)
        device_type = torch.device(job.torch_device).type
        stop = self._tokenizer.eos_token_ids
        with compute_in(self._model, device_type, dtype):
            ids = generate(self._model, prompt, stop, sampling)
            yield from as_text(self._tokenizer.tokenizer, ids)


def ask(job: ChatJob, keys: KeyRing = NO_KEYS) -> None:
    """Print the answer to the job's prompt, and nothing else, on standard output.

    Raises:
        Interrupted: Ctrl-C.
    """
    assert job.prompt is not None
    try:
        ask_once(Talker(job, keys), job.system, job.prompt)
    except KeyboardInterrupt:
        raise Interrupted("the answer was stopped.") from None


def talk(job: ChatJob, keys: KeyRing = NO_KEYS) -> None:
    """Load the model, and talk until the user leaves.

    Raises:
        Interrupted: Ctrl-C, while it was loading.
    """
    edit_lines()
    try:
        talker = Talker(job, keys)
    except KeyboardInterrupt:
        raise Interrupted("stopped while the model was loading.") from None
    converse(talker, f"{job.name}, on {job.torch_device}", job.system, job.language)


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    job = serial.from_json(ChatJob, json.loads(argv[0]))
    keep = () if job.model.quantization == "none" else ("bitsandbytes",)
    hide_packages(keep, NOT_FOR_ANSWERS)
    keys = inherited(int(argv[1]) if len(argv) > 1 else None)
    work = talk if job.prompt is None else ask
    return guarded(lambda: work(job, keys))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
