"""LoRA adapters chosen row by row within one batch, on one base model.

PEFT's own way (`adapter_names`) casts to float32 and runs hooks for each row's name at each layer;
here a layer that some adapter changes gets one hook, which adds each adapter's product to the rows
that ask for it. A row without an adapter is what the base makes of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import ModelError
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.seal.supply.model_files import read_bounded_json
from mst.training.adapters import with_adapter

if TYPE_CHECKING:
    import torch

# What PEFT draws anew without a change to the base's weights; the others (PiSSA, LoftQ ...) take
# something out of them as they are loaded.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", None)


@dataclass(frozen=True)
class LowRank:
    """One adapter at one layer: `scaling * x A^T B^T` is added (Hu et al. 2021, section 4.1).

    Attributes:
        down: A (rank, in_features).
        up: B (out_features, rank).
        scaling: alpha over the rank, or as rank-stabilized LoRA has it.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


class MixedRows(Exception):
    """A layer doesn't see rows one by one, so that they can't have different adapters."""


class RowAdapters:
    """Adapters of a model, and which row of the next pass has which."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Adapt a base model, which has no adapters yet."""
        self._model = model
        self._layers: dict[str, dict[str | None, LowRank]] = {}
        self._groups: list[tuple[str | None, torch.Tensor | None]] = []
        self._shape = (0, 0)
        self.names: list[str | None] = []

    def add(self, name: str | None, layers: dict[str, LowRank]) -> None:
        """Let rows choose an adapter.

        Args:
            name: of it; None for the one that rows have which name none.
            layers: what it adds, by the layer's name in the model.
        """
        self.names.append(name)
        for layer, pair in layers.items():
            if layer not in self._layers:
                self._layers[layer] = {}
                module: Any = self._model.get_submodule(layer)
                module.register_forward_hook(self._hook(self._layers[layer]))
            self._layers[layer][name] = pair

    @contextlib.contextmanager
    def chosen(self, names: Sequence[str | None], columns: int) -> Iterator[None]:
        """Run passes of (rows, columns) in which each row has the adapter of its name."""
        import torch

        device = next(self._model.parameters()).device
        present = [each for each in dict.fromkeys(names) if each in self.names]
        self._shape = (len(names), columns)
        self._groups = []
        for name in present:
            rows = [row for row, each in enumerate(names) if each == name]
            everyone = len(rows) == len(names)
            self._groups.append((name, None if everyone else torch.tensor(rows, device=device)))
        try:
            yield
        finally:
            self._groups = []

    def _hook(self, pairs: dict[str | None, LowRank]) -> Any:
        def add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            for name, rows in self._groups:
                if name in pairs:
                    output = self._with_product(pairs[name], inputs[0], output, rows)
            return output

        return add

    def _with_product(
        self,
        pair: LowRank,
        inputs: torch.Tensor,
        output: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        from torch.nn.functional import linear

        if rows is None:
            product = linear(linear(inputs.to(pair.down.dtype), pair.down), pair.up)
            return output + (product * pair.scaling).to(output.dtype)
        # Routers of mixtures of experts see all rows' tokens as one line.
        count, columns = self._shape
        flat = inputs.shape[:-1] == (count * columns,)
        if not flat and inputs.shape[0] != count:
            raise MixedRows
        shaped = inputs.reshape(count, -1, inputs.shape[-1]).index_select(0, rows)
        product = linear(linear(shaped.to(pair.down.dtype), pair.down), pair.up) * pair.scaling
        added = output.reshape(count, -1, output.shape[-1])
        return added.index_add(0, rows, product.to(output.dtype)).reshape(output.shape)


def read_layers(
    model: torch.nn.Module, adapter: str, dtype: torch.dtype, keys: KeyRing = NO_KEYS
) -> dict[str, LowRank]:
    """Return what an adapter adds to each layer of its base, which stays as it is.

    Args:
        model: the base.
        adapter: directory.
        dtype: of the adapter's weights in products.
        keys: of the encrypted run that it is of; none where it is plain.

    Raises:
        ModelError: it does more than add low-rank products, or is not whole.
        EncryptionError: an encrypted one doesn't open.
    """
    fault = why_not_plain(adapter)
    if fault is not None:
        raise ModelError(
            f"the adapter in {adapter} can't be mixed with others in one batch: {fault}. Serve its"
            " run alone, or merge it (mst merge) and serve what that makes."
        )
    before = {id(each) for each in model.parameters()}
    whole: Any = with_adapter(model, adapter, keys)
    try:
        found: dict[str, LowRank] = {}
        taken: set[int] = set()
        for name, module in whole.get_base_model().named_modules():
            downs = getattr(module, "lora_A", {})
            if "default" not in downs or getattr(module, "lora_variant", {}):
                continue
            down, up = downs["default"].weight, module.lora_B["default"].weight
            taken |= {id(down), id(up)}
            scaling = float(module.scaling["default"])
            found[name] = LowRank(down.detach().to(dtype), up.detach().to(dtype), scaling)
        if {id(each) for each in whole.parameters()} - before != taken or not found:
            raise ModelError(
                f"the adapter in {adapter} changes more than linear layers, so that it can't be"
                " mixed with others in one batch. Serve its run alone, or merge it (mst merge)."
            )
    finally:
        whole.unload()
        # PEFT leaves its mark on the model that it has left.
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(mark, None)
    return found


def why_not_plain(adapter: str) -> str | None:
    """Return what an adapter does beside adding low-rank products; None if nothing."""
    config = read_bounded_json(Path(adapter) / "adapter_config.json")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        return "its start was taken out of the base's weights (init_lora_weights)"
    if config.get("bias", "none") != "none":
        return "it changes biases (bias)"
    names = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices",
             "layer_replication", "alora_invocation_tokens", "lora_bias", "use_qalora",
             "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")  # fmt: skip
    return next((f"it was trained with {each}" for each in names if config.get(each)), None)
