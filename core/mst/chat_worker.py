"""Run as `python -m mst.chat_worker JOB [KEYS]`: load a model and talk; write nothing to disk."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst import serial
from mst.chat import ChatJob
from mst.data.rows import Message
from mst.data.template import ChatTemplate, load_template, render
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.errors import DataError, Interrupted, MstError
from mst.extensions import hide_packages
from mst.generate import as_text, generate
from mst.seal.keys.ring import NO_KEYS, KeyRing, inherited
from mst.tuned import load, load_dequantized
from mst.worker_process import die_with_parent, guarded

if TYPE_CHECKING:
    import torch

COMMANDS = """\
/reset          forget the conversation
/system TEXT    begin anew with this system message; without TEXT, with none
/exit           leave; Ctrl-D too
Ctrl-C stops an answer. Put a space before a message that begins with /."""


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


def printable(text: str) -> str:
    """Return the text without the characters that steer a terminal: a model may write any."""
    return "".join(each for each in text if each in "\n\t" or each.isprintable())


def opening(system: str | None) -> list[Message]:
    """Return the messages with which a conversation begins."""
    return [] if not system else [Message("system", system)]


def ask_once(job: ChatJob, keys: KeyRing = NO_KEYS) -> None:
    """Print the answer to the job's prompt, and nothing else, on standard output.

    Raises:
        Interrupted: Ctrl-C.
    """
    assert job.prompt is not None
    try:
        talker = Talker(job, keys)
        for piece in talker.answer([*opening(job.system), Message("user", job.prompt)]):
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        raise Interrupted("the answer was stopped.") from None
    print()


def converse(job: ChatJob, keys: KeyRing = NO_KEYS) -> None:
    """Read messages and stream answers until the user leaves."""
    with suppress(ImportError):
        # Editing and recalling lines; its history stays in memory.
        import readline  # noqa: F401
    try:
        talker = Talker(job, keys)
    except KeyboardInterrupt:
        raise Interrupted("stopped while the model was loading.") from None
    print(f"{job.name}, on {job.torch_device}. /help lists the commands; Ctrl-D leaves.")
    messages = opening(job.system)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            changed = _command(line, messages)
            if changed is None:
                return
            messages = changed
        elif line.strip():
            messages = _turn(talker, messages, line)


def _read_line() -> str | None:
    """Return the next line, or None when the user leaves."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.")


def _command(line: str, messages: list[Message]) -> list[Message] | None:
    """Return the conversation after a command; None to leave."""
    name, _, rest = line.partition(" ")
    if name == "/exit":
        return None
    if name == "/reset":
        print("The conversation begins anew.")
        return [each for each in messages if each.role == "system"]
    if name == "/system":
        print("The conversation begins anew, with" + ("" if rest.strip() else "out") + " a system"
              " message.")  # fmt: skip
        return opening(rest.strip())
    print(COMMANDS if name == "/help" else f"{name} is no command.\n{COMMANDS}")
    return messages


def _turn(talker: Talker, messages: list[Message], line: str) -> list[Message]:
    """Return the conversation with the line and its answer; without both if there is none."""
    asked = [*messages, Message("user", line.strip())]
    pieces: list[str] = []
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        # A KeyboardInterrupt raised inside a library's callback can get lost there, so the first
        # Ctrl-C is only noted and looked at between tokens.
        if stopping:
            raise KeyboardInterrupt
        stopping.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in talker.answer(asked):
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
            if stopping:
                break
    except KeyboardInterrupt:
        stopping.append(signal.SIGINT)
    except MstError as error:
        print(f"{type(error).__name__}: {error}", end="")
    finally:
        signal.signal(signal.SIGINT, before)
    if stopping:
        print(" [stopped]", end="")
    print()
    return [*asked, Message("assistant", "".join(pieces))] if pieces else messages


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    job = serial.from_json(ChatJob, json.loads(argv[0]))
    hide_packages(keep=() if job.model.quantization == "none" else ("bitsandbytes",))
    keys = inherited(int(argv[1]) if len(argv) > 1 else None)
    talk = converse if job.prompt is None else ask_once
    return guarded(lambda: talk(job, keys))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
