"""Compiled layers compute what plain ones do, once compiled, whatever a micro-batch's size."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.training.conftest import tiny_plan

from mst.data.encode import Example
from mst.data.rows import Row
from mst.errors import MstError
from mst.request import TrainRequest
from mst.training.adapters import (
    decoder_layers,
    enable_checkpointing,
    lora_config,
    prepare_model,
)
from mst.training.batches import collate, collate_lines
from mst.training.block_attention import use_block_attention
from mst.training.compilation import compile_layers, kernel_cache
from mst.training.loss import summed_loss
from mst.training.objectives import find_objective
from mst.training.output_head import HeadForm
from mst.training.tensor_kind import TensorKind, tensor_kind

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of this file keep kernels."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what the compiler is told."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def causal(kind: str, adapted: bool, **more: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    config = configs.for_model(kind, **SHAPE | more)
    model = prepare_model(
        models.from_config(config), lora_config(TrainRequest(lora_rank=4)) if adapted else None
    )
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.05)
    return model


def row(length: int, stride: int = 1) -> Example:
    ids = array("i", [stride * place % 500 for place in range(1, length + 1)])
    return Example(ids, ids, Row((), "memory", 1))


# Of several sizes, and one that is no line among several: it runs uncompiled.
BATCHES = (
    [[row(70, 3)], [row(40, 7), row(30)]],
    [[row(100, 5), row(20)], [row(120)], [row(33, 11)] * 3, [row(9)]],
    [[row(50)], [row(50, 3)], [row(50, 7)]],
    [[row(90, 13)]],
)


def learned(model: torch.nn.Module) -> list[tuple[float, list[torch.Tensor]]]:
    """Return each micro-batch's loss and gradients."""
    found = []
    for lines in BATCHES:
        model.zero_grad()
        loss: Any = summed_loss(model, collate_lines(lines, 0, "alike"), HeadForm())
        loss.backward()
        given = [each.grad for each in model.parameters() if each.grad is not None]
        found.append((float(loss.detach()), [each.clone() for each in given]))
    model.zero_grad()
    return found


MASKED = TensorKind(several=True, masked=True)


def compiled(model: torch.nn.Module, cache: Path, kind: TensorKind = MASKED) -> str:
    return compile_layers(model, CPU, torch.float32, "alike", kind, HeadForm(), False, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "adapted", "more"),
    [
        ("llama", True, {}),
        ("gemma3_text", False, {"head_dim": 16, "sliding_window": 32}),
    ],
)
def test_losses_and_gradients_are_those_of_plain_layers(
    kind: str, adapted: bool, more: dict[str, Any], cache: Path
) -> None:
    from torch._dynamo import config as dynamo

    model = causal(kind, adapted, **more)
    if not adapted:
        enable_checkpointing(model, 1)
    plain = learned(model)
    types = {type(each) for each in model.modules()}

    assert compiled(model, cache) == ""
    assert {type(each) for each in model.modules()} != types
    untyped: Any = dynamo
    with untyped.patch(error_on_recompile=True):
        fast = learned(model)
    for (loss, gradients), (other, others) in zip(plain, fast, strict=True):
        assert other == pytest.approx(loss, rel=1e-5)
        for one, two in zip(gradients, others, strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    # Compiled code is really run: the one line at the end is computed as before, to the bit.
    same = [
        all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
        for one, two in zip(plain, fast, strict=True)
    ]
    assert same == [False, False, False, True]


@pytest.mark.slow
def test_rows_that_need_no_mask_go_through_compiled_layers(
    tiny_model: Path, cache: Path, torchs_own_again: None
) -> None:
    model = causal("llama", adapted=True, num_hidden_layers=1)
    # Full lines of a row each, whose positions restart nowhere.
    rows = [row(128, 3), row(128, 5), row(128, 7)]
    request, plan = TrainRequest(), tiny_plan(tiny_model, per_device_train_batch_size=3)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss: Any = summed_loss(model, collate(rows, 0, "alike"), HeadForm())
        loss.backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    plain = gradients()
    use_block_attention()

    kind = tensor_kind(plan, request, find_objective(request), rows, "alike")
    assert compiled(model, cache, kind) == ""
    (layer,) = decoder_layers(model)
    untyped: Any = type(layer)
    untyped.ran = False
    for one, two in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert untyped.ran


@pytest.mark.slow
def test_layers_on_nf4_weights_are_compiled_and_keep_none_of_them_unpacked(
    tmp_path: Path, cache: Path
) -> None:
    from mst.training.adapters import load_model
    from mst.training.quantization import dequantized_weight, quantized_layers

    base: Any = causal("llama", adapted=False)
    base.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "float32", "sdpa", CPU, "nf4")
    torch.manual_seed(0)
    model = prepare_model(loaded, lora_config(TrainRequest(lora_rank=4)))
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.05)
    plain = learned(model)
    weights = [dequantized_weight(each) for _, each in quantized_layers(model)]

    assert compiled(model, cache) == ""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fast = learned(model)
    for (loss, gradients), (other, others) in zip(plain, fast, strict=True):
        assert other == pytest.approx(loss, rel=1e-5)
        for one, two in zip(gradients, others, strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert any(each.dtype == torch.uint8 for each in kept)
    for (_, layer), weight in zip(quantized_layers(model), weights, strict=True):
        assert torch.equal(dequantized_weight(layer), weight)
        assert not any(torch.equal(each, weight) or torch.equal(each, weight.T) for each in kept)


@pytest.mark.slow
def test_wrongly_compiled_gradients_are_found_and_the_layers_left_as_they_were(
    cache: Path,
) -> None:
    # Threads write into the one key that its heads share.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model = causal("falcon", adapted=True)
    try:
        plain = learned(model)
        reason = compiled(model, cache)
    finally:
        torch.set_num_threads(threads)

    assert "its gradients differ by" in reason
    for (loss, gradients), (other, others) in zip(plain, learned(model), strict=True):
        assert loss == other
        assert all(torch.equal(one, two) for one, two in zip(gradients, others, strict=True))


def test_a_model_without_layers_that_transformers_names_is_left_alone(cache: Path) -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    class Plain(PreTrainedModel):  # type: ignore[no-untyped-call]
        config_class = PreTrainedConfig

        def get_output_embeddings(self) -> Any:
            return None

    reason = compiled(Plain(PreTrainedConfig()), cache)

    assert reason == "transformers does not say which of this model's modules are its layers"


def test_kernels_are_kept_where_nobody_else_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernel_cache(tmp_path)

    assert found.stat().st_mode & 0o077 == 0
    assert kernel_cache(tmp_path) == found
    changed = tmp_path / "operators.py"
    changed.write_text("# operators of another version of mst")
    with monkeypatch.context() as patch:
        patch.setattr("mst.training.compilation._OPERATORS", (changed,))
        assert kernel_cache(tmp_path) != found
    found.chmod(0o777)
    with pytest.raises(
        MstError, match=rf"others than you may write to it. Remove it \(rm -r {found}"
    ):
        kernel_cache(tmp_path)


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")

    assert "Not a directory" in compiled(causal("llama", adapted=True), file)
