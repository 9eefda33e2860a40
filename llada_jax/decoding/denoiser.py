"""What the decoder asks of a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llada_jax.decoding.sampling import Adjustment, Proposal
from llada_jax.model import KVCache, LLaDA2, init_cache
from llada_jax.parallel import in_mesh
from pallas_kernels import WindowMask


@runtime_checkable
class Denoiser(Protocol):
    """A block denoiser with a cache. Implementations are hashable: they are static to ``jit``."""

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a position not yet filled."""
        ...

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Memory for ``batch`` rows of ``length`` tokens."""
        ...

    def forward(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: WindowMask | None,
        cache: KVCache,
        cache_length: Int[Array, " B"],
        live: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of fresh tokens after a cached prefix, and their keys and values."""
        ...

    def propose(
        self, params: Any, hidden: Float[Array, "B T D"], adjustment: Adjustment
    ) -> Proposal:
        """The best token of the adjusted scores and its probability."""
        ...

    def logits(self, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores over the vocabulary, to draw from."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelDenoiser:
    """``LLaDA2`` as a ``Denoiser``; ``params`` is its weight tree.

    Attributes:
      model: the network.
      mesh: the devices that the weights are spread over, if more than one.
      cache_dtype: of cached keys and values; the model's by default, or int8.
    """

    model: LLaDA2
    mesh: Mesh | None = None
    cache_dtype: Any = None

    @property
    def mask_token_id(self) -> int:
        """The configuration's ``mask_token_id``."""
        return self.model.config.mask_token_id

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache."""
        dtype = self.cache_dtype or self.model.dtype
        return init_cache(self.model.config, batch, length, dtype)

    def forward(self, params, tokens, positions, mask, cache, cache_length, live):
        """Runs the transformer; see ``LLaDA2.__call__``."""
        with in_mesh(self.mesh):
            out: Any = self.model.apply(
                {"params": params},
                tokens,
                positions,
                mask=mask,
                cache=cache,
                cache_length=cache_length,
                live=live,
            )
        return out.hidden, out.fresh

    def propose(self, params, hidden, adjustment):
        """See ``LLaDA2.confidence``."""
        with in_mesh(self.mesh):
            best: Any = self.model.apply(
                {"params": params}, hidden, *adjustment, method="confidence"
            )
        return Proposal(best.token, best.probability, best.entropy)

    def logits(self, params, hidden):
        """See ``LLaDA2.logits``."""
        scores: Any = self.model.apply({"params": params}, hidden, method="logits")
        return scores
