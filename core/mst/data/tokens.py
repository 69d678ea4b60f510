"""The model's tokenizer: text to ids with the characters that each id stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.data.special import read_json, special_tokens
from mst.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Every file that may be part of a tokenizer, copied beside weights that are to stand alone.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class EncodedText:
    """Token ids, and for each its (start, end) in characters of the text."""

    ids: list[int] = field(repr=False)
    offsets: list[tuple[int, int]] = field(repr=False)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and what training needs to know about it.

    Attributes:
        tokenizer: of the tokenizers library; neither cuts nor pads.
        eos_token_ids: ids after which the model stops, the tokenizer's own first; at least one.
        pad_token_id: the padding id; the first of `eos_token_ids` where the model names none.
        vocab_size: highest id + 1. A model's embedding may have more rows, never fewer.
    """

    tokenizer: Tokenizer = field(repr=False)
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int

    def encode(self, text: str) -> EncodedText:
        """Return the tokens of a rendered text; nothing is put before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """Return the tokens of each text, in parallel over the cores."""
        # The template has written the special tokens already, so none are added here.
        batch = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [EncodedText(encoding.ids, encoding.offsets) for encoding in batch]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each plain text as for pretraining, ended by the end of sequence.

        The tokenizer puts in front what it puts before any text: Llama's `<|begin_of_text|>`;
        Qwen has nothing.
        """
        eos = self.eos_token_ids[0]
        batch = [each.ids for each in self.tokenizer.encode_batch(list(texts))]
        return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in batch]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def load_tokenizer(model_dir: Path) -> TextTokenizer:
    """Load `tokenizer.json` and the special tokens of a model directory.

    Raises:
        ModelError: when the file is missing or broken, disagrees with `tokenizer_config.json`,
            or no end-of-sequence token is named.
    """
    tokenizer = _from_file(model_dir / "tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_listed_tokens(tokenizer, model_dir / "tokenizer_config.json")
    special = special_tokens(model_dir)
    stop = [tokenizer.token_to_id(text) for text in special.stop]
    eos_token_ids = tuple(token for token in stop if token is not None)
    if not eos_token_ids:
        raise ModelError(
            f"{model_dir} must name an end-of-sequence token, or the model would never stop; "
            "tokenizer_config.json has no 'eos_token' that is in the vocabulary, and config.json "
            "no 'eos_token_id'. Add one of them."
        )
    pad = tokenizer.token_to_id(special.pad) if special.pad is not None else None
    return TextTokenizer(
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        pad_token_id=eos_token_ids[0] if pad is None else pad,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
    )


def _from_file(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ModelError(
            f"The model's tokenizer is needed, but there is no {path}. Make one beside the model: "
            'python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{path.parent}').save_pretrained('{path.parent}')\""
        )
    try:
        return Tokenizer.from_file(str(path))
    # The Rust library raises a bare Exception for whatever is wrong with the file.
    except Exception as error:
        raise ModelError(
            f"{path} must be a tokenizer of the tokenizers library, but it cannot be read "
            f"({error}). Copy the model again from where it came."
        ) from None


def _add_listed_tokens(tokenizer: Tokenizer, config_path: Path) -> None:
    """Add the tokens that only `tokenizer_config.json` lists, as transformers does."""
    from tokenizers import AddedToken

    listed: dict[str, Any] = read_json(config_path).get("added_tokens_decoder") or {}
    for token_id, token in sorted(listed.items(), key=lambda item: int(item[0])):
        text = token["content"]
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(text) != int(token_id):
            raise ModelError(
                f"{config_path} gives '{text}' the id {token_id}, but with tokenizer.json it is "
                f"{tokenizer.token_to_id(text)}. Copy both files again from where the model came."
            )
