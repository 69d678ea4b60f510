# ruff: noqa: TID253 -- imported by simchip.load() only, where torch is meant.
"""The module `torch.simchip`: what torch and its users ask of a device type by these names."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

from simchip.settings import Settings

Device = "torch.device | str | int | None"

Stream = torch.Stream
Event = torch.Event
_settings: list[Settings] = []


@dataclass(frozen=True)
class Properties:
    """What `get_device_properties` returns."""

    name: str
    total_memory: int
    uuid: str


class device:
    """A context in which this device is the current one."""

    def __init__(self, device: Device) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = current_device()
        torch.accelerator.set_device_index(self.index)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_device_index(self.before)


def describe(settings: Settings) -> None:
    """Say which chips these are; the driver calls it once."""
    _settings[:] = [settings]


def _index(device: Device) -> int:
    if device is None:
        return current_device()
    if not isinstance(device, int):
        device = torch.device(device).index
    return current_device() if device is None or device < 0 else device


def init() -> None: ...


_lazy_init = init


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    # The memory of the chip is the process's own, so a forked one has its own copy.
    return False


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return len(_settings[0].visible)


def current_device() -> int:
    return torch.accelerator.current_device_index()


def set_device(device: Device) -> None:
    torch.accelerator.set_device_index(_index(device))


def synchronize(device: Device = None) -> None:
    torch.accelerator.synchronize(_index(device))


def current_stream(device: Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream) -> torch.Stream:
    """Return a context in which `stream` is the current one; a torch.Stream is one."""
    return stream


def get_device_properties(device: Device = None) -> Properties:
    ordinal = _settings[0].visible[_index(device)]
    return Properties("SimChip v1", _settings[0].memory_bytes, f"sim-{ordinal}")


def get_device_name(device: Device = None) -> str:
    return get_device_properties(device).name


def is_bf16_supported() -> bool:
    return _settings[0].bf16


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16] if is_bf16_supported() else [torch.float16]


def empty_cache() -> None:
    torch.accelerator.empty_cache()


def memory_allocated(device: Device = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_reserved(device: Device = None) -> int:
    return torch.accelerator.memory_reserved(_index(device))


def max_memory_reserved(device: Device = None) -> int:
    return torch.accelerator.max_memory_reserved(_index(device))


def memory_stats(device: Device = None) -> dict[str, Any]:
    return dict(torch.accelerator.memory_stats(_index(device)))


def reset_peak_memory_stats(device: Device = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


def mem_get_info(device: Device = None) -> tuple[int, int]:
    return torch.accelerator.get_memory_info(_index(device))


def manual_seed(seed: int) -> None:
    torch.ops.simchip.manual_seed(current_device(), _signed(seed))


def manual_seed_all(seed: int) -> None:
    for each in range(device_count()):
        torch.ops.simchip.manual_seed(each, _signed(seed))


def seed() -> None:
    manual_seed(torch.Generator().seed())


def seed_all() -> None:
    manual_seed_all(torch.Generator().seed())


def initial_seed() -> int:
    return int(torch.ops.simchip.initial_seed(current_device())) % 2**64


def get_rng_state(device: Device = None) -> torch.Tensor:
    return torch.ops.simchip.rng_state(_index(device))


def set_rng_state(new_state: torch.Tensor, device: Device = None) -> None:
    torch.ops.simchip.set_rng_state(_index(device), new_state.cpu())


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(each) for each in range(device_count())]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def _signed(seed: int) -> int:
    """Return the seed's 64 bits as an operator's argument, which is signed."""
    return (int(seed) + 2**63) % 2**64 - 2**63


# transformers and accelerate look for the functions of random numbers here.
random = types.SimpleNamespace(
    get_rng_state=get_rng_state,
    set_rng_state=set_rng_state,
    get_rng_state_all=get_rng_state_all,
    set_rng_state_all=set_rng_state_all,
    manual_seed=manual_seed,
    manual_seed_all=manual_seed_all,
    initial_seed=initial_seed,
    seed=seed,
    seed_all=seed_all,
)
