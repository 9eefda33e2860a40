"""A block-diffusion mask as a small struct, and the rule that kernels compute tile by tile."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_diffusion_attention.geometry import Geometry, Layout
from pallas_kernels.mask import block_diffusion_packed


@no_type_check  # a pytree also holds tracers, shapes, shardings
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("document", "start"),
    meta_fields=("layout", "block_length", "copies", "aligned"),
)
@dataclasses.dataclass(frozen=True)
class BlockDiffusionMask:
    """Who sees whom in a packed batch: two integers a place, never ``[T, S]`` booleans.

    A query sees its own block of its own copy, and the clean copy's earlier blocks, of its own
    document (``block_diffusion_packed`` draws it). Make one with ``of``.

    Attributes:
      document: ``Int[B, L]``; 0 for padding, which sees only padding.
      start: ``Int[B, L]``, the place in the row where the token's block begins.
      layout, block_length, copies, aligned: see ``Geometry``.
    """

    document: Any
    start: Any
    layout: Layout
    block_length: int | None
    copies: int = 1
    aligned: bool = False

    @classmethod
    def of(
        cls,
        positions: Int[Array, "B L"],
        document: Int[Array, "B L"],
        block_length: int | None,
        layout: Layout,
        *,
        copies: int = 1,
        aligned: bool = False,
    ) -> BlockDiffusionMask:
        """A mask over rows of documents whose blocks count from each document's beginning.

        Args:
          positions: positions within the documents.
          document: 0 for padding, 1, 2, … within a row.
          block_length, layout, copies, aligned: see ``Geometry``.
        """
        if block_length is not None and block_length >= document.shape[1]:
            block_length = None  # no document is longer than a row
        place = jnp.broadcast_to(jnp.arange(document.shape[1], dtype=jnp.int32), document.shape)
        if block_length is None:
            start = jnp.zeros_like(place)
        else:
            within = jnp.where(document > 0, positions, place)
            start = place - within % block_length
        return cls(document, start.astype(jnp.int32), layout, block_length, copies, aligned)

    @property
    def geometry(self) -> Geometry:
        """The static part."""
        length = self.document.shape[-1]
        return Geometry(self.layout, length, self.block_length, self.copies, self.aligned)

    def dense(self) -> Bool[Array, "B T S"]:
        """The mask itself, for tests and toys, by ``block_diffusion_packed``."""
        g = self.geometry

        def coordinates(copies: tuple[int, ...], axis: int) -> tuple[Array, Array, Array]:
            start, document = (jnp.tile(x, len(copies)) for x in (self.start, self.document))
            copy = jnp.broadcast_to(jnp.repeat(jnp.array(copies), g.length), start.shape)
            copy, start, document = (jnp.expand_dims(x, axis) for x in (copy, start, document))
            return copy, start, document

        return block_diffusion_packed(coordinates(g.queries, 2), coordinates(g.keys, 1))

    def query_ids(self) -> Int[Array, "B T"]:
        """What ``Visible`` needs to know of a query: where its own block begins among the keys."""
        g = self.geometry
        if g.layout != "joint":
            return self.start
        return jnp.concatenate([self.start + i * g.length for i in range(len(g.queries))], axis=1)

    def query_documents(self) -> Int[Array, "B T"]:
        """The document of every query."""
        return jnp.tile(self.document, (1, len(self.geometry.queries)))

    def key_documents(self) -> Int[Array, "B S"]:
        """The document of every key."""
        return jnp.tile(self.document, (1, len(self.geometry.keys)))

    def padded(self, length: int) -> BlockDiffusionMask:
        """With padding (of no document) at the end of every row, up to ``length`` places."""
        extra = length - self.document.shape[-1]
        if extra == 0:
            return self
        place = jnp.arange(self.document.shape[-1], length, dtype=jnp.int32)
        if self.block_length is None:
            place = jnp.zeros_like(place)
        tail = jnp.broadcast_to(place, (*self.document.shape[:-1], extra))
        return dataclasses.replace(
            self,
            document=jnp.pad(self.document, ((0, 0), (0, extra)), constant_values=-1),
            start=jnp.concatenate([self.start, tail], axis=-1),
        )


@dataclasses.dataclass(frozen=True)
class Visible:
    """The rule within a document, by comparisons alone: no division, which Mosaic dislikes.

    Called with ``query_ids`` and key indices. Splash attention calls it on tiles in the kernel;
    hashable, so that equal masks share a compiled program.
    """

    geometry: Geometry

    def __call__(self, own: Any, key: Any) -> Any:
        """True where the key is seen, if it is of the query's document."""
        g = self.geometry
        length, block = g.length, g.block
        if g.layout == "clean":
            return key < own + block
        if g.layout == "noisy":
            shifted = key - length
            return (key < own) | ((shifted >= own) & (shifted < own + block))
        if g.layout == "alone":
            return (key >= own) & (key < own + block)
        copy = 0  # where the query's copy begins
        for i in range(1, g.copies + 1):
            copy = copy + jnp.where(own >= i * length, length, 0)
        own_end = own + block
        if length % block or not g.aligned:  # a last block must not run into the next copy
            own_end = jnp.minimum(own_end, copy + length)
        clean = g.copies * length
        before = (key >= clean) & (key < own - copy + clean)
        return ((key >= own) & (key < own_end)) | before
