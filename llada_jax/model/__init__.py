"""The LLaDA2-MoE model.

Letters in array shapes, used throughout the project: B rows, T tokens of one forward pass,
L length, S cache length, C block length, N query heads, K key/value heads, H head dim, D model,
F feed-forward, E experts, V vocabulary, M tokens of a flattened batch.
"""

from llada_jax.model.cache import KVCache, init_cache, write_cache
from llada_jax.model.quantization import (
    check_quantization,
    dequantize_params,
    quantization_of,
    quantize_params,
    weight_bytes,
)
from llada_jax.model.transformer import LLaDA2, ModelOutput
from llada_jax.model.weights import (
    ParameterCount,
    WeightSpec,
    count_parameters,
    flatten_specs,
    weight_specs,
)

__all__ = [
    "KVCache",
    "LLaDA2",
    "ModelOutput",
    "ParameterCount",
    "WeightSpec",
    "check_quantization",
    "count_parameters",
    "dequantize_params",
    "flatten_specs",
    "init_cache",
    "quantization_of",
    "quantize_params",
    "weight_bytes",
    "weight_specs",
    "write_cache",
]
