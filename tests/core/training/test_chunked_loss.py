"""The loss from hidden states, chunk by chunk, is that of all logits, and so are its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mst.data.encode import Example
from mst.training import batches
from mst.training.adapters import prepare_model
from mst.training.batches import Batch, collate
from mst.training.checkpoint import TrainState
from mst.training.chunked_loss import chunked_log_probs
from mst.training.loop import run
from mst.training.loss import Logits, compute_in, token_log_probs
from mst.training.output_head import HeadForm, head_form
from mst.training.session import Session

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 6400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def causal(kind: str, **more: Any) -> torch.nn.Module:
    """Return a small model with random weights, its logits large enough for caps to bend them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    model: torch.nn.Module = models.from_config(configs.for_model(kind, **SHAPE | more))
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(2)
    return model


FORMS = {
    "llama": HeadForm(),
    "gemma2": HeadForm(softcap=2.0),
    "granite": HeadForm(multiplier=0.25),
    "cohere": HeadForm(multiplier=0.5),
}
OPTIONS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.5},
}


def found(
    model: torch.nn.Module, batch: Batch, how: Logits, temperature: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probabilities, and gradients of an uneven sum of them."""
    model.zero_grad()
    values = token_log_probs(model, batch, how, temperature)
    weights = torch.linspace(0.5, 2, values.numel()).view_as(values)
    (values * weights).sum().backward()  # type: ignore[no-untyped-call]
    named = model.named_parameters()
    return values.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(model: torch.nn.Module, batch: Batch, form: HeadForm, near: float = 1e-5) -> None:
    values, gradients = found(model, batch, "all")
    chunked, of_chunks = found(model, batch, form)

    assert torch.allclose(chunked, values, atol=near, rtol=near)
    assert of_chunks.keys() == gradients.keys()
    for name, each in gradients.items():
        scale = float(each.abs().max())
        assert torch.allclose(of_chunks[name], each, atol=near * max(1.0, scale), rtol=near), name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 labels: there are 26 in the examples, so one chunk is cut short."""
    monkeypatch.setattr(batches, "CHUNK_LOGITS", 6400 * 16)
    monkeypatch.setattr(batches, "CHUNK_ROWS_AT_LEAST", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("frozen", [True, False])
def test_equals_all_logits(kind: str, frozen: bool, examples: list[Example]) -> None:
    model = causal(kind, **OPTIONS[kind])
    head: Any = model
    head.get_output_embeddings().weight.requires_grad_(not frozen)
    form = head_form(model, CPU)

    assert form is not None
    assert form.softcap == FORMS[kind].softcap
    assert form.multiplier == pytest.approx(FORMS[kind].multiplier, rel=1e-4)
    assert_same(model, collate(examples, 0, "lines"), form)
    assert_same(model, collate(examples, 0, "padded"), form)


@pytest.mark.usefixtures("small_chunks")
def test_a_head_with_a_bias_and_a_temperature(examples: list[Example]) -> None:
    model = causal("phi", partial_rotary_factor=0.5)
    batch = collate(examples, 0, "lines")
    form = head_form(model, CPU)

    assert form == HeadForm()
    plain, gradients = found(model, batch, "all", temperature=0.7)
    chunked, of_chunks = found(model, batch, form, temperature=0.7)

    assert torch.allclose(chunked, plain, atol=1e-5)
    assert torch.allclose(of_chunks["lm_head.bias"], gradients["lm_head.bias"], atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", [True, False])
def test_bfloat16_is_as_near_to_float32_as_all_logits_are(
    trained: bool, examples: list[Example]
) -> None:
    model = causal("llama")
    whole: Any = model
    whole.lm_head.weight.requires_grad_(trained)
    batch = collate(examples, 0, "lines")
    exact, slopes = found(model, batch, "all")
    errors = {}
    for how in ("all", HeadForm()):
        with compute_in(model, "cpu", torch.bfloat16):
            values, gradients = found(model, batch, how)
        off = [
            float((gradients[name] - each).norm() / each.norm()) for name, each in slopes.items()
        ]
        errors[how] = float((values - exact).abs().max()), max(off)

    assert errors[HeadForm()][0] <= 1.1 * errors["all"][0]
    assert errors[HeadForm()][1] <= 1.1 * errors["all"][1]


def test_a_likely_label_of_large_logits_is_hardly_rounded_in_bfloat16() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 6400, bias=False)
    targets = torch.arange(64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(6400, 64).bfloat16())
        # Logits of the labels are about 30, and those of a rival each about as large.
        head.weight[64:128] = (head.weight[:64] + 0.02 * torch.randn(64, 64)).bfloat16()
        states = (head.weight[:64] * 0.5).bfloat16()
        exact = -torch.nn.functional.cross_entropy(
            states.double() @ head.weight.double().t(), targets, reduction="none"
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = chunked_log_probs(states, head, targets, HeadForm())
            plain = -torch.nn.functional.cross_entropy(
                head(states).float(), targets, reduction="none"
            )

    assert float((plain - exact).abs().mean()) > 0.02
    assert float((found - exact).abs().mean()) < 0.002


def test_no_tensor_of_all_labels_and_the_vocabulary_is_made(examples: list[Example]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            made = func(*args, **kwargs or {})
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (6400,):
                largest = max(largest, made.numel())
            return made

    model = causal("llama")
    model.requires_grad_(False)
    whole: Any = model
    whole.model.embed_tokens.weight.requires_grad_(True)
    rows = [each for each in examples for _ in range(200)]
    batch = collate(rows, 0, "lines")
    with Watch():  # type: ignore[no-untyped-call]
        found(model, batch, HeadForm())

    assert batch.label_tokens == 26 * 200
    assert largest == 6400 * batches.chunk_rows(6400)


def test_a_head_that_does_more_than_its_weight_is_left_alone(examples: list[Example]) -> None:
    from peft import LoraConfig

    adapted = prepare_model(causal("llama"), LoraConfig(target_modules=["lm_head"]))

    assert head_form(adapted, CPU) is None

    scaled: Any = causal("llama")
    scaled.lm_head.register_forward_hook(lambda module, given, made: made**3)

    assert head_form(scaled, CPU) is None


def test_switched_off_the_model_makes_its_own_logits_and_learns_the_same(
    begin: Callable[..., Session], examples: list[Example], record: Any
) -> None:
    chunked = begin(chunked_loss=True)
    run(chunked, TrainState())
    losses = [each.loss for each in record.steps]
    plain = begin(chunked_loss=False)
    run(plain, TrainState())

    assert (chunked.logits, plain.logits) == (HeadForm(), "kept")
    assert [each.loss for each in record.steps[len(losses) :]] == pytest.approx(losses, abs=1e-5)
