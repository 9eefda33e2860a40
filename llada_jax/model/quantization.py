"""Which weights are quantised and how; quantising them one at a time.

    weight                                         int8     fp8      int4
    attention projections, mlp, shared experts,
    routed experts                                 int8     fp8      int4
    lm_head (if it is not the tied embedding)      int8     as is    int8
    embedding, norms, router, biases               as is    as is    as is

A weight folds into a stack of matrices (``WeightSpec.fold``) and becomes a ``QuantizedMatrix`` in
the same place of the tree. Stacked layers are quantised one by one, so besides the original and
the result there is only one layer in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from llada_jax.config import ModelConfig
from llada_jax.model.weights import Fold, WeightSpec, flatten_specs, weight_specs
from pallas_kernels.quantized import SCHEMES, QuantizedMatrix, dequantize, quantize

_HEAD = "lm_head/kernel"
_HEAD_SCHEME: Mapping[str, str | None] = {"int8": "int8", "fp8": None, "int4": "int8"}


def check_quantization(quantization: str | None) -> None:
    """Raises if this is no scheme.

    Raises:
      ValueError: naming those there are.
    """
    if quantization is not None and quantization not in SCHEMES:
        raise ValueError(f"quantization = {quantization!r} is none of {', '.join(SCHEMES)}")


def weight_scheme(path: str, spec: WeightSpec, quantization: str | None) -> str | None:
    """How one weight of a model is quantised; ``None`` where it stays as it is."""
    if quantization is None or spec.fold is None:
        return None
    return _HEAD_SCHEME[quantization] if path == _HEAD else quantization


def quantization_of(params: Mapping[str, Any]) -> str | None:
    """The scheme of a model's layers, ``None`` if it is not quantised.

    Args:
      params: nested dictionaries, or flat ones.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    schemes = {
        m.scheme for path, m in flat.items() if isinstance(m, QuantizedMatrix) and path != _HEAD
    }
    if len(schemes) > 1:
        raise ValueError(
            f"the layers are quantised in several ways ({', '.join(sorted(schemes))}); use one"
        )
    return schemes.pop() if schemes else None


def quantize_params(
    params: Mapping[str, Any],
    config: ModelConfig,
    quantization: str,
    *,
    free: bool = False,
) -> dict[str, Any]:
    """Quantises a model's weights, one at a time.

    Args:
      params: nested dictionaries, as ``load_hf`` returns them; on one device or on a mesh.
      config: the model.
      quantization: ``"int8"``, ``"fp8"`` or ``"int4"``.
      free: delete each original as soon as its matrices are made; ``params`` is of no use then.

    Returns:
      The same tree with ``QuantizedMatrix`` leaves, sharded like the originals.

    Raises:
      ValueError: for an unknown scheme, or weights that are quantised already.
    """
    check_quantization(quantization)
    if (already := quantization_of(params)) is not None:
        raise ValueError(f"the weights are quantised already ({already}); take the original ones")
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for path, spec in flatten_specs(weight_specs(config)).items():
        scheme = weight_scheme(path, spec, quantization)
        if scheme is None:
            continue
        weight = jnp.asarray(flat[path])
        flat[path] = quantize_pieces(layers_of(weight, spec), spec, scheme, weight.sharding)
        if free:
            weight.delete()
    return traverse_util.unflatten_dict(flat, sep="/")


def dequantize_params(
    params: Mapping[str, Any], config: ModelConfig, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """The tree of plain weights that quantised ones stand for; the others stay as they are."""
    specs = flatten_specs(weight_specs(config))
    flat = {
        path: dequantize(w, dtype).reshape(specs[path].shape)
        if isinstance(w, QuantizedMatrix)
        else w
        for path, w in traverse_util.flatten_dict(params, sep="/").items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def layers_of(weight: Float[Array, ...], spec: WeightSpec) -> Iterable[Float[Array, ...]]:
    """The pieces of a weight for ``quantize_pieces``: its layers, or all of it."""
    if spec.fold is None or not spec.fold.stack:
        return [weight]
    return (_layer(weight, i) for i in range(len(weight)))


def quantize_pieces(
    pieces: Iterable[Float[Array, ...]], spec: WeightSpec, scheme: str, sharding: Sharding
) -> QuantizedMatrix:
    """Quantises one weight piece by piece.

    Args:
      pieces: ``[1, ...]``, the weight cut along its first axis, in order; the whole weight if it
        is not stacked. Each is needed only until the next one is asked for.
      spec: the weight's declaration.
      scheme: how to quantise.
      sharding: the weight's. The result's values are sharded alike, the axes folded.
    """
    assert spec.fold is not None
    place = quantized_shardings(spec, scheme, sharding)
    with jax.named_scope("quantize"):
        if not spec.fold.stack:
            (weight,) = pieces
            return _whole(spec.fold, scheme, place)(jax.device_put(weight, sharding))
        write = _layerwise(spec.fold, scheme, place)
        shapes = quantized_shape(spec, scheme)
        out = jax.tree.map(lambda s, p: jnp.zeros(s.shape, s.dtype, device=p), shapes, place)
        for i, piece in enumerate(pieces):
            # Waiting keeps the pieces from piling up on the device.
            out = jax.block_until_ready(write(out, jax.device_put(piece, sharding), i))
    return out


def quantized_shape(spec: WeightSpec, scheme: str) -> QuantizedMatrix:
    """Shapes and types of a weight's values and scales (``jax.ShapeDtypeStruct``)."""
    assert spec.fold is not None
    shape = jax.ShapeDtypeStruct(spec.fold.shape(spec.shape), jnp.float32)
    return jax.eval_shape(lambda w: quantize(w, scheme), shape)


def quantized_shardings(spec: WeightSpec, scheme: str, sharding: Sharding) -> QuantizedMatrix:
    """Where values and scales go, given where the weight goes.

    A folded axis is sharded as the first axis in it is, if its size divides; values and scales
    have different sizes.
    """
    assert spec.fold is not None
    shapes = quantized_shape(spec, scheme)
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, shapes)
    mesh = sharding.mesh
    axes = spec.fold.axes((*sharding.spec, *[None] * (len(spec.shape) - len(sharding.spec))))

    def place(shape: jax.ShapeDtypeStruct) -> NamedSharding:
        fits = [
            a if s % _devices(mesh, a) == 0 else None
            for a, s in zip(axes, shape.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(place, shapes)


def weight_bytes(config: ModelConfig, quantization: str | None, dtype: Any) -> int:
    """Bytes of all weights of a configuration, scales included, without allocating any.

    Args:
      config: the model.
      quantization: the scheme, or ``None``.
      dtype: of what is not quantised; the router is float32 in any case.
    """
    total = 0
    for path, spec in flatten_specs(weight_specs(config)).items():
        scheme = weight_scheme(path, spec, quantization)
        if scheme is not None:
            total += quantized_shape(spec, scheme).nbytes
        else:
            kept = jnp.float32 if spec.keep_dtype else dtype
            total += math.prod(spec.shape) * jnp.dtype(kept).itemsize
    return total


@jax.jit
def _layer(weight: Array, i: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(weight, i, 1)


@functools.cache
def _whole(fold: Fold, scheme: str, place: QuantizedMatrix) -> Callable[..., QuantizedMatrix]:
    def run(weight: Array) -> QuantizedMatrix:
        return quantize(weight.reshape(fold.shape(weight.shape)), scheme)

    return jax.jit(run, out_shardings=place)


@functools.cache
def _layerwise(fold: Fold, scheme: str, place: QuantizedMatrix) -> Callable[..., QuantizedMatrix]:
    """Quantises one layer into its place in a whole weight."""

    def write(out: QuantizedMatrix, piece: Array, i: Array) -> QuantizedMatrix:
        made = quantize(piece.reshape(fold.shape(piece.shape)), scheme)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=0)
        return jax.tree.map(put, out, made)

    return jax.jit(write, out_shardings=place, donate_argnums=0)


def _devices(mesh: Any, axes: Any) -> int:
    """Over how many devices a mesh axis (or several, or none) divides."""
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[name] for name in names)
