"""Completion in a real shell, and the manual page as `man` shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mst import cli
from mst.cli import COMMANDS
from mst.request import TASKS

PAGE = Path(__file__).parents[3] / "docs" / "man" / "mst.1"

pytest.importorskip("shtab", reason="needs mst-train[shell]")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "mst", "completion", "bash"], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "mst"
    path.write_text(done.stdout)
    return path


def completed(script: Path, line: str, directory: Path) -> list[str]:
    """Return what bash offers for a command line, as its own machinery finds it."""
    code = f"""
        source {script}
        COMP_LINE={line!r} COMP_POINT=${{#COMP_LINE}}
        read -ra COMP_WORDS <<< "$COMP_LINE"
        [[ $COMP_LINE == *' ' ]] && COMP_WORDS+=('')
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        spec=$(complete -p mst); function=${{spec#*-F }}; function=${{function%% *}}
        $function mst "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}" 2>/dev/null
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=directory, capture_output=True, text=True, timeout=20
    )
    return [each for each in done.stdout.split("\n") if each]


def test_every_command_is_completed(script: Path, tmp_path: Path) -> None:
    assert {*COMMANDS, *TASKS, "model"} <= set(completed(script, "mst ", tmp_path))
    assert completed(script, "mst bug", tmp_path) == ["bug-report"]


def test_options_choices_files_and_runs_are_completed(script: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "runs" / "first").mkdir(parents=True)

    assert completed(script, "mst train --lora-r", tmp_path) == ["--lora-rank"]
    offered = completed(script, "mst sft --", tmp_path)
    assert {"--dataset", "--model", "--max-length", "--help"} <= set(offered)
    assert not [each for each in offered if "_" in each]
    assert set(completed(script, "mst train --tuner ", tmp_path)) == {
        "auto",
        "lora",
        "qlora",
        "full",
    }
    assert "rows.jsonl" in completed(script, "mst data check ", tmp_path)
    assert "first" in completed(script, "mst runs show ", tmp_path)
    assert "pull" in completed(script, "mst models ", tmp_path)
    pull = completed(script, "mst models pull --", tmp_path)
    assert {"--from", "--revision", "--allow-host", "--yes"} <= set(pull)
    assert set(completed(script, "mst models pull --from ", tmp_path)) == {
        "huggingface", "modelscope",
    }  # fmt: skip


def test_a_key_press_is_completed_on_a_terminal(script: Path, tmp_path: Path) -> None:
    import pexpect

    (tmp_path / "runs" / "ward 7; ls").mkdir(parents=True)
    shell = pexpect.spawn(
        "bash", ["--norc", "--noprofile"], cwd=str(tmp_path), encoding="utf-8", timeout=20,
        env={"PS1": "$ ", "TERM": "dumb", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        shell.expect_exact("$ ")
        shell.sendline(f"source {script}; echo rea''dy")
        shell.expect_exact("ready")
        shell.send("mst bug-\t")
        shell.expect_exact("bug-report ")
        shell.send("--no-\t")
        shell.expect_exact("--no-run ")
        shell.sendcontrol("u")
        shell.send("mst runs show wa\t")
        shell.expect_exact(r"ward\ 7\;\ ls")
    finally:
        shell.close(force=True)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mst", "completion", shell], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "bug-report" in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(done.stdout)
    check = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)

    assert (check.returncode, check.stderr) == (0, "")


def test_the_manual_page_is_what_man_can_show(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("argparse_manpage", reason="needs mst-train[shell]")
    assert cli.main(["man"]) == 0
    page = capsys.readouterr().out
    # Each Python's argparse words its help a little differently.
    if sys.version_info[:2] == (3, 11):
        assert page == PAGE.read_text(encoding="utf-8"), "run: python ci/make_man_page.py"
    if shutil.which("groff") is None:
        pytest.skip("needs groff")
    shown = subprocess.run(
        ["groff", "-man", "-ww", "-b", "-Tutf8", "-P-c"], input=page, capture_output=True, text=True
    )

    assert (shown.returncode, shown.stderr) == (0, "")
    for words in ("mst train", "--lora-rank", "mst models pull", "--allow-host", "EXIT STATUS"):
        assert words in re.sub(".\b", "", shown.stdout)
