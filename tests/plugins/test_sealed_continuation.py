"""What is kept to go on with holds nothing that can be read, and comes back whole or not at all."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_plugins import sealed_continuation
from mst_plugins.sealed_continuation import key_from_rows, seal, unseal

KEY = key_from_rows([[1, 2, 3], [4]])


@settings(max_examples=50)
@given(plain=st.binary(max_size=100), chunk=st.integers(1, 60))
def test_a_text_of_any_length_comes_back(plain: bytes, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed_continuation, "_CHUNK_BYTES", chunk)

        assert unseal(seal(plain, KEY), KEY) == plain


def test_only_the_same_rows_in_the_same_order_open_it() -> None:
    sealed = seal(b"activations", KEY)

    assert unseal(sealed, key_from_rows([[1, 2, 3], [4]])) == b"activations"
    for others in ([[1, 2, 3, 4]], [[4], [1, 2, 3]], [[1, 2, 3], [5]]):
        with pytest.raises(InvalidTag):
            unseal(sealed, key_from_rows(others))


def test_a_chunk_that_was_changed_moved_or_cut_off_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealed_continuation, "_CHUNK_BYTES", 10)
    sealed = seal(b"0123456789abcdefghij", KEY)
    first, second = sealed[8:46], sealed[46:]
    flipped = bytearray(sealed)
    flipped[30] ^= 1
    shorter = (10).to_bytes(8, "big") + first

    for each in (bytes(flipped), sealed[:8] + second + first, sealed[:60], shorter):
        with pytest.raises(InvalidTag):
            unseal(each, KEY)


def test_the_text_is_not_in_the_file() -> None:
    assert b"activations" not in seal(b"activations", KEY)
    assert seal(b"activations", KEY) != seal(b"activations", KEY)
