"""The next token of each running answer, in as few operators as a decoder like Llama's takes.

A step reads the weights once, and beside a small model's that takes less time than what
transformers' own forward pass does around it: modules, masks, copies of keys and values. Models
whose forward pass is known to be that of Llama are gone through here operator by operator, each
rounded where transformers rounds. Their linear layers are called as modules, so that adapters and
quantized weights are the layers' own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mst.serve.slots import Slots

# As transformers 5.5 to 5.23 have them; `mst.serve.asking` compares what comes out.
_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
_ROWS = 4


@dataclass(frozen=True, eq=False)
class _Norm:
    """A norm by the root of the mean square, with its weight."""

    weight: torch.Tensor
    eps: float

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the normed states; torch's own operator for this rounds otherwise."""
        wide = states.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * scale).to(states.dtype) * self.weight


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a decoder's layer computes with."""

    before: _Norm
    query: Any
    key: Any
    value: Any
    query_norm: _Norm | None
    key_norm: _Norm | None
    out: Any
    after: _Norm
    gate: Any
    up: Any
    down: Any
    activation: Any


class DecodeStep:
    """The step of one model, from `step_of`."""

    def __init__(self, model: Any) -> None:
        """Look up what it computes with."""
        decoder, self._model = model.model, model
        first = decoder.layers[0].self_attn
        self._head_size: int = first.head_dim
        self._scaling: float = first.scaling
        self._head, self._embed = model.lm_head, decoder.embed_tokens
        self._rotary, self._norm = decoder.rotary_emb, _norm(decoder.norm)
        self._layers = [_layer(each) for each in decoder.layers]

    @property
    def overheard(self) -> bool:
        """Whether somebody is told of the model's own forward passes, which then are to be run."""
        model = self._model
        return bool(model._forward_pre_hooks or model._forward_hooks)

    @staticmethod
    def computed(rows: int) -> int:
        """Return how many rows are computed for so many: one, or a multiple of 4.

        oneDNN makes kernels of their own for each number of rows, and keeps them: those for 1 to 32
        rows took 68 MB of SmolLM2-135M's process.
        """
        return 1 if rows == 1 else -(-rows // _ROWS) * _ROWS

    def logits(self, ids: Sequence[int], slots: Slots) -> torch.Tensor:
        """Return the logits after one more token of each row (rows, vocabulary).

        The linear layers see the rows, and beside them as many others as `computed` says.

        Args:
            ids: the tokens.
            slots: holds the rows, and has room for a column; it is to be committed afterwards.
        """
        import torch
        from torch.nn.functional import pad
        from torch.nn.functional import scaled_dot_product_attention as attention

        lengths, width, end = slots.lengths, slots.frame.width, slots.frame.end
        rows, size, half = len(ids), self._head_size, self._head_size // 2
        device, beside = self._norm.weight.device, self.computed(rows) - rows
        states = self._embed(torch.tensor([*ids, *[0] * beside], device=device))
        places = torch.tensor(lengths, device=device)[:, None]
        cos, sin = self._rotary(states, position_ids=places)
        # Half of a head is negated as it is turned; so is what it is multiplied by, here.
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        mask = _mask(lengths, width, states)

        def turned(heads: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = (heads * cos).add_(heads.roll(half, -1).mul_(sin))
            return found

        for layer, (keys, values) in zip(self._layers, slots.columns(), strict=True):
            normed = layer.before(states)
            query = layer.query(normed)[:rows].view(rows, -1, size)
            key = layer.key(normed)[:rows].view(rows, -1, size)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            keys.select(2, end).copy_(turned(key))
            values.select(2, end).copy_(layer.value(normed)[:rows].view(rows, -1, size))
            # Heads that read the same keys are queries at the same place: nothing is repeated.
            read = attention(
                turned(query).view(rows, key.shape[1], -1, size),
                keys.narrow(2, end - width, width + 1),
                values.narrow(2, end - width, width + 1),
                attn_mask=mask,
                scale=self._scaling,
            )
            read = read.reshape(rows, -1)
            states = states + layer.out(pad(read, (0, 0, 0, beside)) if beside else read)
            normed = layer.after(states)
            states = states + layer.down(layer.activation(layer.gate(normed)) * layer.up(normed))
        logits: torch.Tensor = self._head(self._norm(states))[:rows]
        return logits


def step_of(model: Any, device: torch.device) -> DecodeStep | None:
    """Return the step of a model; None where its forward pass is not known, or not worth it.

    Args:
        model: of transformers, without PEFT's layers around it.
        device: where it is. Elsewhere than on a CPU this has not been measured.
    """
    if device.type != "cpu" or not _is_known(model):
        return None
    return DecodeStep(model)


def _is_known(model: Any) -> bool:
    kind = type(model)
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", "")
    if name not in _KNOWN or kind.__module__ != f"transformers.models.{name}.modeling_{name}":
        return False
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return (
        kind.__name__.endswith("ForCausalLM")
        and "forward" not in vars(model)
        and not windows
        and getattr(config, "sliding_window", None) is None
        and config._attn_implementation == "sdpa"
    )


def _mask(lengths: Sequence[int], width: int, like: torch.Tensor) -> torch.Tensor | None:
    """Return what is added to scores, -inf before a row's first column; None where all are full."""
    import torch

    if min(lengths) == width:
        return None
    first = torch.tensor([width - each for each in lengths], device=like.device)
    empty = torch.arange(width + 1, device=like.device) < first[:, None]
    mask = torch.zeros(empty.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(empty, -torch.inf)[:, None, None]


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _layer(layer: Any) -> _Layer:
    heads, mlp = layer.self_attn, layer.mlp
    query, key = getattr(heads, "q_norm", None), getattr(heads, "k_norm", None)
    return _Layer(
        before=_norm(layer.input_layernorm),
        query=heads.q_proj,
        key=heads.k_proj,
        value=heads.v_proj,
        query_norm=None if query is None else _norm(query),
        key_norm=None if key is None else _norm(key),
        out=heads.o_proj,
        after=_norm(layer.post_attention_layernorm),
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        activation=mlp.act_fn,
    )
