"""`mst chat`: answers equal transformers', stream as they come, and leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from mst import rundir
from mst.chat import ChatJob, Sampling, choose_model, prepare_chat
from mst.chat_terminal import COMMANDS, _command, converse, printable
from mst.cli import main
from mst.data.rows import Message
from mst.errors import DataError, ModelError, RunError
from mst.generate import as_text, generate
from mst.tuned import TunedModel

PROMPT = [1, 320, 275, 201, 1200, 99, 7, 7]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    return loaded.eval()


@pytest.fixture(scope="module")
def endless_model(tiny_model_with_context: Callable[[int], Path]) -> Path:
    """The tiny model with a context that its random babble does not fill within a test."""
    return tiny_model_with_context(100_000)


def ids(model: Any, stop: tuple[int, ...] = (), **options: Any) -> list[int]:
    return list(generate(model, PROMPT, stop, Sampling(**options)))


def test_greedy_answers_are_those_of_transformers(model: Any) -> None:
    import torch

    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    assert ids(model, max_new_tokens=24) == expected[0, len(PROMPT) :].tolist()


def test_an_answer_ends_before_its_stop_token(model: Any) -> None:
    whole = ids(model, max_new_tokens=12)
    end = whole[5]

    assert ids(model, stop=(end,), max_new_tokens=12) == whole[: whole.index(end)]


def test_draws_repeat_with_their_seed_and_narrow_with_top_p(model: Any) -> None:
    drawn = ids(model, max_new_tokens=8, temperature=1.0, seed=3)
    greedy = ids(model, max_new_tokens=8)

    assert ids(model, max_new_tokens=8, temperature=1.0, seed=3) == drawn
    assert ids(model, max_new_tokens=8, temperature=1.0, seed=4) != drawn
    # Also where float32 holds no such number.
    for least in (1e-9, 1e-46):
        assert ids(model, max_new_tokens=8, temperature=1.0, top_p=least) == greedy
        assert ids(model, max_new_tokens=8, temperature=least) == greedy


def test_text_comes_in_whole_characters(tiny_model: Path) -> None:
    from mst.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    text = "naïve 🦜 王小明, “ok” end"
    pieces = list(as_text(tokenizer.tokenizer, iter(tokenizer.encode(text).ids)))

    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_bytes_that_are_no_character_end_no_answer() -> None:
    from tokenizers import Tokenizer, decoders, models

    names = ["<0xE4>", "<0xBD>", "<0xA0>", "\u2581a", "b"]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, []))
    # As Llama 2's, which makes replacement characters of all bytes in a row, shown ones too.
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])

    assert "".join(as_text(tokenizer, iter([3, 0, 1, 2, 0, 4, 3, 0, 1, 2]))) == "a你\ufffdb a你"
    assert "".join(as_text(tokenizer, iter([0, 1, 2, 0, 3, 4]))) == "你\ufffd ab"


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\x9b2J\n\tc 王") == "a]0;titleb2J\n\tc 王"


def test_commands_change_the_conversation() -> None:
    system, said = Message("system", "be brief"), Message("user", "hello")

    assert _command("/reset", [system, said], "en") == [system]
    assert _command("/system be long", [system, said], "en") == [Message("system", "be long")]
    assert _command("/system", [system, said], "en") == []
    assert _command("/help", [said], "en") == [said]
    assert _command("/exit", [said], "en") is None
    assert all(each in COMMANDS for each in ("/reset", "/system", "/exit"))


def test_a_conversation_explains_itself_in_chinese(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing:
        def answer(self, messages: Any) -> Any:
            raise DataError(
                f"the conversation has {len(messages)} tokens, and the model reads 0 at most."
                " Begin a shorter one: /reset."
            )

    typed = "/help\n/nothing\n/system Be brief.\n/system\n/reset\nwhere?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    converse(Refusing(), "tiny, on cpu", None, "zh")
    told = capsys.readouterr().out

    assert told.startswith("tiny, on cpu。/help 列出命令；Ctrl-D 离开。\n")
    assert "没有 /nothing 这个命令。\n/reset          忘掉之前的对话\n" in told
    assert told.endswith(
        "DataError: 对话有 1 个词元，而模型至多读 0 个。请用 /reset 开始较短的对话。\n"
    )
    assert not re.search("[a-z]{2,} [a-z]{2,} [a-z]{2,}", told)


def test_the_target_is_a_run_a_model_or_the_newest_run(
    finished_run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    for name, created in (("old", "2026-01-01T00:00:00"), ("new", "2026-02-01T00:00:00")):
        shutil.copytree(finished_run, runs / name)
        rundir.update_manifest(runs / name, created=created + "+00:00")
    shutil.copytree(finished_run, runs / "unfinished")
    rundir.update_manifest(runs / "unfinished", created="2026-03-01T00:00:00", status="failed")
    tuned = {name: str(runs / name / "adapter") for name in ("old", "new")}

    assert choose_model(None, None, {}, runs)[1].adapter == tuned["new"]
    assert choose_model("old", None, {}, runs)[1].adapter == tuned["old"]
    assert choose_model(str(runs / "old"), None, {}, runs)[1].adapter == tuned["old"]
    assert choose_model("old", "2", {}, runs)[1].step == 2
    assert choose_model(str(tiny_model), None, {}, runs)[1] == TunedModel(
        str(tiny_model), None, str(tiny_model)
    )
    with pytest.raises(RunError, match="is failed"):
        choose_model("unfinished", None, {}, runs)
    with pytest.raises(ModelError, match="no run or model is called nothing here"):
        choose_model("nothing", None, {"HOME": str(tmp_path)}, runs)


def test_a_job_survives_json_and_its_repr_shows_no_text(tiny_model: Path) -> None:
    from mst import serial

    job = prepare_chat(
        str(tiny_model), "cpu", Sampling(), os.environ, system="SECRET", prompt="HIDDEN"
    )

    assert serial.from_json(ChatJob, json.loads(serial.dumps(job))) == job
    assert "SECRET" not in repr(job)
    assert "HIDDEN" not in repr(job)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--max-new-tokens", "0"),
    ],
)
def test_senseless_sampling_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", flag, value]) == 2
    assert f"{flag} must be" in capsys.readouterr().err


def once(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", "chat", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_prompt_is_answered_once_and_nothing_is_written(
    finished_run: Path, tmp_path: Path
) -> None:
    before = {each: each.stat().st_mtime_ns for each in finished_run.rglob("*")}
    done = once(
        finished_run, "--prompt", "my card is late", "--max-new-tokens", 6, "--device", "cpu",
        HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert done.stderr == ""
    assert {each: each.stat().st_mtime_ns for each in finished_run.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_says_so_without_quoting_it(tiny_model: Path) -> None:
    done = once(tiny_model, "--prompt", "secretive " * 600)

    assert done.returncode == 1
    assert "the model reads 512 at most" in done.stderr
    assert "secretive" not in done.stdout + done.stderr


def talk(model: Path, home: Path, *arguments: str) -> Any:
    chat = pexpect.spawn(
        sys.executable,
        ["-m", "mst", "chat", str(model), "--device", "cpu", *arguments],
        env=os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        encoding="utf-8",
        codec_errors="replace",
        timeout=180,
        dimensions=(24, 200),
    )
    chat.expect("Ctrl-D leaves")
    chat.expect("> ")
    return chat


def test_a_conversation_in_the_terminal(endless_model: Path, tmp_path: Path) -> None:
    chat = talk(endless_model, tmp_path, "--max-new-tokens", "100000", "--temperature", "1")
    chat.sendline("hello")
    chat.expect("hello\r\n")
    # Ctrl-C while tokens stream stops the answer and nothing else.
    chat.expect(r"\S")
    chat.sendintr()
    chat.expect(r" \[stopped\]\r\n")
    chat.expect("> ")
    # At the prompt it only says how to leave.
    chat.sendintr()
    chat.expect("Ctrl-D leaves")
    chat.expect("> ")
    for line, reply in (
        ("/nonsense", "no command"),
        ("/reset", "begins anew"),
        ("/system be brief", "with a system message"),
        ("/system", "without a system message"),
    ):
        chat.sendline(line)
        chat.expect(reply)
        chat.expect("> ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()

    assert chat.exitstatus == 0
    assert list(tmp_path.iterdir()) == []


def test_exit_leaves_and_a_full_context_does_not(tiny_model: Path, tmp_path: Path) -> None:
    chat = talk(tiny_model, tmp_path, "--max-new-tokens", "2")
    chat.sendline("x y " * 600)
    chat.expect("Begin a shorter one: /reset")
    chat.expect("> ")
    chat.sendline("hi")
    chat.expect("> ")
    chat.sendline("/exit")
    chat.expect(pexpect.EOF)
    chat.close()

    assert chat.exitstatus == 0
