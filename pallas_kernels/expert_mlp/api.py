"""The routed experts: checks, choice of the implementation, spreading over a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import cores_here
from pallas_kernels.dispatch import Implementation, mesh_axes, run
from pallas_kernels.expert_mlp import tuning
from pallas_kernels.expert_mlp.kernel import expert_mlp_pallas
from pallas_kernels.expert_mlp.routing import sort_pairs
from pallas_kernels.expert_mlp.xla import expert_mlp_xla
from pallas_kernels.quantized import BLOCK, Matrix, QuantizedMatrix


def expert_mlp(
    x: Float[Array, "M D"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
    *,
    layer: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """Each token through its experts: ``sum_k gates[k] * down(silu(gate(x)) * up(x))``.

    With ``layer`` this is for inference: the stacks of all layers are read in place, and on a TPU
    one kernel streams the weights of the experts in use through VMEM once. More than
    ``tuning.MAX_TOKENS`` tokens (prefill) use every expert with many rows each; there
    ``ragged_dot`` takes over. Without ``layer`` it is differentiable and plain XLA.

    Under a mesh (``jax.set_mesh``) and with ``layer``, each device works on its own experts
    (axis "expert") and its own columns of F ("tensor"), and the sums are added up; tokens are
    spread over "data" and "fsdp" where these divide them. Without ``layer`` XLA partitions it.

    Args:
      x: tokens.
      gate, up: ``[E, D, F]``; with ``layer`` ``[layers, E, D, F]``. Quantised or not.
      down: ``[E, F, D]``; with ``layer`` ``[layers, E, F, D]``.
      experts: each token's experts. An id outside ``0 … E-1`` means none.
      gates: their weights, float32.
      layer: whose experts.
      implementation: see ``dispatch.run``.

    Returns:
      The mixture in ``x.dtype``, summed in float32; exact zeros for tokens without experts.

    Raises:
      ValueError: for shapes that do not fit together, and where the kernel is asked for but has no
        gradient or no room.
    """
    stack = 3 if layer is None else 4
    _check(x, gate, up, down, experts, gates, stack)
    if layer is None:
        if implementation == "pallas":
            raise ValueError(
                "implementation = 'pallas' has no gradient: pass stacks of layers and `layer`, or "
                "leave it None"
            )
        return expert_mlp_xla(x, gate, up, down, experts, gates)
    mesh, axes = mesh_axes("data", "fsdp", "expert", "tensor")
    if mesh is None or not axes:
        return _local(x, gate, up, down, experts, gates, layer, implementation, x.dtype)
    return _sharded(mesh, axes, x, gate, up, down, experts, gates, layer, implementation)


def _check(x, gate, up, down, experts, gates, stack: int) -> None:
    names = "[layers, E, ...] with `layer`" if stack == 4 else "[E, ...] without `layer`"
    for name, matrix in (("gate", gate), ("up", up), ("down", down)):
        if len(matrix.shape) != stack:
            raise ValueError(f"{name} {matrix.shape} must be {names}")
    *lead, dim, ffn = gate.shape
    for name, matrix, expected in (("up", up, (dim, ffn)), ("down", down, (ffn, dim))):
        if matrix.shape != (*lead, *expected):
            raise ValueError(
                f"{name} {matrix.shape} does not fit gate {gate.shape}: must be "
                f"{(*lead, *expected)}"
            )
    if x.shape[1] != dim:
        raise ValueError(f"x {x.shape} does not fit gate {gate.shape}: D = {dim}")
    if experts.shape != gates.shape:
        raise ValueError(f"experts {experts.shape} and gates {gates.shape} must be alike")


def _local(x, gate, up, down, experts, gates, layer, implementation, out_dtype) -> Array:
    """On one device."""
    cores = cores_here()
    tiles = tuning.choose(len(x), x.shape[1], experts.shape[1], gate, x.dtype, cores)
    if tiles is None:
        if implementation == "pallas":
            raise ValueError(
                f"{len(x)} tokens of {x.shape[1]} do not fit in VMEM (at most "
                f"{tuning.MAX_TOKENS}): split them, or use implementation = 'xla'"
            )
        implementation = "xla"

    def pallas(x, gate, up, down, experts, gates, layer):
        assert tiles is not None
        with jax.named_scope("dispatch"):
            touched = sort_pairs(experts, gates, gate.shape[1], tiles.rows)
        with jax.named_scope("experts"):
            return expert_mlp_pallas(x, gate, up, down, touched, layer, tiles, out_dtype, cores)

    def xla(x, gate, up, down, experts, gates, layer):
        return expert_mlp_xla(x, gate, up, down, experts, gates, layer, out_dtype)

    layer = jnp.asarray(layer, jnp.int32)
    return run(implementation, pallas, xla, x, gate, up, down, experts, gates, layer)


def _sharded(
    mesh: AbstractMesh, axes, x, gate, up, down, experts, gates, layer, implementation
) -> Array:
    num_experts, _, ffn = gate.shape[1:]
    own_experts = own_columns = None
    if "expert" in axes and num_experts % mesh.shape["expert"] == 0:
        own_experts = "expert"
    if "tensor" in axes and _divides(gate, down, mesh.shape["tensor"]):
        own_columns = "tensor"
    rows: tuple[str, ...] = ()
    shares = 1
    for axis in ("data", "fsdp"):
        if axis in axes and len(x) % (shares * mesh.shape[axis]) == 0:
            rows, shares = (*rows, axis), shares * mesh.shape[axis]
    if "fsdp" in axes:
        by_column = (None, own_experts, "fsdp", own_columns)
        gate, up = (_one_layer(m, layer, mesh, by_column) for m in (gate, up))
        down = _one_layer(down, layer, mesh, (None, own_experts, own_columns, "fsdp"))
        layer = 0
    sums = tuple(a for a in (own_experts, own_columns) if a)
    by_column = P(None, own_experts, None, own_columns)
    by_row = P(None, own_experts, own_columns, None)
    tokens = P(rows or None, None)

    def body(x, gate, up, down, experts, gates, layer):
        here = num_experts
        if own_experts:
            here = num_experts // mesh.shape["expert"]
            experts = experts - jax.lax.axis_index("expert") * here
            experts = jnp.where((experts >= 0) & (experts < here), experts, here)
        if own_columns and isinstance(down, QuantizedMatrix):
            down = dataclasses.replace(down, rows=ffn // mesh.shape["tensor"])
        out = _local(x, gate, up, down, experts, gates, layer, implementation, jnp.float32)
        return jax.lax.psum(out, sums) if sums else out

    # int8 has one scale for all rows: they are not divided with down's rows.
    out = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(
            tokens,
            _specs(gate, by_column, by_column),
            _specs(up, by_column, by_column),
            _specs(down, by_row, by_row if _scheme(down) != "int8" else P(None, own_experts)),
            tokens,
            tokens,
            P(),
        ),
        out_specs=tokens,
        check_vma=False,
    )(x, gate, up, down, experts, gates, jnp.asarray(layer, jnp.int32))
    return out.astype(x.dtype)


def _one_layer(matrix: Matrix, layer: Any, mesh: AbstractMesh, axes: tuple) -> Matrix:
    """``[1, E, ...]`` of a stack, sharded over ``axes`` where they divide.

    For stacks whose D is spread over fsdp: it is then gathered for one layer at a time. Without
    saying how the slice is sharded XLA would gather all layers first.
    """

    def take(stack: Array) -> Array:
        sizes = [1 if axis is None else mesh.shape[axis] for axis in axes]
        fits = zip(axes, sizes, stack.shape, strict=True)
        spec = [axis if total % size == 0 else None for axis, size, total in fits]
        one = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=True)
        return jax.lax.with_sharding_constraint(one, P(*spec))

    return jax.tree.map(take, matrix)


def _scheme(matrix: Matrix) -> str | None:
    return matrix.scheme if isinstance(matrix, QuantizedMatrix) else None


def _specs(matrix: Matrix, values: P, scales: P) -> Any:
    if not isinstance(matrix, QuantizedMatrix):
        return values
    return dataclasses.replace(matrix, values=values, scales=scales)


def _divides(gate: Matrix, down: Matrix, shares: int) -> bool:
    """Whether F falls into equal parts, of whole blocks where blocks have a scale each."""
    blocks = any(_scheme(m) in ("fp8", "int4") for m in (gate, down))
    return gate.shape[-1] % (shares * (BLOCK if blocks else 1)) == 0
