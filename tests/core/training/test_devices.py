"""Training on chips that torch does not know by itself, and what happens when they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.simulated import simchip_environment
from tests.simulated_ascend import ascend_environment

from mst.errors import EXIT_DEVICE_LOST, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OUT_OF_MEMORY
from mst.plan import Plan
from mst.rundir import CHECKPOINTS, PLAN, read_document, read_manifest, read_metrics
from mst.training import checkpoint

OPTIONS = {
    "dtype": "float32", "max-steps": 6, "val-size": 8, "eval-steps": 3, "save-steps": 3,
    "learning-rate": 0.01, "label-accuracy": "off", "per-device-train-batch-size": 8,
    "gradient-accumulation-steps": 1,
}  # fmt: skip


# Enough operators for four steps and an evaluation, and not for six.
LOST = {"SIMCHIP_FAULT": "lost:8000"}
WIDE: dict[str, Any] = {"device": "simchip", "per_device_train_batch_size": 16, "val_size": 0}


def arguments(model: Path, rows: Path, run: Path, **changes: object) -> list[str]:
    given = {name.replace("_", "-"): value for name, value in changes.items()}
    values = {"model": model, "dataset": rows, "output-dir": run, **OPTIONS, **given}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "mst", "train", *flags]


def train(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environ = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environ}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=300, check=False
    )


def trained(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = train(command, environ)

    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses(run: Path) -> list[float]:
    return [float(one.get("loss", one.get("eval_loss", 0))) for one in read_metrics(run)]


@pytest.fixture(scope="session")
def on_cpu(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with: 6 steps of 8 rows, in float32."""
    run = tmp_path_factory.mktemp("devices") / "cpu"
    trained(arguments(tiny_model, chat_rows, run, device="cpu"), dict(os.environ))
    return run


@pytest.fixture
def ascend(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "machine").mkdir()
    return ascend_environment(tmp_path / "machine")


def test_losses_on_a_chip_are_those_of_the_cpu(
    on_cpu: Path, ascend: dict[str, str], tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained(arguments(tiny_model, chat_rows, run, device="npu", nproc_per_node=1), ascend)

    assert read_document(Plan, run, PLAN).torch_devices == ("npu:0",)
    assert losses(run) == pytest.approx(losses(on_cpu), rel=1e-5)
    assert len(losses(run)) == 8


@pytest.mark.parametrize(
    ("device", "torch_devices"),
    [("simchip", ("simchip:0", "simchip:1")), ("npu", ("npu:0", "npu:1"))],
)
def test_two_processes_give_the_losses_of_one(
    device: str,
    torch_devices: tuple[str, ...],
    on_cpu: Path,
    ascend: dict[str, str],
    tiny_model: Path,
    chat_rows: Path,
    tmp_path: Path,
) -> None:
    environ = simchip_environment(devices=2) if device == "simchip" else ascend
    run = tmp_path / "run"
    command = arguments(
        tiny_model, chat_rows, run, device=device, nproc_per_node=2, per_device_train_batch_size=4
    )
    trained(command, environ)

    plan = read_document(Plan, run, PLAN)
    assert (plan.strategy, plan.torch_devices) == ("ddp", torch_devices)
    assert losses(run) == pytest.approx(losses(on_cpu), rel=1e-5)
    assert [each.name for each in run.iterdir() if each.name.startswith(".rendezvous")] == []


def test_the_second_chip_is_addressed_as_the_worker_sees_it(
    on_cpu: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environ = simchip_environment(devices=3)
    trained(arguments(tiny_model, chat_rows, run, device="simchip:1"), environ)

    plan = read_document(Plan, run, PLAN)
    assert plan.torch_devices == ("simchip:0",)
    assert plan.environment["SIMCHIP_VISIBLE_DEVICES"] == "sim-1"
    assert losses(run) == pytest.approx(losses(on_cpu), rel=1e-5)


def test_a_chip_without_bfloat16_trains_in_float16_with_a_scaled_loss(
    on_cpu: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environ = simchip_environment(bf16=False)
    command = arguments(tiny_model, chat_rows, run, device="simchip", dtype="auto")
    trained(command, environ)

    state = checkpoint.read_state(checkpoint.checkpoint_path(run / CHECKPOINTS, 6))
    assert read_document(Plan, run, PLAN).compute_dtype == "float16"
    assert (state.loss_scale, state.good_steps) == (2.0**16, 6)
    assert losses(run) == pytest.approx(losses(on_cpu), rel=1e-3)


def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(
    on_cpu: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environ = simchip_environment(devices=2)
    # Dropout draws from each chip's own generator, so their states have to come back too.
    options: dict[str, Any] = {
        "device": "simchip", "lora_dropout": 0.2, "nproc_per_node": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    trained(arguments(tiny_model, chat_rows, whole, **options), environ)
    lost = train(arguments(tiny_model, chat_rows, cut, **options), environ | LOST)
    trained([sys.executable, "-m", "mst", "train", "--output-dir", str(cut), "--resume"], environ)

    assert lost.returncode == EXIT_DEVICE_LOST, lost.stderr
    last = checkpoint.checkpoint_path(Path(CHECKPOINTS), 6)
    assert losses(cut) == losses(whole)
    for name in ("adapter_model.safetensors", checkpoint.OPTIMIZER, checkpoint.RANDOM):
        assert (cut / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    assert losses(whole) != losses(on_cpu)


def test_a_resumed_run_with_activations_on_the_host_is_one_that_was_never_stopped(
    on_cpu: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environ = simchip_environment()
    options: dict[str, Any] = {"device": "simchip", "activation_offloading": "on"}
    trained(arguments(tiny_model, chat_rows, whole, **options), environ)
    # Layers that are recomputed have more operators.
    lost = {"SIMCHIP_FAULT": "lost:12500"}
    train(arguments(tiny_model, chat_rows, cut, **options), environ | lost)
    begun = checkpoint.newest_whole(cut / CHECKPOINTS)
    trained([sys.executable, "-m", "mst", "train", "--output-dir", str(cut), "--resume"], environ)

    assert begun == checkpoint.checkpoint_path(cut / CHECKPOINTS, 3)
    assert read_document(Plan, cut, PLAN).activation_offloading
    assert losses(whole) == pytest.approx(losses(on_cpu), rel=1e-5)
    assert losses(cut) == losses(whole)
    last = checkpoint.checkpoint_path(Path(CHECKPOINTS), 6)
    for name in ("adapter_model.safetensors", checkpoint.OPTIMIZER, checkpoint.RANDOM):
        assert (cut / last / name).read_bytes() == (whole / last / name).read_bytes(), name


@pytest.fixture(scope="session")
def roomy(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the chip in micro-batches of 16 rows."""
    run = tmp_path_factory.mktemp("devices") / "roomy"
    trained(arguments(tiny_model, chat_rows, run, **WIDE), simchip_environment())
    return run


def overfull(roomy: Path) -> dict[str, str]:
    """Return an environment whose chips are too small for the run, although they promise 4 GiB."""
    share = 0.8 * read_manifest(roomy).results["peak_memory_bytes"] / 2**32
    return simchip_environment(devices=2, fault=f"capacity:{share}")


def test_an_overfull_chip_says_what_to_lower(
    roomy: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_model, chat_rows, run, **WIDE, on_oom="stop")
    done = train(command, overfull(roomy))

    assert done.returncode == EXIT_OUT_OF_MEMORY, done.stdout + done.stderr
    assert "OutOfMemory: simchip:0 ran out of memory in step 1" in done.stderr
    assert "--per-device-train-batch-size 8 --gradient-accumulation-steps 2" in done.stderr
    assert "--on-oom shrink" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_manifest(run).status == "failed"


def test_a_plan_that_did_not_fit_is_followed_by_the_next_smaller_one(
    roomy: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_model, chat_rows, run, **WIDE, nproc_per_node=1, memory_budget="3GiB")
    done = trained(command, overfull(roomy))

    manifest, plan = read_manifest(run), read_document(Plan, run, PLAN)
    # Lines are as wide as the terminal.
    said = " ".join(done.stdout.split())
    assert "once more with the next smaller one: micro-batches of 8 rows" in said
    assert (plan.per_device_train_batch_size, plan.global_batch) == (8, 16)
    assert losses(run) == pytest.approx(losses(roomy), rel=1e-5)
    assert [(each.step, each.micro_batch, each.cause) for each in manifest.misses] == [
        (1, 16, "out of memory")
    ]
    assert 3 * 2**30 > manifest.misses[0].forecast_bytes > plan.memory.peak_bytes
    assert manifest.misses[0].measured_bytes
    assert ("memory_budget", "3GiB") in [(each.choice, each.value) for each in plan.reasons]


@pytest.mark.parametrize("processes", [1, 2])
def test_on_oom_shrink_keeps_the_global_batch_and_the_losses(
    processes: int, roomy: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # With two processes a micro-batch of one has to overflow as it does on one chip alone.
    options = WIDE | {"max_steps": 3, "save_steps": 3} if processes == 2 else WIDE
    command = arguments(
        tiny_model, chat_rows, run, **options, on_oom="shrink", nproc_per_node=processes
    )
    done = trained(command, overfull(roomy))

    state = checkpoint.read_state(checkpoint.checkpoint_path(run / CHECKPOINTS, 3))
    said = "step 1 did not fit into memory in micro-batches of 16 rows: going on with 8"
    assert said in done.stdout
    assert state.micro_batch == 8
    if processes == 1:
        assert losses(run) == pytest.approx(losses(roomy), rel=1e-5)
    assert read_document(Plan, run, PLAN).global_batch == 16 * processes


def test_a_lost_chip_keeps_the_checkpoint_and_another_device_goes_on(
    on_cpu: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environ = simchip_environment() | LOST
    # Nothing is asked of the model beforehand, which would take some of the operators.
    alone = arguments(tiny_model, chat_rows, run, device="simchip", prefix_sharing="off")
    done = train(alone, environ)
    kept = checkpoint.newest_whole(run / CHECKPOINTS)
    go_on = [sys.executable, "-m", "mst", "train", "--output-dir", str(run), "--resume"]
    trained([*go_on, "--device", "cpu"], dict(os.environ))

    assert done.returncode == EXIT_DEVICE_LOST, done.stdout + done.stderr
    assert "DeviceLost: simchip:0 stopped answering" in done.stderr
    assert "Traceback" not in done.stderr
    assert kept is not None
    assert kept.name == "step-00000003"
    assert losses(run) == pytest.approx(losses(on_cpu), rel=1e-5)


@pytest.mark.slow
def test_smollm2_has_the_losses_of_the_cpu(ascend: dict[str, str], tmp_path: Path) -> None:
    environ = {"cpu": dict(os.environ), "simchip": simchip_environment(), "npu": ascend}
    runs = {name: tmp_path / name for name in environ}
    options = {
        "dtype": "float32", "max-steps": 3, "val-size": 0, "label-accuracy": "off",
        "per-device-train-batch-size": 4, "gradient-accumulation-steps": 1, "nproc-per-node": 1,
    }  # fmt: skip
    for name, run in runs.items():
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "mst", "train", "--device", name, *flags]
        trained([*command, "--output-dir", str(run)], environ[name])

    assert losses(runs["simchip"]) == pytest.approx(losses(runs["cpu"]), rel=1e-5)
    assert losses(runs["npu"]) == pytest.approx(losses(runs["cpu"]), rel=1e-5)
    assert len(losses(runs["npu"])) == 3


def test_a_missing_operator_is_named(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    environ = simchip_environment(fault="missing:aten::silu")
    done = train(arguments(tiny_model, chat_rows, tmp_path / "run", device="simchip"), environ)

    assert done.returncode == EXIT_FAILED
    assert "simchip:0 has no kernel for aten::silu" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chip_that_makes_nan_stops_the_run(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    environ = simchip_environment(fault="nan:aten::silu")
    done = train(arguments(tiny_model, chat_rows, tmp_path / "run", device="simchip"), environ)

    assert done.returncode == EXIT_FAILED
    assert "the loss is not finite at step 1" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_one_process_is_killed_all_end_and_what_was_saved_is_whole(
    number: int, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(
        tiny_model, chat_rows, run, device="simchip", nproc_per_node=2, max_steps=100_000,
        per_device_train_batch_size=4, save_steps=5, eval_steps=1000,
    )  # fmt: skip
    environ = {**simchip_environment(devices=2), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.newest_whole(run / CHECKPOINTS):
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = workers_of(run)
        os.kill(workers[1], number)
        code = job.wait(90)
    finally:
        job.kill()
    said = (tmp_path / "log").read_text()

    assert len(workers) == 2
    assert code == (EXIT_FAILED if number == signal.SIGKILL else EXIT_INTERRUPTED), said
    assert "Traceback" not in said
    assert ("(SIGKILL)" if number == signal.SIGKILL else "everything is saved") in said
    assert workers_of(run) == {}
    assert checkpoint.newest_whole(run / CHECKPOINTS) is not None
    assert list((run / CHECKPOINTS).glob(".*.part")) == []


def workers_of(run: Path) -> dict[int, int]:
    """Return the processes of a run's workers by rank."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        try:
            words = (each / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "mst.training.worker" in words and str(run) in words:
            found[int(words[words.index(str(run)) + 1])] = int(each.name)
    return found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda"], ["no 'cuda' device to use here (found: ", "cpu:0", "nvidia"]),
        (["--device", "cuda:9"], ["no 'cuda:9' device", "found: "]),
        (["--device", "simchip:9"], ["no 'simchip:9' device", "simchip has 2 of them"]),
        (["--device", "simchip", "--nproc-per-node", "3"], ["--nproc-per-node 3", "there are 2"]),
        (["--device", "simchip:1", "--nproc-per-node", "2"], ["from simchip:1 on", "there is 1"]),
    ],
)
def test_a_device_that_is_not_here_is_an_error_that_says_what_is(
    flags: list[str], words: list[str], chat_rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    files = ["--model", str(tiny_model), "--dataset", str(chat_rows)]
    command = [sys.executable, "-m", "mst", "train", *files, *flags]
    done = train([*command, "--output-dir", str(tmp_path / "run")], simchip_environment(devices=2))

    assert done.returncode == EXIT_FAILED
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_variable_that_hides_all_chips_is_named(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    environ = simchip_environment(devices=2, SIMCHIP_VISIBLE_DEVICES="")
    done = train(arguments(tiny_model, chat_rows, tmp_path / "run", device="simchip"), environ)

    assert done.returncode == EXIT_FAILED
    assert "SIMCHIP_VISIBLE_DEVICES='' hides all 2 of them" in done.stderr


def test_tied_weights_stay_one_on_a_chip(tiny_model: Path) -> None:
    code = """
import sys
from pathlib import Path
from mst.probe import activate
from mst.registry import load
activate(load(), "simchip")
import torch
from mst.training.adapters import load_model
model = load_model(Path(sys.argv[1]), "float32", "sdpa", torch.device("simchip:0"))
print(model.get_input_embeddings().weight is model.get_output_embeddings().weight)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model)],
        env=simchip_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr
