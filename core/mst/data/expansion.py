"""Images in a rendered conversation: each mark becomes as many tokens as the model has for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mst.data.images import Image
from mst.data.spans import Span
from mst.data.template import ChatTemplate
from mst.errors import DataError
from mst.model.processor import image_mark, image_tokens


def expanded(
    template: ChatTemplate, text: str, spans: Sequence[Span], images: Sequence[Image]
) -> tuple[str, tuple[Span, ...]]:
    """Return a rendered conversation with its images' tokens, and where loss is in it.

    No token of an image carries loss: what the model sees there is no prediction.

    Args:
        template: the model's.
        text: as the template wrote it, with one mark for each image.
        spans: ascending, of that text.
        images: in their order; at least one.

    Raises:
        DataError: the model reads no images, marks and images differ in number, or the processor
            refuses an image. Does not say which row it was.
    """
    if template.images is None:
        raise DataError(
            "the row has images, but the model has no processor of images"
            " (preprocessor_config.json): it reads text alone. Give an image-text model with all"
            " its files, or rows without images."
        )
    mark = image_mark(template.images)
    pieces = text.split(mark)
    if len(pieces) != len(images) + 1:
        raise DataError(
            f"the row has {len(images)} images, but the chat template in {template.origin} writes"
            f" {len(pieces) - 1} marks ({mark}) for them. The template must write one for each, and"
            " the row's own text none; mend the row, or pass another --template."
        )
    written = [image_tokens(template.images, each.width, each.height).text for each in images]
    # Of each image: where its mark begins in the text, and how much longer all is after it.
    begins = [
        end + number * len(mark)
        for number, end in enumerate(accumulate(len(piece) for piece in pieces[:-1]))
    ]
    added = [0, *accumulate(len(each) - len(mark) for each in written)]
    whole = "".join(part for pair in zip(pieces, [*written, ""], strict=True) for part in pair)
    shown = [
        (begin + before, begin + before + len(each))
        for begin, before, each in zip(begins, added, written, strict=False)
    ]

    def moved(at: int) -> int:
        return at + added[sum(begin < at for begin in begins)]

    parts = [
        part
        for span in spans
        for part in _without(Span(moved(span.start), moved(span.end), span.weight), shown)
    ]
    return whole, tuple(parts)


def _without(span: Span, shown: Sequence[tuple[int, int]]) -> list[Span]:
    """Return what of a span lies outside the images."""
    inside = [place for place in shown if span.start <= place[0] and place[1] <= span.end]
    edges = [span.start, *(edge for place in inside for edge in place), span.end]
    found = [
        Span(start, end, span.weight) for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
    return [each for each in found if each.start < each.end]
