"""Whether a server's greedy answers are those of `mst.generate`, one by one and without a server.

Run as `python -m benchmarks.greedy_answers JOB`: reads what was asked and answered from standard
input, and prints the verdicts. In bfloat16 logits of about 20 are 0.125 apart, and a batch rounds
other than one row does, so where two tokens are nearly as likely either may come. Such a place is a
near tie: the server's token is within four steps of the dtype of the likeliest one. There offline
generation takes the server's token and goes on; an answer is wrong if it parts anywhere else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst import serial
from mst.bench.chat_clients import Answer
from mst.chat import Sampling
from mst.data.rows import Message
from mst.data.template import ChatTemplate, load_template, render
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.extensions import hide_packages
from mst.generate import generate
from mst.launch import worker_environment
from mst.serve.job import EngineJob
from mst.tuned import load

if TYPE_CHECKING:
    import torch

_STEPS = 4


@dataclass(frozen=True)
class Verdicts:
    """What was found of some answers.

    Attributes:
        checked: all.
        equal: the same text as offline.
        near_ties: the same but for near ties.
        wrong: others.
        widest_tie: steps of the dtype between the likeliest token and one that came instead.
    """

    checked: int = 0
    equal: int = 0
    near_ties: int = 0
    wrong: int = 0
    widest_tie: float = 0.0


def verdicts(job: EngineJob, cases: Mapping[str, Sequence[Answer]]) -> dict[str, Verdicts]:
    """Generate offline, in a process of its own, what whole answers should be.

    Args:
        job: what the server has loaded.
        cases: answers that it gave, by any names.

    Returns:
        What was found, by the same names.
    """
    asked = {name: _by_question(answers) for name, answers in cases.items()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.greedy_answers", serial.dumps(job)],
        env=worker_environment(os.environ, job.environment), input=json.dumps(asked),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Verdicts(**each) for name, each in found.items()}


def _by_question(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """Return how often each text was answered, for each question."""
    found: dict[str, dict[str, int]] = {}
    for each in answers:
        if not each.fault:
            texts = found.setdefault(json.dumps(asdict(each.question)), {})
            texts[each.text] = texts.get(each.text, 0) + 1
    return found


def judge(job: EngineJob, cases: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Judge all cases' answers, those of the same text once."""
    import torch

    torch.set_num_threads(job.threads)
    directory = Path(job.model.tokenizer)
    template, tokenizer = load_template(directory), load_tokenizer(directory)
    model = load(job.model, job.dtype, job.attention, torch.device(job.torch_device))
    return {
        name: asdict(_judged(model, tokenizer, template, asked)) for name, asked in cases.items()
    }


def _judged(
    model: torch.nn.Module, tokenizer: TextTokenizer, template: ChatTemplate,
    asked: dict[str, dict[str, int]],
) -> Verdicts:  # fmt: skip
    found, widest = dict.fromkeys(("equal", "near_ties", "wrong"), 0), 0.0
    for question, texts in asked.items():
        given = json.loads(question)
        messages = [Message(each["role"], each["content"]) for each in given["messages"]]
        text = render(template, messages, add_generation_prompt=True)
        prompt = tokenizer.encode(text).ids
        for answer, count in texts.items():
            ties = near_ties(model, tokenizer, prompt, answer, given["tokens"])
            found["wrong" if ties is None else "near_ties" if ties else "equal"] += count
            widest = max(widest, *(ties or ()), 0.0)
    return Verdicts(sum(found.values()), **found, widest_tie=round(widest, 2))


def near_ties(
    model: torch.nn.Module, tokenizer: TextTokenizer, prompt: list[int], text: str, tokens: int
) -> list[float] | None:
    """Return the near ties at which an answer parts from offline generation; None if it is wrong.

    Args:
        model: that answered.
        tokenizer: the model's.
        prompt: token ids.
        text: of the answer.
        tokens: longest answer.

    Returns:
        Steps of the dtype between the likeliest token and the one that came, at each.
    """
    text, stop = text.rstrip("\ufffd"), tokenizer.eos_token_ids
    ids: list[int] = []
    found: list[float] = []
    while True:
        floor = len(ids)
        left = Sampling(max_new_tokens=tokens - len(ids))
        ids += generate(model, [*prompt, *ids], stop, left)
        if _shown(tokenizer, ids) == text:
            return found
        turned = _turned(model, tokenizer, prompt, ids, text, floor, tokens)
        if turned is None:
            return None
        ids, steps = turned
        found.append(steps)
        if ids[-1] in stop:
            return found


def _turned(
    model: torch.nn.Module, tokenizer: TextTokenizer, prompt: list[int], ids: list[int], text: str,
    floor: int, tokens: int,
) -> tuple[list[int], float] | None:  # fmt: skip
    """Return ids up to a near tie with the token that the text goes on with, and how near it is."""
    import torch

    kept = next(
        each for each in range(len(ids), -1, -1)
        if text.startswith(_shown(tokenizer, ids[:each]))
    )  # fmt: skip
    with torch.inference_mode():
        whole = torch.tensor([[*prompt, *ids[:kept]]])
        logits = model(input_ids=whole).logits[0, len(prompt) - 1 :]
    eps = torch.finfo(logits.dtype).eps
    # Two tokens may show the same beginning, so that the tie may lie before where texts part.
    for place in range(min(kept, tokens - 1), floor - 1, -1):
        row = logits[place].float()
        steps = (row.max() - row) / (eps * row.max().abs())
        for each in steps.argsort().tolist():
            if steps[each] > _STEPS:
                break
            turned = [*ids[:place], each]
            if each not in ids[place : place + 1] and _goes_on(tokenizer, turned, text):
                return turned, float(steps[each])
    return None


def _goes_on(tokenizer: TextTokenizer, ids: Sequence[int], text: str) -> bool:
    shown = _shown(tokenizer, ids)
    return shown == text if ids[-1] in tokenizer.eos_token_ids else text.startswith(shown)


def _shown(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids, without the character that has only begun."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def main() -> None:
    """Judge what standard input has."""
    hide_packages()
    print(json.dumps(judge(serial.loads(EngineJob, sys.argv[1]), json.load(sys.stdin))))


if __name__ == "__main__":
    main()
