"""Nothing is lost, nothing is cut, everything starts on a block boundary."""

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.data import unpack
from llada_jax.data.pack import KEYS, pack_rows, pad_to_blocks, stack_rows
from llada_jax.data.source import cut_at_random

PAD, EOS = 300, 256


@st.composite
def packings(draw):
    block = draw(st.sampled_from([1, 2, 4, 8]))
    length = block * draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, length), min_size=1, max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    documents = []
    for size in sizes:
        supervised = np.arange(size) >= rng.integers(size)
        documents.append((rng.integers(256, size=size).astype(np.int32), supervised))
    return block, length, documents


def pack(documents, block, length, *, packing=True, shuffle_seed=None):
    elements = [pad_to_blocks(t, s, block_length=block, eos_token_id=EOS) for t, s in documents]
    rows = pack_rows(
        grain.MapDataset.source(elements).to_iter_dataset(),
        max_seq_len=length,
        block_length=block,
        pad_token_id=PAD,
        packing=packing,
        shuffle_seed=shuffle_seed,
    )
    return stack_rows(list(rows))


@given(packings(), st.booleans(), st.sampled_from([None, 0, 7]))
def test_rows(packing, several, shuffle_seed):
    block, length, documents = packing
    batch = pack(documents, block, length, packing=several, shuffle_seed=shuffle_seed)
    assert set(batch) == set(KEYS)
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": np.int32,
        "positions": np.int32,
        "document": np.int32,
        "supervised": np.bool_,
    }
    assert all(value.shape == (len(batch["tokens"]), length) for value in batch.values())

    for row in range(len(batch["tokens"])):
        document, positions = batch["document"][row], batch["positions"][row]
        assert document[0] == 1
        padding = document == 0
        assert (np.diff(padding.astype(int)) >= 0).all()  # only at the end
        assert (batch["tokens"][row][padding] == PAD).all()
        assert not positions[padding].any()
        assert not batch["supervised"][row][padding].any()
        for number in range(1, document.max() + 1):
            (inside,) = np.nonzero(document == number)
            assert inside[0] % block == 0
            assert len(inside) % block == 0
            assert (np.diff(inside) == 1).all()
            assert (positions[inside] == np.arange(len(inside))).all()
        assert several or document.max() == 1

    # Unpacked, they are the documents again, filled up with supervised end tokens.
    def key(pair):
        return pair[0].tolist(), pair[1].tolist()

    filled = []
    for tokens, supervised in documents:
        fill = -len(tokens) % block
        filled.append(
            (np.append(tokens, [EOS] * fill), np.append(supervised, [True] * fill).astype(bool))
        )
    assert sorted(map(key, unpack(batch))) == sorted(map(key, filled))


@given(st.integers(1, 70), st.sampled_from([1, 8, 32]))
def test_fill(size, block):
    filled = pad_to_blocks(
        np.zeros(size, np.int32), np.zeros(size, bool), block_length=block, eos_token_id=EOS
    )
    fill = (-size) % block
    assert len(filled["tokens"]) == size + fill
    assert (filled["tokens"][size:] == EOS).all()
    assert filled["supervised"].sum() == fill  # none if the response ends with its block


def test_packing_saves_rows():
    documents = [(np.zeros(8, np.int32), np.ones(8, bool))] * 640
    assert len(pack(documents, 8, 64)["tokens"]) == 80
    assert len(pack(documents, 8, 64, packing=False)["tokens"]) == 640


@pytest.mark.parametrize("is_text", [True, False])
def test_random_length(is_text):
    element = {
        "tokens": np.arange(64, dtype=np.int32),
        "supervised": np.ones(64, bool),
        "is_text": is_text,
    }
    rng = np.random.default_rng(0)
    cuts = [cut_at_random(element, rng, probability=0.5, block_length=8) for _ in range(400)]
    lengths = np.array([len(cut["tokens"]) for cut in cuts])
    if not is_text:
        assert (lengths == 64).all()
        return
    assert set(lengths) == {8, 16, 24, 32, 40, 48, 56, 64}
    assert 0.4 < (lengths < 64).mean() < 0.6
    assert all((cut["tokens"] == np.arange(len(cut["tokens"]))).all() for cut in cuts)
