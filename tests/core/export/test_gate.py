"""Exports that are not what was trained are found, each kind of fault by itself."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mst.cache import cache_dir
from mst.data.encode import Example, encode
from mst.data.formats import read
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer
from mst.demo import demo_data
from mst.export import Bounds
from mst.export.figures import Distance, Reference, distance, reference
from mst.export.gate import (
    Quality,
    compared,
    lost_words,
    merge_faults,
    put_weights,
    quality_faults,
    side_faults,
    weight_faults,
)
from mst.export.loaded import cast_faults, lost_share
from mst.model.gguf import convert
from mst.model.locate import default_model

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]

BOUNDS = Bounds(perplexity_ratio=1.25, mean_kl=0.2, agreement=0.8)
LAYER = "model.layers.{}.{}.weight"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real model."""
    return convert(default_model().path, cache_dir())


@pytest.fixture(scope="module")
def rows(smollm2: Path) -> list[Example]:
    """Twelve rows of the demo, as the model reads them."""
    found = read((f"{demo_data()[1]}#12",))
    encoded = encode(found.rows, load_tokenizer(smollm2), load_template(smollm2, None), None)
    return list(encoded.examples)


@pytest.fixture(scope="module")
def trained(smollm2: Path) -> torch.nn.Module:
    """The model with an adapter's difference in it, as tuning leaves one, in float32."""
    import torch

    from mst.training.adapters import load_model

    model = load_model(smollm2, "float32", "sdpa", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                out, width = weight.shape
                left = torch.randn(out, 8, generator=generator)
                right = torch.randn(8, width, generator=generator)
                change = left @ right
                weight.add_(change * (0.3 * weight.norm() / change.norm()))
    return model.eval()


@pytest.fixture(scope="module")
def judged(trained: torch.nn.Module, rows: list[Example]) -> Reference:
    """What it says of the rows."""
    return reference(trained, rows)


@pytest.fixture(scope="module")
def candidate(trained: torch.nn.Module) -> torch.nn.Module:
    """A model of the same shape, to put weights into."""
    import copy

    return copy.deepcopy(trained)


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def faults(
    trained: torch.nn.Module, candidate: torch.nn.Module, weights: Weights, judged: Reference
) -> list[str]:
    """Return what the gate says of weights that an artefact gives."""
    found = put_weights(candidate, weights.items())
    return found or [
        *weight_faults(trained, candidate, 0.3),
        *quality_faults(Quality(distance(judged, candidate)), BOUNDS),
    ]


def wrong_scale(weights: Weights) -> None:
    weights[LAYER.format(5, "mlp.up_proj")] *= 2


def swapped_layers(weights: Weights) -> None:
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
        one, other = LAYER.format(3, part), LAYER.format(20, part)
        weights[one], weights[other] = weights[other], weights[one]


def transposed_square(weights: Weights) -> None:
    for layer in range(30):
        name = LAYER.format(layer, "self_attn.o_proj")
        weights[name] = weights[name].T.contiguous()


def transposed(weights: Weights) -> None:
    name = LAYER.format(5, "mlp.up_proj")
    weights[name] = weights[name].T.contiguous()


def overflow(weights: Weights) -> None:
    weights[LAYER.format(5, "mlp.up_proj")] = (
        (weights[LAYER.format(5, "mlp.up_proj")] * 1e7).half().float()
    )


def missing(weights: Weights) -> None:
    del weights["model.norm.weight"]


def zero_point_off_by_one(weights: Weights) -> None:
    from mst_plugins.layouts.rounding import dequantize, round_to_nearest

    for name, weight in weights.items():
        if "_proj" in name:
            codes = round_to_nearest(weight, 4, 32, symmetric=True)
            codes.zeros.add_(1)
            weights[name] = dequantize(codes)


INJECTED: list[tuple[Callable[[Weights], None], str]] = [
    (wrong_scale, "model.layers.5.mlp.up_proj.weight differs from what was trained by 1 of"),
    (swapped_layers, "times the trained model's"),
    (transposed_square, "times the trained model's"),
    (transposed, "has the shape (576, 1536), which was (1536, 576)"),
    (overflow, "holds NaN or infinity"),
    (missing, "model.norm.weight is missing"),
    (zero_point_off_by_one, "times the trained model's"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inject", "said"), INJECTED, ids=lambda each: getattr(each, "__name__", "")
)
def test_a_damaged_model_does_not_pass(
    trained: torch.nn.Module, candidate: torch.nn.Module, judged: Reference,
    inject: Callable[[Weights], None], said: str,
) -> None:  # fmt: skip
    weights = weights_of(trained)
    inject(weights)

    assert any(said in each for each in faults(trained, candidate, weights, judged))


@pytest.mark.slow
def test_the_model_itself_passes_and_without_its_adapter_it_does_not(
    trained: torch.nn.Module, candidate: torch.nn.Module, judged: Reference, smollm2: Path
) -> None:
    import torch

    from mst.training.adapters import load_model

    base = load_model(smollm2, "float32", "sdpa", torch.device("cpu"))

    assert faults(trained, candidate, weights_of(trained), judged) == []
    assert faults(trained, candidate, weights_of(base), judged) != []
    assert cast_faults(trained, base, "bfloat16") != []
    assert cast_faults(base, base, "bfloat16") == []


def test_a_head_of_its_own_must_be_there(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    own, tied = (
        LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=each)) for each in (False, True)
    )
    without = {k: v for k, v in weights_of(own).items() if k != "lm_head.weight"}

    assert put_weights(own, without.items()) == ["lm_head.weight is missing"]
    assert put_weights(tied, weights_of(tied).items()) == []


def test_logits_of_kept_hidden_states_are_the_models_own(
    trained: torch.nn.Module, judged: Reference
) -> None:
    import torch

    # All rows begin with the same 14 tokens, which are read once.
    begin, first, *_ = judged.passes
    rows, width = first.ids.shape
    ids = torch.cat([begin.ids.expand(rows, -1), first.ids], dim=1)
    mask = torch.cat([begin.mask.expand(rows, -1), first.mask], dim=1)
    with torch.inference_mode():
        own = trained(input_ids=ids, attention_mask=mask).logits
        once, again = judged.logits(0), judged.logits(1)

    assert begin.times == 12
    assert ((again - own[:, -width:]).abs() * first.mask[..., None]).max() < 1e-3
    assert (once - own[:1, :-width]).abs().max() < 1e-3


def test_an_answer_that_is_not_a_number_is_infinitely_far() -> None:
    import torch

    class Nowhere(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            import types

            return types.SimpleNamespace(logits=torch.full((*input_ids.shape, 8), torch.nan))

    class Somewhere(Nowhere):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            import types

            return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))

    row = Example(array("i", [1, 2, 3]), array("i", [-100, 2, 3]), None)  # type: ignore[arg-type]
    found = distance(reference(Somewhere(), [row]), Nowhere())

    assert found.mean_kl == found.perplexity_ratio == float("inf")
    assert len(quality_faults(Quality(found), BOUNDS)) >= 2


def test_answers_are_measured_apart_from_prompts() -> None:
    import torch

    class Favours(torch.nn.Module):
        """Gives each token that follows a 5 or a 6 a logit of its own."""

        def __init__(self, after_5: float, after_6: float) -> None:
            super().__init__()
            self.logit = {5: after_5, 6: after_6}

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            import types

            logits = torch.zeros(*input_ids.shape, 8)
            for place, before in enumerate(input_ids[0].tolist()):
                logits[0, place, 7] = self.logit.get(before, 0.0)
            return types.SimpleNamespace(logits=logits)

    # After 5 stands a 7 of the prompt, after 6 one of the answer.
    row = Example(
        array("i", [5, 7, 6, 7]), array("i", [-100, -100, -100, 7]), None  # type: ignore[arg-type]
    )  # fmt: skip
    prompt = distance(reference(Favours(3, 3), [row]), Favours(0, 3))
    answer = distance(reference(Favours(3, 3), [row]), Favours(3, 0))

    assert (prompt.tokens, prompt.trained_tokens) == (3, 1)
    assert (prompt.trained_ratio, prompt.trained_kl) == (1, 0)
    assert prompt.perplexity_ratio == pytest.approx(answer.perplexity_ratio)
    assert prompt.perplexity_ratio > 1.5
    # All of the loss lies on one token of three.
    assert answer.trained_ratio == pytest.approx(answer.perplexity_ratio**3)
    assert answer.trained_kl == pytest.approx(3 * answer.mean_kl)
    (fault,) = quality_faults(Quality(answer), Bounds(answer.perplexity_ratio, 9, 0))
    assert fault.startswith("perplexity on answers is")


NEAR = Distance(100, 4.0, 1.05, 0.02, 0.95, 0.5)


def test_a_method_must_beat_plain_rounding_to_the_same_scheme() -> None:
    bounds = Bounds(1.25, 0.2, 0.8, beats_rounding=True)
    worse = Distance(100, 4.1, 1.06, 0.03, 0.94, 0.5)

    assert quality_faults(Quality(NEAR, rounding=worse), bounds) == []
    (fault,) = quality_faults(Quality(worse, rounding=NEAR), bounds)
    assert "plain rounding to the same scheme diverges by less" in fault


@pytest.mark.parametrize(
    ("asked", "lost", "passes"), [(12, 2, True), (240, 4, True), (240, 24, False)]
)
def test_right_answers_may_fall_by_two_points_and_by_what_chance_does(
    asked: int, lost: int, passes: bool
) -> None:
    trained = [True] * asked
    found = compared(trained, [place >= lost for place in range(asked)])

    assert (quality_faults(Quality(NEAR, answers=found), BOUNDS) == []) is passes


def test_a_merge_must_say_what_base_and_adapter_say() -> None:
    assert merge_faults(5e-5, 64, 64) == []
    assert "differs by 0.2" in merge_faults(0.2, 64, 64)[0]
    assert merge_faults(5e-5, 63, 64) == ["1 of 64 greedy answers differ"]
    assert merge_faults(float("nan"), 64, 64) != []


@pytest.mark.parametrize(("change", "lost"), [(1e-4, 1.0), (0.1, 0.0)])
def test_changes_below_the_grid_of_bfloat16_are_lost_in_the_cast(
    change: float, lost: float
) -> None:
    import torch

    torch.manual_seed(0)
    trained, stored = (torch.nn.Linear(64, 64) for _ in range(2))
    base = {name: each.detach().bfloat16() for name, each in trained.named_parameters()}
    for own, cast, before in zip(
        trained.parameters(), stored.parameters(), base.values(), strict=True
    ):
        own.data = before.float() * (1 + change)
        cast.data = own.data.bfloat16().float()

    assert lost_share(base.items(), trained, stored) == lost
    assert lost_share(trained.named_parameters(), trained, stored) == 0.0
    assert "100% of the values" in lost_words(1.0, "bfloat16")
    assert "--dtype float32" in lost_words(1.0, "bfloat16")


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SIDE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: changed(path / "generation_config.json", eos_token_id=7), "stops at 7"),
    (lambda path: (path / "chat_template.jinja").write_text("x"), "chat_template.jinja is not"),
    (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is not"),
    (lambda path: changed(path / "config.json", rope_theta=1.0), "rope_theta is 1.0"),
    (lambda path: (path / "config.json").write_text("{"), "num_hidden_layers is None"),
]


@pytest.mark.parametrize(("damage", "said"), SIDE)
def test_what_lies_beside_the_weights_must_be_the_merged_models(
    merged: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    artefact = tmp_path / "artefact"
    shutil.copytree(merged, artefact)
    changed(artefact / "config.json", quantization_config={"bits": 4}, dtype="float16")
    assert side_faults(artefact, merged) == []
    damage(artefact)

    assert any(said in each for each in side_faults(artefact, merged))
