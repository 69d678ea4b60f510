"""On how many devices and machines their command trains."""

from __future__ import annotations

from mst.foreign.draft import Draft, number
from mst.foreign.method import named_stage, zero
from mst.foreign.source import Source

# Ours, then what torchrun and ms-swift, accelerate and DeepSpeed call it.
_LAUNCHED = {
    "nproc_per_node": ("nproc_per_node", "num_processes", "num_gpus"),
    "nnodes": ("nnodes", "num_machines", "num_nodes"),
    "node_rank": ("node_rank", "machine_rank"),
    "master_addr": ("master_addr", "main_process_ip"),
    "master_port": ("master_port", "main_process_port"),
}
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def placing(draft: Draft, source: Source, tool: str) -> None:
    """Write on how many devices is trained, from launchers' options and variables."""
    environment, launcher = source.environment, dict(source.launcher)
    machines = number(launcher.get("num_machines") or launcher.get("nnodes") or 1) or 1
    for name, keys in _LAUNCHED.items():
        key = next((each for each in keys if each in launcher), None)
        value = launcher.pop(key) if key else environment.get(name.upper())
        if value is None:
            continue
        if "$" in str(value) or (name == "nproc_per_node" and number(value) is None):
            draft.drop(key or name.upper(), "no number stands there; mst plans it, or takes a flag")
        elif key == "num_processes":  # accelerate counts those of all machines
            draft.keep(name, int((number(value) or 1) // machines), key)
        else:
            draft.keep(name, value, key or name.upper())
    _visible(draft, source, tool)
    for key in ("config_file", "accelerate_config", "deepspeed_config_file"):
        value = launcher.pop(key, None) or draft.take(key)
        if value is not None and named_stage(str(value)) and "deepspeed" not in draft.options:
            zero(draft, value, key)
        elif value is not None:
            draft.drop(
                key, "accelerate isn't used; set nproc_per_node if it held num_processes", "check"
            )
    for key in launcher:
        draft.drop(key, "an option of their launcher; mst starts its processes itself")
    names = {name.upper() for name in _LAUNCHED} | set(_VISIBLE)
    for key in sorted(set(environment) - names):
        draft.drop(key, "a variable for their program, not an option")


def _visible(draft: Draft, source: Source, tool: str) -> None:
    """Read how many devices were shown; all but ms-swift train on each of them then."""
    for name in _VISIBLE:
        shown = source.environment.get(name)
        if shown is None:
            continue
        count = len([each for each in shown.split(",") if each.strip()])
        if tool != "ms-swift" and count > 1 and "nproc_per_node" not in draft.options:
            draft.keep("nproc_per_node", count, name, "one process on each")
        draft.drop(name, "set it in the shell before `mst train`, which heeds it too")
