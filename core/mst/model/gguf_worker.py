"""Run as `python -m mst.model.gguf_worker FILE DIRECTORY`: convert, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mst.extensions import hide_extensions, hide_packages


def main(source: Path, target: Path) -> None:
    """Write the dequantized model and its tokenizer to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent,
        "gguf_file": source.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(
        **where, local_files_only=True, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        **where,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
        trust_remote_code=False,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    hide_extensions()
    hide_packages()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
