"""Clean and noisy copies through the model: in two passes, or joint in one. Equal losses."""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llada_jax.model import KVCache
from llada_jax.model.experts import RouterStats
from pallas_kernels.block_diffusion_attention import BlockDiffusionMask, Layout


@no_type_check  # a pytree also holds tracers, shapes, shardings
class Rows(flax.struct.PyTreeNode):
    """The geometry of a packed batch.

    Attributes:
      positions: positions within the documents.
      document: 0 for padding, 1, 2, … within a row.
      block_size: tokens a block, counted from each document's beginning; ``None``: a document is
        one block.
      aligned: documents start at multiples of the block size in their rows. Attention then visits
        fewer tiles; wrongly set it leaves some out.
    """

    positions: Int[Array, "B L"]
    document: Int[Array, "B L"]
    block_size: int | None = flax.struct.field(pytree_node=False)
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def of(
        cls,
        positions: Int[Array, "B L"],
        document: Int[Array, "B L"],
        block_size: int | None,
        aligned: bool = False,
    ) -> Rows:
        """See the attributes."""
        return cls(positions, document, block_size, aligned)

    @property
    def block(self) -> Int[Array, "B L"]:
        """Which block of its document a token is in."""
        if self.block_size is None:
            return jnp.zeros_like(self.positions)
        return self.positions // self.block_size

    def mask(self, layout: Layout, copies: int = 1) -> BlockDiffusionMask:
        """The attention mask of one of the passes below."""
        return BlockDiffusionMask.of(
            self.positions,
            self.document,
            self.block_size,
            layout,
            copies=copies,
            aligned=self.aligned,
        )


class Pass(NamedTuple):
    """Hidden states of a pass, and what its routers did."""

    hidden: Float[Array, "B N L D"]
    router: RouterStats | None


def clean_context(
    model: nn.Module, params: Any, tokens: Int[Array, "B L"], rows: Rows
) -> tuple[KVCache, RouterStats | None]:
    """The clean copy's keys and values, block-causal; the noisy copies read them."""
    out: Any = model.apply(
        {"params": params},
        tokens,
        rows.positions,
        mask=rows.mask("clean"),
        live=rows.document > 0,
    )
    return out.fresh, out.router


def noisy_pass(
    model: nn.Module,
    params: Any,
    noisy: Int[Array, "B N L"],
    rows: Rows,
    context: KVCache | None,
    embedding_noise: Float[Array, "B N L D"] | None = None,
) -> Pass:
    """Noisy copies, each over its own blocks and the clean ones before.

    Args:
      model, params: the model.
      noisy: N drafts of one batch.
      rows: its geometry.
      context: ``clean_context``; ``None`` without a clean copy (MDLM).
      embedding_noise: added to the embedded tokens.
    """
    batch, copies, length = noisy.shape

    def flat(x: Array) -> Array:
        return x.reshape(batch * copies, *x.shape[2:])

    def repeated(x: Array, axis: int = 0) -> Array:
        return jnp.repeat(x, copies, axis=axis)

    mask = rows.mask("alone" if context is None else "noisy")
    if context is not None:
        context = jax.tree.map(lambda x: repeated(x, 1), context)
    out: Any = model.apply(
        {"params": params},
        flat(noisy),
        repeated(rows.positions),
        mask=jax.tree.map(repeated, mask),
        context=context,
        live=repeated(rows.document > 0),
        embedding_noise=None if embedding_noise is None else flat(embedding_noise),
    )
    hidden = out.hidden.reshape(batch, copies, length, -1)
    return Pass(hidden, out.router)


def joint_pass(
    model: nn.Module,
    params: Any,
    noisy: Int[Array, "B N L"],
    tokens: Int[Array, "B L"],
    rows: Rows,
    embedding_noise: Float[Array, "B N L D"] | None = None,
) -> Pass:
    """One pass over ``[x_t ; x_t' ; … ; x_0]``: (N+1) L tokens, one clean copy for all."""
    batch, copies, length = noisy.shape
    everything = jnp.concatenate([noisy, tokens[:, None]], axis=1).reshape(batch, -1)
    if embedding_noise is not None:
        embedding_noise = jnp.pad(embedding_noise, ((0, 0), (0, 1), (0, 0), (0, 0)))
        embedding_noise = embedding_noise.reshape(*everything.shape, -1)
    out: Any = model.apply(
        {"params": params},
        everything,
        jnp.tile(rows.positions, (1, copies + 1)),
        mask=rows.mask("joint", copies),
        live=jnp.tile(rows.document > 0, (1, copies + 1)),
        embedding_noise=embedding_noise,
    )
    hidden = out.hidden.reshape(batch, copies + 1, length, -1)[:, :copies]
    return Pass(hidden, out.router)
