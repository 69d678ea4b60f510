"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence

from mst.serve.http.answers import Embedding, Embeddings, Usage, plain
from mst.serve.http.prompts import plain_ids
from mst.serve.http.refusals import wrong
from mst.serve.http.service import Service, chosen, count_prompts
from mst.serve.http.shapes import EmbeddingRequest
from mst.serve.http.wire import Exchange, answer_json

_AT_ONCE = 8


async def embeddings(service: Service, exchange: Exchange, request: EmbeddingRequest) -> None:
    """Answer with the vector of each text: the mean of the model's last hidden states.

    Raises:
        Refusal: it can't be answered.
        MstError: the engine refuses or fails.
    """
    if chosen(service, exchange, request.model) is not None:
        raise wrong(
            f"embeddings are made with the served model alone: {service.name}. Set the field model"
            " to it.",
            "model",
        )
    given = request.inputs()
    ids = await asyncio.to_thread(
        lambda: [plain_ids(service.reader, each, "input") for each in given]
    )
    count_prompts(exchange, ids)
    vectors: list[list[float]] = []
    # A few at a time: a caller who goes away ends it, and others' prompts need threads too.
    async with service.reading:
        for at in range(0, len(ids), _AT_ONCE):
            vectors += await asyncio.to_thread(service.engine.embed, ids[at : at + _AT_ONCE])
    shown = _base64 if request.encoding_format == "base64" else list
    answer = Embeddings(
        data=[
            Embedding(index=index, embedding=shown(vector)) for index, vector in enumerate(vectors)
        ],
        model=request.model,
        usage=Usage(prompt_tokens=exchange.prompt_tokens, total_tokens=exchange.prompt_tokens),
    )
    await answer_json(exchange, plain(answer))


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
