"""What LoRA training of a Llama-like model calls, one case an operator, by subject.

The list began as the operators that a simulated chip saw fall back to the CPU in a LoRA run, and
holds what generation, evaluation and AdamW's foreach path use beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mst.conformance.operators import Case, normal

if TYPE_CHECKING:
    import torch


def cases(group: str) -> Sequence[Case]:
    """Return the cases of one group."""
    return _GROUPS[group]()


def _positive(*shapes: tuple[int, ...]) -> Any:
    return lambda generator: [one.abs() + 0.5 for one in normal(*shapes)(generator)]


def _products() -> list[Case]:
    import torch
    import torch.nn.functional as F

    square, batch = normal((33, 17), (17, 9)), normal((3, 8, 16), (3, 16, 8))
    return [
        Case("aten::mm", torch.mm, square),
        Case("aten::addmm", torch.addmm, normal((9,), (33, 17), (17, 9))),
        Case("aten::bmm", torch.bmm, batch),
        Case("aten::baddbmm", torch.baddbmm, normal((3, 8, 8), (3, 8, 16), (3, 16, 8))),
        Case("aten::matmul", torch.matmul, normal((2, 3, 8, 16), (16, 4))),
        Case("aten::linear", F.linear, normal((2, 5, 16), (8, 16), (8,))),
        Case("aten::dot", torch.dot, normal((257,), (257,))),
    ]


def _pointwise() -> list[Case]:
    import torch
    import torch.nn.functional as F

    one, two, positive = normal((4, 33)), normal((4, 33), (33,)), _positive((4, 33))
    unary: dict[str, Callable[..., Any]] = {
        "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid,
        "tanh": torch.tanh, "sin": torch.sin, "cos": torch.cos, "exp": torch.exp,
        "neg": torch.neg, "abs": torch.abs,
    }  # fmt: skip
    found = [Case(f"aten::{name}", compute, one) for name, compute in unary.items()]
    found += [
        Case("aten::rsqrt", torch.rsqrt, positive),
        Case("aten::sqrt", torch.sqrt, positive),
        Case("aten::log", torch.log, positive),
        Case("aten::reciprocal", torch.reciprocal, positive),
        Case("aten::pow", lambda x: x.pow(2), one),
        Case("aten::add", torch.add, two),
        Case("aten::sub", torch.sub, two),
        Case("aten::mul", torch.mul, two),
        Case("aten::div", torch.div, _positive((4, 33), (33,))),
        Case("aten::clamp", lambda x: x.clamp(-0.5, 0.5), one),
        Case("aten::maximum", torch.maximum, two),
        Case("aten::isfinite", lambda x: torch.isfinite(x / (x > 0)), one, False),
        Case("aten::eq", lambda x, y: (x > y) & (x != y) | (x <= 0.1), two, False),
        Case("aten::bitwise_not", lambda x: ~(x > 0), one, False),
        Case("aten::_to_copy", lambda x: x.to(torch.int64).to(torch.float32), one, False),
    ]
    return found


def _reductions() -> list[Case]:
    import torch
    import torch.nn.functional as F

    one = normal((4, 8, 33))
    return [
        Case("aten::sum", lambda x: x.sum(-1), one),
        Case("aten::mean", lambda x: x.mean(-1, keepdim=True), one),
        Case("aten::var", lambda x: x.var(-1), one),
        Case("aten::amax", lambda x: x.amax(-1), one),
        Case("aten::max", lambda x: x.max(), one),
        Case("aten::argmax", lambda x: x.argmax(-1), one, False),
        Case("aten::any", lambda x: torch.stack([(x > 2).any(), (x > 9).all()]), one, False),
        Case("aten::cumsum", lambda x: x.cumsum(1), one),
        Case("aten::linalg_vector_norm", torch.linalg.vector_norm, one),
        Case("aten::_softmax", lambda x: x.softmax(-1), one),
        Case("aten::native_layer_norm", lambda x: F.layer_norm(x, (33,)), one),
        Case("rms norm", _rms_norm, normal((2, 8, 33), (33,))),
    ]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    import torch

    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _shapes() -> list[Case]:
    import torch
    import torch.nn.functional as F

    one = normal((2, 6, 8))
    return [
        Case("aten::cat", lambda x, y: torch.cat([x, y], 1), normal((2, 3, 4), (2, 5, 4))),
        Case("aten::stack", lambda x, y: torch.stack([x, y]), normal((3, 4), (3, 4))),
        Case("aten::clone", lambda x: x.transpose(1, 2).contiguous(), one),
        Case("aten::expand", lambda x: x[:, None].expand(2, 3, 6, 8).reshape(2, 18, 8), one),
        Case("aten::slice", lambda x: x[:, 1:5:2] * 2, one),
        Case("aten::split", lambda x: [part * 2 for part in x.split(4, -1)], one),
        Case("aten::constant_pad_nd", lambda x: F.pad(x, (1, 2)), one),
        Case("aten::triu", lambda x: x.triu(1), one),
        Case("aten::repeat", lambda x: x.repeat(1, 2, 1), one),
        Case("aten::flip", lambda x: x.flip(-1), one),
        Case("aten::copy_", lambda x: torch.zeros_like(x).copy_(x) * 2, one),
        Case("aten::fill_", lambda x: torch.full_like(x, 3) + torch.ones_like(x), one, False),
        Case("aten::arange", lambda x: torch.arange(2, 40, 3, device=x.device), one, False),
    ]


def _rope(x: torch.Tensor) -> torch.Tensor:
    import torch

    positions = torch.arange(x.shape[-2], device=x.device).float()
    half = x.shape[-1] // 2
    rates = 1.0 / (10000.0 ** (torch.arange(half, device=x.device).float() / half))
    angles = torch.cat([positions[:, None] * rates] * 2, -1)
    rotated = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + rotated * angles.sin()


def _attention() -> list[Case]:
    import torch
    import torch.nn.functional as F

    heads = normal((2, 4, 16, 8), (2, 4, 16, 8), (2, 4, 16, 8))
    attend = F.scaled_dot_product_attention

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(16, 16, dtype=torch.bool, device=q.device).tril()
        return attend(q, k, v, attn_mask=mask[None, None])

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / 8**0.5
        hidden = torch.ones(16, 16, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v

    return [
        Case("aten::scaled_dot_product_attention", attend, heads),
        Case(
            "aten::scaled_dot_product_attention causal",
            lambda q, k, v: attend(q, k, v, is_causal=True),
            heads,
        ),
        Case("aten::scaled_dot_product_attention masked", masked, heads),
        Case("eager attention", eager, heads),
        Case("rotary embedding", _rope, normal((2, 4, 16, 8))),
    ]


def _indexing() -> list[Case]:
    import torch
    import torch.nn.functional as F

    def with_ids(*shapes: tuple[int, ...]) -> Any:
        def make(generator: torch.Generator) -> list[torch.Tensor]:
            ids = torch.randint(0, 11, (2, 7), generator=generator)
            return [ids, *normal(*shapes)(generator)]

        return make

    table = with_ids((11, 8))
    return [
        Case("aten::embedding", F.embedding, table),
        Case("aten::index_select", lambda ids, x: x.index_select(0, ids[0]), table),
        Case("aten::index", lambda ids, x: x[ids], table),
        Case("aten::gather", lambda ids, x: x.gather(0, ids[:, :5]), table),
        Case(
            "aten::scatter_add",
            lambda ids, x: torch.zeros_like(x).scatter_add(0, ids[:, :5], x[:2, :5]),
            table,
        ),
        Case(
            "aten::index_add",
            lambda ids, x: torch.zeros_like(x).index_add(0, ids[0], x[:7]),
            table,
        ),
        Case("aten::where", lambda ids, x: torch.where(x > 0, x, x * 0.1), table),
        Case("aten::masked_fill", lambda ids, x: x.masked_fill(x > 1, -3.0), table),
        Case("aten::masked_select", lambda ids, x: x[x > 0], table, False),
        Case("aten::nonzero", lambda ids, x: (ids > 4).nonzero(), table, False),
        Case("aten::topk", lambda ids, x: x.topk(3, dim=0).values, table),
        Case("aten::sort", lambda ids, x: x.sort(dim=0, descending=True).values, table),
        Case(
            "aten::index_put_",
            lambda ids, x: x.clone().index_put_((ids[0, :4],), x.new_tensor(0.5)),
            table,
            False,
        ),
    ]


def _loss() -> list[Case]:
    import torch
    import torch.nn.functional as F

    def make(generator: torch.Generator) -> list[torch.Tensor]:
        labels = torch.randint(0, 19, (12,), generator=generator)
        labels[::4] = -100
        return [labels, torch.randn(12, 19, generator=generator)]

    return [
        Case("aten::_log_softmax", lambda labels, x: x.log_softmax(-1), make),
        Case("aten::nll_loss_forward", lambda labels, x: F.nll_loss(x, labels), make),
        Case("cross_entropy", lambda labels, x: F.cross_entropy(x, labels), make),
        Case(
            "cross_entropy sum",
            lambda labels, x: F.cross_entropy(x, labels, reduction="sum", ignore_index=-100),
            make,
        ),
        Case("aten::logsumexp", lambda labels, x: x.logsumexp(-1), make),
    ]


def _stepped(name: str, foreach: bool) -> Any:
    import torch

    def compute(*weights: torch.Tensor) -> list[torch.Tensor]:
        trained = [one.clone().requires_grad_() for one in weights]
        kind: Any = getattr(torch.optim, name)
        optimizer = kind(trained, lr=0.1, foreach=foreach)
        for step in range(3):
            for one in trained:
                one.grad = (one.detach() * (step + 1)).cos()
            optimizer.step()
        return [one.detach() for one in trained]

    return compute


def _optimizer() -> list[Case]:
    import torch

    weights = normal((8, 5), (7,), (3, 3))

    def clipped(*weights: torch.Tensor) -> list[torch.Tensor]:
        trained = [one.clone() for one in weights]
        for one in trained:
            one.grad = one * 3
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return [norm, *(one.grad for one in trained if one.grad is not None)]

    def lists(*weights: torch.Tensor) -> list[torch.Tensor]:
        found = torch._foreach_mul(list(weights), 0.5)
        torch._foreach_add_(found, list(weights), alpha=2.0)
        torch._foreach_lerp_(found, list(weights), 0.25)
        torch._foreach_addcdiv_(found, list(weights), torch._foreach_exp(list(weights)), 0.1)
        return [*found, *torch._foreach_norm(found)]

    return [
        Case("aten::_foreach_*", lists, weights, False),
        Case("AdamW, foreach", _stepped("AdamW", True), weights, False),
        Case("AdamW, one by one", _stepped("AdamW", False), weights, False),
        Case("SGD, foreach", _stepped("SGD", True), weights, False),
        Case("clip_grad_norm_", clipped, weights, False),
        Case("aten::zero_", lambda *w: [one.clone().zero_() for one in w], weights, False),
        Case("aten::lerp_", lambda x, *_: x.clone().lerp_(x * 2, 0.3), weights, False),
        Case(
            "aten::addcmul_",
            lambda x, *_: x.clone().addcmul_(x, x, value=0.5),
            weights,
            False,
        ),
        Case(
            "aten::_local_scalar_dense",
            lambda x, *_: torch.tensor(float(x.sum())),
            weights,
            False,
        ),
    ]


def _random() -> list[Case]:
    """Return what no two devices draw alike, as statements that must hold whatever is drawn."""
    import torch
    import torch.nn.functional as F

    ones = [torch.ones(64, 64)]

    def dropped(x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(x, 0.5)
        share = (y == 0).float().mean()
        return torch.stack([((y == 0) | (y == 2)).all(), (share > 0.4) & (share < 0.6)])

    def uniform(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x).uniform_(-1, 3)
        return torch.stack([y.min() >= -1, y.max() <= 3, (y.mean() - 1).abs() < 0.2])

    def normally(x: torch.Tensor) -> torch.Tensor:
        y = torch.randn_like(x)
        return torch.stack([y.mean().abs() < 0.1, (y.std() - 1).abs() < 0.1])

    def drawn(x: torch.Tensor) -> torch.Tensor:
        chances = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], device=x.device)
        y = torch.multinomial(chances, 2, replacement=True)
        return torch.stack([(y[0] == 1).all(), (y[1] != 1).all()])

    return [
        Case("aten::native_dropout", dropped, lambda _: ones, False),
        Case("aten::uniform_", uniform, lambda _: ones, False),
        Case("aten::normal_", normally, lambda _: ones, False),
        Case("aten::multinomial", drawn, lambda _: ones, False),
        Case(
            "aten::bernoulli_",
            lambda x: torch.bernoulli(x * 1.0).sum(),
            lambda _: ones,
            False,
        ),
    ]


_GROUPS = {
    "products": _products,
    "pointwise": _pointwise,
    "reductions": _reductions,
    "shapes": _shapes,
    "attention": _attention,
    "indexing": _indexing,
    "loss": _loss,
    "optimizer": _optimizer,
    "random": _random,
}
