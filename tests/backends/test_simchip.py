"""The simulated chip keeps its promises, and each fault breaks the one that it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.simulated import installed, npu_environment, simchip_environment

LOADED = """
import warnings
warnings.simplefilter("error")
import torch, simchip
simchip.load()

def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

"""
LORA = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

# As of Llama 3: grouped queries, its rotary base, no biases.
CONFIG = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, rope_theta=500000.0,
              tie_word_embeddings=False, max_position_embeddings=64)

def losses(device, dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, adapters).to(device)
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    rows = torch.randint(0, 128, (4, 2, 16), generator=torch.Generator().manual_seed(1)).to(device)
    result = []
    for row in rows:
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=dtype != torch.float32):
            loss = model(input_ids=row, labels=row).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    assert {each.device.type for each in model.parameters()} == {rows.device.type}
    return result
"""


def run(code: str, environment: dict[str, str], *arguments: str) -> str:
    """Return what Python printed; a failed assertion in `code` fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_memory_is_counted_and_runs_out_and_comes_back() -> None:
    code = """
    MIB = 2**20
    memory = torch.accelerator
    first = torch.empty(3 * MIB, dtype=torch.uint8, device="simchip")
    assert memory.memory_allocated() == 3 * MIB
    small = torch.ones(1, device="simchip")
    assert memory.memory_allocated() == 3 * MIB + 512
    failure = raised(lambda: torch.empty(14 * MIB, dtype=torch.uint8, device="simchip"))
    assert failure.startswith("OutOfMemoryError: simchip out of memory"), failure
    assert f"{14 * MIB} bytes on device 0, which has {16 * MIB}" in failure, failure
    assert memory.memory_stats()["num_ooms"] == 1
    del first
    second = torch.empty(14 * MIB, dtype=torch.uint8, device="simchip")
    assert memory.max_memory_allocated() == 14 * MIB + 512
    assert torch.simchip.mem_get_info() == (2 * MIB - 512, 16 * MIB)
    del second
    memory.reset_peak_memory_stats()
    assert (small + 1).item() == 2
    assert memory.max_memory_allocated() == memory.max_memory_reserved() == 1024
    small.untyped_storage().resize_(0)
    assert memory.memory_allocated() == 0
    """
    run(LOADED + _dedent(code), simchip_environment(memory_bytes=16 * 2**20))


def test_devices_keep_apart() -> None:
    code = """
    def allocated():
        return [torch.accelerator.memory_allocated(each) for each in range(2)]

    assert torch.simchip.device_count() == torch.accelerator.device_count() == 2
    uuids = [torch.simchip.get_device_properties(each).uuid for each in range(2)]
    assert uuids == ["sim-2", "sim-0"]
    a = torch.arange(4.0, device="simchip:1", requires_grad=True)
    assert allocated() == [0, 512]
    (a * a).sum().backward()
    assert a.grad.device == torch.device("simchip:1") and a.grad.tolist() == [0, 2, 4, 6]
    assert allocated()[0] == 0 and torch.accelerator.current_device_index() == 0
    b = a.detach().to("simchip:0")
    assert b.tolist() == [0, 1, 2, 3] and b.device.index == 0
    host = torch.ones(4)
    for mixed in (lambda: a + b, lambda: torch.dot(a, b), lambda: torch.cat([a, b]),
                  lambda: b + host, lambda: torch.dot(b, host)):
        assert "two devices" in raised(mixed), raised(mixed)
    assert (b + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert b[torch.tensor([1])].item() == 1
    assert "there is no device 2" in raised(lambda: torch.ones(1, device="simchip:2"))
    with torch.simchip.device(1):
        assert torch.ones(1, device="simchip").device.index == 1
    """
    run(LOADED + _dedent(code), simchip_environment(3, SIMCHIP_VISIBLE_DEVICES="2,sim-0,7,1"))


def test_random_numbers_reproduce() -> None:
    code = """
    def draw(device="simchip:0"):
        dropped = torch.nn.functional.dropout(torch.ones(64, device=device), 0.5)
        return torch.cat([torch.randn(5, device=device), torch.rand(5, device=device), dropped])

    torch.manual_seed(7)
    first, other = draw(), draw("simchip:1")
    state = torch.get_device_module("simchip").get_rng_state("simchip:0")
    host = torch.get_rng_state()
    second = draw()
    assert torch.equal(torch.get_rng_state(), host), "the chip drew from the host's generator"
    torch.simchip.set_rng_state(state, "simchip:0")
    assert torch.equal(draw(), second) and not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(draw(), first) and torch.equal(first.cpu(), other.cpu())
    with torch.random.fork_rng(devices=[0], device_type="simchip"):
        draw()
    assert torch.equal(draw(), second)
    torch.manual_seed(2**64 - 1)
    assert torch.simchip.initial_seed() == 2**64 - 1
    own = torch.Generator("simchip:1").manual_seed(7)
    torch.manual_seed(7)
    wanted = torch.randn(6, device="simchip:1")
    assert torch.equal(torch.randn(6, device="simchip:1", generator=own), wanted)
    assert "device type for generator" in raised(
        lambda: torch.randn(6, device="simchip", generator=torch.Generator()))
    """
    run(LOADED + _dedent(code), simchip_environment(2))


def test_a_chip_without_bfloat16_refuses_it_everywhere() -> None:
    code = """
    wide, narrow = torch.ones(2, 2, device="simchip"), torch.ones(2, 2, dtype=torch.bfloat16)

    for call in (lambda: narrow.to("simchip"), lambda: wide.bfloat16(), lambda: wide.bfloat16() + 1,
                 lambda: torch.empty(2, dtype=torch.bfloat16, device="simchip"),
                 lambda: wide.sum(dtype=torch.bfloat16), lambda: wide.view(torch.bfloat16) == 1):
        assert "BFloat16, which this chip does not have" in raised(call), raised(call)
    assert "dtype is not supported" in raised(lambda: torch.autocast("simchip", torch.bfloat16))
    assert not torch.simchip.is_bf16_supported()
    assert torch.simchip.get_amp_supported_dtype() == [torch.float16]
    assert narrow.to("simchip", torch.float16).tolist() == [[1, 1], [1, 1]]
    assert (wide.half() @ wide.half()).tolist() == [[2, 2], [2, 2]]
    """
    run(LOADED + _dedent(code), simchip_environment(bf16=False))


def test_what_torch_expects_of_an_accelerator_is_there(tmp_path: Path) -> None:
    code = """
    import copy
    a = torch.ones(8, 8, device="simchip")
    assert torch.accelerator.current_accelerator().type == "simchip"
    with torch.autocast("simchip", torch.bfloat16):
        assert (a @ a).dtype == torch.nn.functional.linear(a, a).dtype == torch.bfloat16
        assert (a @ a).softmax(-1).dtype == torch.float32
        assert torch.nn.functional.layer_norm(a.bfloat16(), (8,)).dtype == torch.float32
    begin, end = (torch.Event("simchip", enable_timing=True) for _ in range(2))
    stream = torch.Stream("simchip")
    with stream:
        assert torch.accelerator.current_stream() == stream
        begin.record()
        b = a @ a
        end.record()
    assert torch.accelerator.current_stream() != stream
    end.synchronize()
    assert 0 < begin.elapsed_time(end) < 10_000
    pinned = torch.ones(4).pin_memory()
    assert pinned.is_pinned() and not torch.ones(4).is_pinned()
    assert pinned.to("simchip", non_blocking=True).tolist() == [1] * 4
    torch.save({"a": a, "p": torch.nn.Parameter(b)}, FILE)
    for where in ("simchip:1", "cpu"):
        loaded = torch.load(FILE, map_location=where)
        assert str(loaded["a"].device) == str(loaded["p"].device) == where
        assert torch.equal(loaded["p"].cpu(), b.cpu())
    assert torch.load(FILE)["a"].is_simchip and torch.ones(1).simchip().is_simchip
    assert copy.deepcopy(a).device == a.device
    scaler = torch.amp.GradScaler("simchip", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(2, device="simchip"))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for factor, wanted in ((1.0, 0.5), (float("inf"), 0.5)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [wanted, wanted]
    assert scaler.get_scale() == 2.0
    """
    code = _dedent(code).replace("FILE", repr(str(tmp_path / "tensors.pt")))
    run(LOADED + code, simchip_environment(2))


def test_views_and_in_place_operators_write_where_they_should() -> None:
    code = """
    def results(device):
        x = torch.arange(24.0).reshape(4, 6).to(device)
        y = x.t()
        y[1].add_(1); y[::2].mul_(3); x[:, 3:].copy_(x[:, :3].flip(0)); x.view(-1)[5:7].zero_()
        torch.add(x, 1, out=y.t())
        x.unfold(1, 2, 2).neg_()
        x.masked_fill_(x > 20, 7)[torch.tensor([0, 2])] = 1
        grown = torch.empty(0, device=device)
        torch.mm(x, y, out=grown)
        z = torch.view_as_complex(x.reshape(-1, 2)).conj()
        torch.view_as_real(z.resolve_conj())[0].sub_(2)
        index = torch.tensor([[1, 0], [0, 1]], device=device)
        spread = torch.zeros(2, 2, device=device).scatter_add_(0, index, x[:2, :2])
        parts = [x.clone(), y.clone()]
        torch._foreach_mul_(parts, 2.0)
        top = x.topk(2)
        s = torch.empty(3, device=device).set_(x.untyped_storage(), 2, (3,), (2,))
        z = torch.view_as_real(z.resolve_conj())
        return [x, y, grown, z, spread, *parts, *top, s, x.expand(2, 4, 6).sum(0)]

    for at, (one, other) in enumerate(zip(results("cpu"), results("simchip"), strict=True)):
        assert torch.equal(one, other.cpu()), (at, one, other)
    """
    run(LOADED + _dedent(code), simchip_environment())


def test_each_fault_is_reached_by_the_environment() -> None:
    fault = (
        "nan:aten::mm,missing:aten::silu,fail:aten::tanh.out,skew:aten::sin=0.5,stats:2,seed,"
        "rng_state,dtype:float16,slow:20000"
    )
    code = """
    import time
    a = torch.ones(2, 2, device="simchip")
    assert torch.accelerator.memory_allocated() == 1024
    assert (a @ a).isnan().all() and not (a + a).isnan().any()
    failure = raised(lambda: torch.nn.functional.silu(a))
    assert failure.startswith("NotImplementedError: Could not run 'aten::silu'"), failure
    assert "injected failure in aten::tanh" in raised(a.tanh)
    assert (a.sin().cpu() / torch.ones(2, 2).sin()).sub(1.5).abs().max() < 1e-6
    assert "Half, which this chip does not have" in raised(a.half)
    draws = [torch.manual_seed(1) and torch.randn(4, device="simchip").tolist() for _ in range(2)]
    assert draws[0] != draws[1]
    state = torch.simchip.get_rng_state()
    draws = [torch.simchip.set_rng_state(state) or torch.rand(4, device="simchip").tolist()
             for _ in range(2)]
    assert draws[0] != draws[1]
    began = time.perf_counter()
    a.cos()
    assert time.perf_counter() - began > 0.02
    simchip.clear_faults()
    assert (a @ a).tolist() == [[2, 2], [2, 2]] and torch.accelerator.memory_allocated() == 512
    """
    run(LOADED + _dedent(code), simchip_environment(fault=fault))


def test_memory_faults() -> None:
    code = """
    MIB = 2**20
    def take(count):
        return torch.empty(count * MIB, dtype=torch.uint8, device="simchip")

    assert raised(lambda: take(9)).startswith("RuntimeError: simchip out of memory")
    assert torch.simchip.mem_get_info()[1] == 16 * MIB
    take(4)
    assert torch.accelerator.memory_allocated() == 4 * MIB, "a leak keeps what is freed"
    simchip.clear_faults()
    assert raised(lambda: take(13)).startswith("OutOfMemoryError")
    assert raised(lambda: take(12)) == "nothing"
    """
    environment = simchip_environment(memory_bytes=16 * 2**20, fault="capacity:0.5,oom,leak")
    run(LOADED + _dedent(code), environment)


def test_a_lost_device_stays_lost(tmp_path: Path) -> None:
    code = """
    from pathlib import Path
    a = torch.ones(4, device="simchip", requires_grad=True)  # an empty and a fill
    (a * 2).sum()  # a mul, a sum and their two allocations
    assert sum(simchip.calls().values()) == 6, simchip.calls()
    lost = "RuntimeError: simchip: device lost"
    for call in (lambda: a * 2, a.cpu, lambda: torch.ones(1, device="simchip"),
                 torch.accelerator.synchronize):
        assert raised(call) == lost, raised(call)
    simchip.clear_faults()
    simchip.inject("lost_file:FILE")
    loss = (a * a).sum()
    Path("FILE").touch()
    simchip.inject("lost:1")
    assert raised(loss.backward) == lost
    simchip.clear_faults()
    (a * a).sum().backward()
    simchip.inject("lost_file:FILE")
    assert raised(lambda: [a.detach() + each for each in range(64)]) == lost
    """
    code = _dedent(code).replace("FILE", str(tmp_path / "lost"))
    run(LOADED + code, simchip_environment(fault="lost:6"))


def test_lora_gives_the_cpus_losses() -> None:
    code = """
    import simchip
    simchip.load()
    exact = [losses(each, torch.float32) for each in ("cpu", "simchip:0")]
    assert exact[0][-1] != exact[0][0]
    differences = [abs(one - other) for one, other in zip(*exact, strict=True)]
    assert max(differences) < 1e-5, exact
    rounded = [losses(each, torch.bfloat16) for each in ("cpu", "simchip:0")]
    assert max(abs(one - other) for one, other in zip(*rounded, strict=True)) < 0.05, rounded
    """
    run(LORA + _dedent(code), simchip_environment())


def test_two_ranks_average_their_gradients(tmp_path: Path) -> None:
    code = """
    import sys
    import torch.distributed as dist
    rank, device = int(sys.argv[1]), f"simchip:{sys.argv[1]}"
    torch.accelerator.set_device_index(rank)
    dist.init_process_group("cpu:gloo,simchip:simccl", init_method=f"file://{sys.argv[2]}",
                            rank=rank, world_size=2)
    mine = lambda: torch.full((2,), rank + 1.0, device=device)

    torch.manual_seed(0)
    model, rows = torch.nn.Linear(8, 4), torch.randn(4, 8)
    model(rows).square().mean().backward()
    wanted = model.weight.grad.clone()
    model.zero_grad()
    ranks = torch.nn.parallel.DistributedDataParallel(model.to(device), device_ids=[rank])
    ranks(rows.chunk(2)[rank].to(device)).square().mean().backward()
    torch.testing.assert_close(model.weight.grad.cpu(), wanted)
    assert model.weight.grad.device == torch.device(device)

    for op, result in (("SUM", 3), ("MAX", 2), ("AVG", 1.5)):
        shared = mine()
        work = dist.all_reduce(shared, getattr(dist.ReduceOp, op), async_op=True)
        work.wait()
        assert work.is_completed() and shared.tolist() == [result] * 2
        assert work.get_future().value()[0].device == shared.device
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        shared = mine().to(dtype)
        dist.all_reduce(shared)
        assert shared.tolist() == [3, 3]
    shared = mine()
    dist.broadcast(shared, 1)
    assert shared.tolist() == [2, 2]
    shared = mine()
    dist.reduce(shared, 1)
    assert shared.tolist() == [rank + 1 + rank] * 2 or rank == 0
    gathered = [mine() for _ in range(2)]
    dist.all_gather(gathered, mine())
    assert [each.tolist() for each in gathered] == [[1, 1], [2, 2]]
    # Renamed in torch 2.13.
    single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    whole = torch.empty(4, device=device)
    single(whole, mine())
    assert whole.tolist() == [1, 1, 2, 2]
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    part = torch.empty(2, device=device)
    scatter(part, torch.arange(4.0, device=device))
    assert part.tolist() == [[0, 2], [4, 6]][rank]
    if rank == 0:
        dist.send(mine(), 1)
    else:
        dist.recv(part, 0)
        assert part.tolist() == [1, 1]
    names = [None, None]
    dist.all_gather_object(names, device)
    assert names == ["simchip:0", "simchip:1"]
    on_host = torch.tensor([rank])
    dist.all_reduce(on_host)
    assert on_host.item() == 1
    dist.barrier()

    simchip.inject("collective")
    shared = mine()
    dist.all_reduce(shared)
    assert shared.tolist() == [4, 3]
    dist.destroy_process_group()
    """
    environment = {**simchip_environment(2), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADED + _dedent(code)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert [rank.returncode for rank in ranks] == [0, 0], outputs


def test_renamed_npu_it_stands_in_for_an_ascend() -> None:
    code = """
    import torch.distributed as dist
    from transformers.utils.import_utils import is_torch_npu_available
    assert is_torch_npu_available() and torch.npu.device_count() == 1
    import torch_npu
    assert torch_npu.npu is torch.npu and torch_npu.__version__.startswith(TORCH)
    assert dist.is_backend_available("hccl")
    one, other = losses("cpu", torch.float32), losses("npu:0", torch.float32)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-5, (one, other)

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, device="npu") for heads in (4, 2, 2))
    causal = torch.ones(2048, 2048, device="npu", dtype=torch.bool).triu(1)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True)
    layouts = {
        "BNSD": lambda x: x, "BSND": lambda x: x.transpose(1, 2),
        "BSH": lambda x: x.transpose(1, 2).flatten(2),
        "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
        "TND": lambda x: x.transpose(1, 2).flatten(0, 1),
    }
    ends = dict(actual_seq_qlen=(6, 12), actual_seq_kvlen=(6, 12))
    for layout, lay in layouts.items():
        for mode, mask in ((0, causal[:6, :6]), (2, causal), (3, causal)):
            got = torch_npu.npu_fusion_attention(
                *map(lay, (q, k, v)), 4, layout, atten_mask=mask, sparse_mode=mode, scale=8**-0.5,
                **(ends if layout == "TND" else {}))[0]
            torch.testing.assert_close(got, lay(wanted), msg=lambda text: f"{layout} {mode} {text}")
    short = torch_npu.npu_fusion_attention(q[:, :, 4:], k, v, 4, "BNSD", atten_mask=causal,
                                           sparse_mode=3, scale=8**-0.5)[0]
    torch.testing.assert_close(short, wanted[:, :, 4:])
    x, gamma = torch.randn(3, 8, device="npu"), torch.rand(8, device="npu")
    torch.testing.assert_close(torch_npu.npu_rms_norm(x, gamma, 1e-5)[0],
                               torch.nn.functional.rms_norm(x, (8,), gamma, 1e-5))
    """
    release = "import importlib.metadata\nTORCH = importlib.metadata.version('torch')[:4]\n"
    environment = npu_environment(2, ASCEND_RT_VISIBLE_DEVICES="1")
    run(LORA + release + _dedent(code), environment)


@pytest.mark.parametrize(
    "more", [{"SIMCHIP_DEVICES": "0"}, {"SIMCHIP_BUILD_DIR": "/nonexistent"}], ids=["none", "build"]
)
def test_the_stand_in_does_not_break_torch_where_no_chip_is(more: dict[str, str]) -> None:
    code = "import torch; print(hasattr(torch, 'npu'), torch.accelerator.is_available())"

    assert run(code, {**npu_environment(), **more}).split()[0] == "False"


def probed(**environment: str) -> dict[str, Any]:
    """Return what the plugin says in this environment, and whether it imported torch."""
    code = (
        "import json, sys; from dataclasses import asdict; import mst_simchip as one;"
        "probe = one.mst_probe(); devices = probe.devices;"
        "capabilities = [asdict(one.mst_capabilities(each)) for each in devices];"
        "narrow = one.mst_environment(devices[1:]) if devices[1:] else {};"
        "health = [one.mst_health(each) for each in devices];"
        "print(json.dumps([asdict(probe), capabilities, narrow, health, 'torch' in sys.modules]))"
    )
    names = ("probe", "capabilities", "environment", "health", "torch")
    printed = run(code, {**simchip_environment(), **environment})
    return dict(zip(names, json.loads(printed), strict=True))


def test_the_plugin_reports_its_chips_without_torch(tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    lost.touch()
    found = probed(
        SIMCHIP_DEVICES="4",
        SIMCHIP_VISIBLE_DEVICES="1,3",
        SIMCHIP_BF16="0",
        SIMCHIP_LOST_FILE=str(lost),
    )

    probe = found["probe"]
    assert (probe["found"], probe["usable"], probe["reason"]) == (True, True, "")
    first, second = probe["devices"]
    assert (first["index"], first["uuid"], second["index"], second["uuid"]) == (
        0,
        "sim-1",
        1,
        "sim-3",
    )
    assert first["dtypes"] == ["float16", "float32"]
    assert first["memory_total_bytes"] == 4 * 2**30
    assert set(first["sources"]) == {"memory_total_bytes", "memory_free_bytes"}
    assert first["peak_tflops"] == {}
    # The second of the visible ones is the fourth that is plugged in.
    assert found["environment"] == {"SIMCHIP_VISIBLE_DEVICES": "sim-3"}
    assert found["health"][0] == [f"SimChip v1 sim-1 is lost: remove {lost} to plug it in again"]
    assert found["torch"] is False


@pytest.mark.parametrize(
    ("environment", "is_found", "reason"),
    [
        ({"SIMCHIP_DEVICES": "0"}, False, "no chip is plugged in: set SIMCHIP_DEVICES"),
        (
            {"SIMCHIP_VISIBLE_DEVICES": "5"},
            True,
            "SIMCHIP_VISIBLE_DEVICES='5' hides all 1 of them: unset it",
        ),
        (
            {"SIMCHIP_BUILD_DIR": "/nonexistent"},
            True,
            "the simchip driver library is not built: run `python -m simchip.build`",
        ),
        ({"SIMCHIP_NAME": "npu"}, False, "the simulated chip plays another one: SIMCHIP_NAME=npu"),
        (
            {"SIMCHIP_DEVICES": "two"},
            False,
            "SIMCHIP_DEVICES='two': a whole number from 0 to 16",
        ),
        ({"SIMCHIP_FAULT": "nan"}, False, "SIMCHIP_FAULT has 'nan'; it takes fail:OPERATOR"),
        ({"SIMCHIP_FAULT": "lost:soon"}, False, "SIMCHIP_FAULT has 'lost:soon'; it takes"),
        ({"SIMCHIP_FAULT": "dtype:bf16"}, False, "SIMCHIP_FAULT has 'dtype:bf16'; it takes"),
    ],
)
def test_the_plugin_says_what_to_fix(
    environment: dict[str, str], is_found: bool, reason: str
) -> None:
    found = probed(**environment)

    probe = found["probe"]
    assert (probe["found"], probe["usable"]) == (is_found, False)
    assert str(probe["reason"]).startswith(reason)
    assert found["torch"] is False


def test_the_builder_names_the_compiler_that_is_missing_or_fails(tmp_path: Path) -> None:
    for compiler, message in (
        ("no-such-g++", "needs the C++ compiler 'no-such-g++', which can't be run"),
        ("false", "false could not compile simchip"),
    ):
        environment = {
            **os.environ,
            "PYTHONPATH": str(installed("simchip")),
            "SIMCHIP_BUILD_DIR": str(tmp_path),
            "CXX": compiler,
        }
        done = subprocess.run(
            [sys.executable, "-m", "simchip.build"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 1
        assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def _dedent(code: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in code.splitlines()) + "\n"
