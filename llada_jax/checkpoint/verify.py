"""How far two models agree on the same tokens: pure functions of their outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

_ROWS = 256  # positions at a time: a vocabulary of 157 184 in float64 is 1.3 MB a position


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of model b with model a, the reference.

    Attributes:
      positions: how many positions were compared.
      mean_kl: mean over positions of KL(a || b), in nats.
      max_kl: the largest KL(a || b) of a position, in nats.
      max_logit_difference: largest absolute difference of two logits.
      top1: share of positions at which both have the same argmax (the lowest id of equals).
      top5: share of positions at which b's argmax is among a's five most probable tokens.
      layer_drift: for each layer, ``|h_a - h_b| / |h_a|`` over all its hidden states (Frobenius
        norms); empty if no hidden states were given.
    """

    positions: int
    mean_kl: float
    max_kl: float
    max_logit_difference: float
    top1: float
    top5: float
    layer_drift: tuple[float, ...] = ()


def compare(
    a: Float[jax.Array | np.ndarray, "*batch V"],
    b: Float[jax.Array | np.ndarray, "*batch V"],
    *,
    hidden_a: Sequence[Float[jax.Array | np.ndarray, ...]] = (),
    hidden_b: Sequence[Float[jax.Array | np.ndarray, ...]] = (),
) -> Agreement:
    """Compares two models' outputs on the same tokens, in float64.

    Args:
      a: logits of the reference.
      b: logits of the model under test.
      hidden_a: the reference's hidden states, one array a layer.
      hidden_b: the same of the model under test.

    Raises:
      ValueError: if there is no position, a logit is NaN, or the hidden states do not match.
    """
    vocabulary = a.shape[-1]
    a, b = a.reshape(-1, vocabulary), b.reshape(-1, vocabulary)
    if not len(a):
        raise ValueError("there are no positions to compare; give at least one token")
    kl, differences, top1, top5 = [], [], [], []
    for rows_a, rows_b in _chunks(a, b):
        if np.isnan(rows_a).any() or np.isnan(rows_b).any():
            which = "a" if np.isnan(rows_a).any() else "b"
            raise ValueError(
                f"the logits of model {which} hold NaN; load it with check_finite=True"
            )
        kl.append(kl_divergence(rows_a, rows_b))
        with np.errstate(invalid="ignore"):  # two logits of -inf (banned tokens) agree
            differences.append(np.nan_to_num(np.abs(rows_a - rows_b), posinf=np.inf).max())
        best_b = rows_b.argmax(-1)
        top1.append(rows_a.argmax(-1) == best_b)
        rank = (rows_a > np.take_along_axis(rows_a, best_b[:, None], -1)).sum(-1)
        top5.append(rank < 5)
    all_kl = np.concatenate(kl)
    return Agreement(
        positions=len(a),
        mean_kl=float(all_kl.mean()),
        max_kl=float(all_kl.max()),
        max_logit_difference=float(max(differences)),
        top1=float(np.concatenate(top1).mean()),
        top5=float(np.concatenate(top5).mean()),
        layer_drift=layer_drift(hidden_a, hidden_b),
    )


def kl_divergence(
    a: Float[np.ndarray, "*batch V"], b: Float[np.ndarray, "*batch V"]
) -> Float[np.ndarray, "*batch"]:
    """KL(softmax(a) || softmax(b)) of each row in nats; never negative.

    A token that a excludes (logit -inf) contributes nothing; one that only b excludes makes it
    infinite.
    """
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def layer_drift(
    hidden_a: Sequence[Float[jax.Array | np.ndarray, ...]],
    hidden_b: Sequence[Float[jax.Array | np.ndarray, ...]],
) -> tuple[float, ...]:
    """Relative Frobenius distance of two models' hidden states, layer by layer.

    Raises:
      ValueError: if the lists or their arrays differ in shape.
    """
    if [h.shape for h in hidden_a] != [h.shape for h in hidden_b]:
        raise ValueError(
            f"hidden states of {len(hidden_a)} and {len(hidden_b)} layers do not match in shape; "
            "run both models on the same tokens and collect the same layers"
        )
    out = []
    for x, y in zip(hidden_a, hidden_b, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        distance, size = np.linalg.norm(x - y), np.linalg.norm(x)
        out.append(float(distance / size) if size else float(distance > 0))
    return tuple(out)


def _chunks(a, b) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for row in range(0, len(a), _ROWS):
        part = slice(row, row + _ROWS)
        yield np.asarray(a[part], np.float64), np.asarray(b[part], np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
