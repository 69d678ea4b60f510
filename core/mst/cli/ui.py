"""`mst ui`: a page on this machine that shows runs live, and starts, stops and resumes them."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mst.errors import MstError, UsageError
from mst.runs import RUNS
from mst.serve.http.listening import TOLD_TO_END, Place, listening, refuse_net, told_to_end
from mst.ui.job import LANGUAGES, LocalModel, Places, UiJob, check_packages

# They are an argument of the worker's, which Linux takes up to 128 KiB.
_MOST_LOCAL_MODELS = 200
_EVENTS = frozenset({"ui.entered", "ui.asked"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is shown, and what may be done."""
    parser.add_argument(
        "--runs", nargs="+", action="extend", metavar="DIR",
        help="directories in which runs lie; new ones go into the first (runs)",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="DIR",
        help="directories of data files that new runs may be given (none: the embedded rows)",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", action="extend", default=[], metavar="DIR",
        help="directories of models that new runs may be given, beside those of mst models list",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=0, metavar="N", help="0 for any (0)")
    parser.add_argument(
        "--lang", choices=LANGUAGES, default="auto", help="auto is the browser's (auto)"
    )
    parser.add_argument(
        "--samples", choices=("on", "off"), default="off",
        help="show answers of `mst eval --predictions` that lie in a run's directory (off)",
    )  # fmt: skip
    parser.add_argument(
        "--actions", choices=("on", "off"), default="on",
        help="start, stop and resume runs; off only shows them (on)",
    )  # fmt: skip


@contextlib.contextmanager
def outside(args: argparse.Namespace) -> Iterator[None]:
    """Listen, and start what starts runs, before the jail is entered."""
    check_packages()
    refuse_net(args.allow_net, "The page")
    place = Place("127.0.0.1", args.port)
    args.places = _places(args)
    with contextlib.ExitStack() as held:
        held.enter_context(told_to_end())
        # The kernel says which user of this machine comes in, and no other may.
        args.listening = held.enter_context(listening(place, os.environ, own_user=True))
        args.listeners = (args.listening.listener,)
        args.pipes = None
        if args.actions == "on":
            from mst.ui.asking import beside

            args.pipes = held.enter_context(beside(args.places, os.environ))
        yield


def _places(args: argparse.Namespace) -> Places:
    for flag in ("data", "models", "runs"):
        for each in getattr(args, flag) or []:
            if not Path(each).expanduser().is_dir():
                raise UsageError(
                    f"--{flag} {each} is no directory. Make it, or name the one in which they lie."
                )
    return Places(
        runs=_whole(args.runs or [RUNS]),
        data=_whole(args.data),
        models=_whole(args.models),
        local_models=_local_models() if args.actions == "on" else (),
    )


def _local_models() -> tuple[LocalModel, ...]:
    """Return the models of the local places that can be used; the embedded one needs no name."""
    from mst.model.found import found_models
    from mst.model.places import EMBEDDED

    usable = [
        each
        for each in found_models(os.environ)
        if not each.problem and each.place != EMBEDDED and each.path.isprintable()
    ]
    return tuple(
        LocalModel(each.name, str(Path(each.path).absolute()))
        for each in usable[:_MOST_LOCAL_MODELS]
    )


def _whole(directories: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(Path(each).expanduser().resolve()) for each in directories))


def run(args: argparse.Namespace) -> int:
    """Serve the page until told to end."""
    from mst import serial
    from mst.launch import KILLED, how_it_ended, run_worker, worker_environment
    from mst.seal.audit import record
    from mst.seal.audit.place import directory_of
    from mst.seal.audit.told import recording

    place = args.listening.place
    job = UiJob(
        places=args.places,
        port=place.port,
        language=args.lang,
        samples=args.samples == "on",
        actions=args.actions == "on",
        audit=str(directory_of(args.audit_log)),
    )
    record(
        "ui.begun", where=f"http://127.0.0.1:{place.port}", runs=list(job.places.runs),
        samples=job.samples, actions=job.actions,
    )  # fmt: skip
    print(f"runs    {', '.join(job.places.runs)}", flush=True)
    with recording(_EVENTS, texts=("do", "run")) as notes:
        handles = [args.listening.listener, args.listening.control, notes]
        handles += [] if args.pipes is None else [args.pipes.requests, args.pipes.answers]
        arguments = [serial.dumps(job), *map(str, handles)]
        code = run_worker("mst.ui.worker", arguments, worker_environment(os.environ, {}), handles)
    if code == KILLED:
        raise MstError(f"{how_it_ended(code, 'Start it again')}.")
    return 0 if code == TOLD_TO_END else code
