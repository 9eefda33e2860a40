"""The confidence head: from hidden states to a proposal for every position, without the logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.confidence_head import kernel, xla
from pallas_kernels.confidence_head.kernel import Adjustment
from pallas_kernels.confidence_head.statistics import (
    NO_TOKEN,
    HeadResult,
    Statistics,
    finish,
    merge,
)
from pallas_kernels.dispatch import Implementation
from pallas_kernels.quantized import BLOCK, Matrix, QuantizedMatrix, dequantize


def confidence_head(
    hidden: Float[Array, "*batch D"],
    head: Matrix,
    *,
    banned: Int[Array, "*batch"] | None = None,
    penalised: Int[Array, "*batch"] | None = None,
    penalty: Float[Array, "*batch"] | None = None,
    transposed: bool = False,
    implementation: Implementation | None = None,
) -> HeadResult:
    """What ``softmax(hidden @ head)`` says of each position; ``[*batch, V]`` is never stored.

    The product runs in ``hidden``'s type with float32 accumulation, and the scores stay float32:
    the released code rounds them to bfloat16 first, which only makes ties, and its confidences are
    not reproducible to the bit there anyway; in float32 both are the same. Scores below -1e30
    count as -inf.

    Args:
      hidden: final hidden states.
      head: ``[D, V]``, an array or quantised. The kernel reads int8 as it is; fp8 and int4 are
        dequantised before it (XLA dequantises chunk by chunk).
      banned: a token that gets -inf at this position; -1 for none.
      penalised: a token whose score is lowered at this position; -1 for none.
      penalty: by how much.
      transposed: the head lies in memory as ``[V, D]`` (a tied embedding); plain arrays only.
      implementation: see ``dispatch.run``.

    Under a mesh (``jax.set_mesh``) the vocabulary is divided over ``tensor`` and the first batch
    axis over ``data``, each where it divides.

    Returns:
      A ``HeadResult`` of arrays of the batch shape.

    Raises:
      ValueError: for shapes that do not fit, or ``penalised`` without ``penalty``.
    """
    *batch, d = hidden.shape
    quantized = isinstance(head, QuantizedMatrix)
    v = xla.vocabulary_of(head, transposed)
    if len(head.shape) != 2 or head.shape[1 if transposed else 0] != d:
        wanted = f"[V, {d}]" if transposed else f"[{d}, V]"
        raise ValueError(f"head {tuple(head.shape)} is not {wanted}; see the argument transposed")
    if quantized and transposed:
        raise ValueError("a quantised head cannot be transposed; quantise head.T instead")
    if v >= NO_TOKEN:
        raise ValueError(f"a vocabulary of {v} is too large: ids are exact below {int(NO_TOKEN)}")
    if (penalised is None) != (penalty is None):
        raise ValueError("penalised and penalty go together: give both or neither")
    nothing = jnp.full(batch, -1, jnp.float32)
    adjustment = Adjustment(
        *(nothing if x is None else x.astype(jnp.float32) for x in (banned, penalised, penalty))
    )
    for name, x in zip(Adjustment._fields, adjustment, strict=True):
        if x.shape != tuple(batch):
            raise ValueError(f"{name} {x.shape} does not have the positions' shape {tuple(batch)}")
    with jax.named_scope("confidence_head"):
        return _sharded(hidden, head, adjustment, v, transposed, implementation)


def _sharded(
    hidden: Array,
    head: Matrix,
    adjustment: Adjustment,
    v: int,
    transposed: bool,
    implementation: Implementation | None,
) -> HeadResult:
    """Divides positions and vocabulary over the mesh in force, if there is one."""
    mesh, axes = dispatch.mesh_axes("data", "tensor")
    local = functools.partial(_local, transposed=transposed, implementation=implementation)
    if mesh is None:
        return local(hidden, head, adjustment, axis=None)
    sizes = {axis: mesh.shape[axis] for axis in axes}
    rows = "data" if hidden.ndim > 1 and hidden.shape[0] % sizes.get("data", 1) == 0 else None
    rows = rows if "data" in sizes else None
    unit = BLOCK if isinstance(head, QuantizedMatrix) and head.scheme == "fp8" else 1
    columns = "tensor" if "tensor" in sizes and v % (unit * sizes["tensor"]) == 0 else None
    head_spec = PartitionSpec(columns, None) if transposed else PartitionSpec(None, columns)
    return jax.shard_map(
        functools.partial(local, axis=columns),
        mesh=mesh,
        in_specs=(
            PartitionSpec(rows),
            jax.tree.map(lambda _: head_spec, head),
            PartitionSpec(rows),
        ),
        out_specs=PartitionSpec(rows),
        check_vma=False,
    )(hidden, head, adjustment)


def _local(
    hidden: Array,
    head: Matrix,
    adjustment: Adjustment,
    *,
    axis: str | None,
    transposed: bool,
    implementation: Implementation | None,
) -> HeadResult:
    """On one device: its part of the vocabulary, merged with the others' along ``axis``."""
    batch = hidden.shape[:-1]
    offset = 0
    if axis is not None:  # ids count from this device's first column
        offset = xla.vocabulary_of(head, transposed) * jax.lax.axis_index(axis)
    flat = Adjustment(
        (adjustment.banned - offset).reshape(-1),
        (adjustment.penalised - offset).reshape(-1),
        adjustment.penalty.reshape(-1),
    )

    def by_kernel(hidden: Array, head: Matrix, flat: Adjustment) -> Statistics:
        if not isinstance(head, QuantizedMatrix):
            return kernel.statistics(hidden, head, None, flat, transposed)
        if head.scheme == "int8":
            return kernel.statistics(hidden, head.values, head.scales, flat)
        return kernel.statistics(hidden, dequantize(head, hidden.dtype), None, flat)

    def by_xla(hidden: Array, head: Matrix, flat: Adjustment) -> Statistics:
        return xla.statistics(hidden, head, flat, transposed)

    rows = hidden.reshape(-1, hidden.shape[-1])
    memory = dispatch.run(implementation, by_kernel, by_xla, rows, head, flat)
    if axis is not None:
        ids = (memory.token, memory.runner_up)
        token, runner_up = (jnp.where(x < NO_TOKEN, x + offset, NO_TOKEN) for x in ids)
        memory = memory._replace(token=token, runner_up=runner_up)
        memory = merge(jax.tree.map(lambda x: jax.lax.all_gather(x, axis), memory), axis=0)
    return HeadResult(*(x.reshape(batch) for x in finish(memory)))
