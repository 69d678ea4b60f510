"""Texts that Python and libraries print by themselves: none of them reaches the output."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mst import cli
from mst.seal.redaction import quiet, without_text

SECRET = "Frau Müller 王小明 +49-151"


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that is quiet for good; the secret is in its environment alone."""
    path = tmp_path / "program.py"
    start = "import os, sys\nfrom mst.seal.redaction import quieten\nquieten()\n"
    path.write_text(f"{start}row = os.environ['ROW']\n{textwrap.dedent(code)}", encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "ROW": SECRET},
        capture_output=True,
        text=True,
        timeout=60,
    )


PROGRAMS = {
    "raise ValueError(row)": "ValueError",
    """
    try:
        raise KeyError(row)
    except KeyError as error:
        raise OSError(row) from error
    """: "KeyError",
    """
    try:
        raise KeyError(row)
    except KeyError:
        raise OSError(row)
    """: "KeyError",
    """
    error = ValueError(row)
    error.__notes__ = [row]
    raise error
    """: "ValueError",
    """
    import threading
    thread = threading.Thread(target=lambda: {}[row])
    thread.start()
    thread.join()
    """: "KeyError",
    """
    class Fails:
        def __del__(self):
            raise ValueError(row)
    Fails()
    """: "ValueError",
    """
    import atexit
    atexit.register(lambda: {}[row])
    """: "KeyError",
    "import warnings; warnings.warn(row)": "UserWarning at",
    "import warnings; warnings.warn_explicit(row, UserWarning, 'f.py', 3)": "UserWarning at f.py:3",
    "import logging; logging.warning(f'bad {row}')": "withheld",
    "import logging; logging.getLogger('lib').error('cannot read %s', row)": "cannot read %s",
    """
    import logging
    try:
        {}[row]
    except KeyError:
        logging.exception('oh')
    """: "oh (KeyError)",
    """
    import logging, warnings
    logging.basicConfig()
    logging.captureWarnings(True)
    warnings.warn(row)
    """: "WARNING",
    """
    import asyncio
    async def fail():
        raise ValueError(row)
    async def begin():
        asyncio.create_task(fail())
        await asyncio.sleep(0.01)
    asyncio.run(begin())
    """: "asyncio",
}


@pytest.mark.parametrize(("code", "said"), PROGRAMS.items())
def test_what_python_prints_by_itself_quotes_nothing(code: str, said: str, tmp_path: Path) -> None:
    done = run(code, tmp_path)

    assert said in done.stderr
    for part in (SECRET, "Müller", "M\\xfc", "王小明", "+49"):
        assert part not in done.stdout + done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups are of Python 3.11")
def test_a_group_is_told_by_its_members_types() -> None:
    try:
        raise ExceptionGroup(SECRET, [KeyError(SECRET), ValueError(SECRET)])  # noqa: F821
    except Exception as error:
        told = without_text(error)

    assert "KeyError" in told
    assert "ValueError" in told
    assert "Müller" not in told


def test_a_chain_that_leads_to_itself_ends() -> None:
    first, second = ValueError(SECRET), KeyError(SECRET)
    first.__cause__, second.__cause__ = second, first
    told = without_text(first)

    assert told.count("ValueError") == 1
    assert "Müller" not in told


@pytest.mark.parametrize("kind", [ValueError, MemoryError, SystemExit])
def test_a_bug_of_a_worker_is_shown_by_its_place(kind: type[BaseException], tmp_path: Path) -> None:
    code = f"""
    from mst.worker_process import guarded
    def fail():
        raise {kind.__name__}(row)
    sys.exit(guarded(fail))
    """
    done = run(code, tmp_path)

    assert done.returncode == 1
    assert kind.__name__ in done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("kind", [ValueError, MemoryError, SystemExit])
def test_a_bug_of_a_command_is_shown_by_its_place(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise kind(SECRET)

    monkeypatch.setattr("mst.cli.data.run", fail)
    code = cli.main(["data", "check", "x"])
    out, err = capfd.readouterr()

    assert code == 1
    assert kind.__name__ in err
    assert "test_redaction.py" in err
    assert SECRET not in out + err


def test_the_hooks_of_a_caller_are_put_back() -> None:
    before = sys.excepthook
    with quiet():
        assert sys.excepthook is not before

    assert sys.excepthook is before


@pytest.mark.parametrize("row", ["Smith,王小明\n", "hunter2,hunter2\n", "Smith\thunter2\n"])
def test_a_row_where_the_header_should_be_is_not_quoted(
    row: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("a.tsv" if "\t" in row else "a.csv")
    path.write_text(row * 3, encoding="utf-8")
    code = cli.main(["data", "check", str(path), "--json"])
    out, err = capfd.readouterr()

    assert code == 1
    assert "header" in out + err
    for word in ("Smith", "王小明", "hunter2"):
        assert word not in out + err


def test_ctrl_c_in_a_finalizer_is_not_lost_and_shows_no_traceback(tmp_path: Path) -> None:
    code = """
    import signal, time

    class Ends:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    end = Ends()
    del end
    time.sleep(30)
    print("went on")
    """
    done = run(code, tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (-2, "", "Interrupted.\n")
