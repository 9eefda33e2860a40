"""A tiny model and packed batches, and the loss by one plain forward over ``[x_t ; x_0]``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.diffusion import DiffusionConfig, Noise, objective
from llada_jax.model import LLaDA2
from llada_jax.model.weights import WeightSpec, weight_specs
from tests.model.test_experts import make_config

ROWS, LENGTH, BLOCK = 8, 32, 4
VOCAB, PAD, MASK = 40, 38, 39
DENSE = LLaDA2(make_config(num_experts=0))
CONFIG = DiffusionConfig(block_size=BLOCK, loss_chunk=12)  # 12 does not divide the 32 tokens

LAYOUTS = [
    *([12, 8, 8], [32], [20], [4, 4, 24]),
    *([16, 16], [28], [8, 8, 8, 8], []),
]


def make_params(model, seed):
    """Weights large enough for every part to matter."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        scale, shift = (0.3, 0) if spec.init == "normal" else (0.1, 1)
        return jnp.asarray(shift + scale * rng.normal(size=spec.shape), jnp.float32)

    specs = weight_specs(model.config)
    return jax.tree.map(draw, specs, is_leaf=lambda x: isinstance(x, WeightSpec))


def make_batch(layout=None, seed=0):
    """Rows of documents, block-aligned; the first tokens of each are its prompt."""
    layout = LAYOUTS if layout is None else layout
    rng = np.random.default_rng(seed)
    shape = (len(layout), LENGTH)
    tokens = np.full(shape, PAD, np.int32)
    positions, document = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    supervised = np.zeros(shape, bool)
    for row, lengths in enumerate(layout):
        start = 0
        for number, length in enumerate(lengths, 1):
            inside = slice(start, start + length)
            tokens[row, inside] = rng.integers(0, PAD, length)
            positions[row, inside] = np.arange(length)
            document[row, inside] = number
            supervised[row, inside] = np.arange(length) >= rng.integers(0, min(length, 7))
            start += length
    return {
        "tokens": tokens,
        "positions": positions,
        "document": document,
        "supervised": supervised,
    }


def make_noise(batch, copies=1, rounds=1, seed=0):
    """Masks, wrong tokens and thresholds, everywhere where there is supervision."""
    rng = np.random.default_rng(seed)
    rows, length = batch["tokens"].shape
    shape = (rows, copies, length)
    supervised = batch["supervised"][:, None]
    rates = rng.uniform(0.05, 0.95, (rows, 1, length)).astype(np.float32)
    rates = np.concatenate([rates, 1 - rates], axis=1)[:, :copies]
    first = rng.random((rows, 1, length)) < 0.5
    masked = supervised & np.concatenate([first, ~first], axis=1)[:, :copies]
    noisy = np.broadcast_to(batch["tokens"][:, None], shape)
    noisy = np.where(supervised & (rng.random(shape) < 0.3), rng.integers(0, PAD, shape), noisy)
    noisy = np.where(masked, MASK, noisy).astype(np.int32)
    above = rng.uniform(0.05, 0.2, (2, rows, rounds - 1, copies, length)).astype(np.float32)
    return as_noise(noisy, rates, *above)


def as_noise(noisy, rates=None, fill_above=None, edit_above=None):
    rows, copies, length = noisy.shape
    none = np.zeros((rows, 0, copies, length), np.float32)
    return Noise(
        jnp.asarray(noisy, jnp.int32),
        jnp.asarray(np.ones(noisy.shape, np.float32) if rates is None else rates),
        jnp.asarray(none if fill_above is None else fill_above),
        jnp.asarray(none if edit_above is None else edit_above),
        jax.random.split(jax.random.key(3), rows),
    )


@functools.cache
def evaluator(model, config, gradient=True):
    """``(params, batch, noise, step) -> (loss, Losses)``, with the gradient of ``loss``."""

    def total(params, batch, noise, step):
        losses = objective(model, config, params, batch, noise, step)
        return sum(term.value() for term in losses.terms.values()), losses

    return jax.jit(jax.value_and_grad(total, has_aux=True) if gradient else total)


def evaluate(model, config, params, batch, noise, step=0, gradient=True):
    """``(loss, Losses, gradient)``."""
    got = evaluator(model, config, gradient)(params, batch, noise, step)
    return (*got[0], got[1]) if gradient else (*got, None)


def training_mask(batch, block):
    """The rule of the 2.0 report, pair by pair: ``[B, 2 L, 2 L]``."""
    rows, length = batch["tokens"].shape
    mask = np.zeros((rows, 2 * length, 2 * length), bool)
    for row in range(rows):
        document, place = batch["document"][row], batch["positions"][row] // block
        for q in range(length):
            for k in np.flatnonzero(document == document[q]):
                mask[row, q, k] = place[q] == place[k]
                mask[row, q, length + k] = place[q] > place[k]
                mask[row, length + q, length + k] = place[q] >= place[k]
    return mask


@functools.cache
def _plain(model):
    def total(params, tokens, positions, mask, live, added, labels, w, e, temperature):
        half = labels.shape[1]
        out = model.apply(
            {"params": params}, tokens, positions, mask=mask, live=live, embedding_noise=added
        )
        logits = model.apply({"params": params}, out.hidden[:, :half], method="logits")
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        p = jax.nn.softmax(logits / temperature)
        entropy = -(p * jnp.log(p)).sum(-1)
        return -(w * log_p).sum() + (e * entropy).sum(), (logits, log_p, entropy)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


class Plain:
    """One noisy copy ``[B, L]`` and the clean one, through the model without any layout code.

    Attributes:
      logits, log_prob, entropy: of the noisy half.
      value, gradient: of ``-sum(w log_prob) + sum(e entropy)``.
    """

    def __init__(self, model, params, batch, noisy, w=None, e=None, temperature=1.0, added=None):
        two = lambda x: np.concatenate([x, x], axis=1)  # noqa: E731
        zero = np.zeros(noisy.shape, np.float32)
        dim = model.config.hidden_size
        added = np.zeros((*noisy.shape, dim), np.float32) if added is None else added
        (self.value, aux), self.gradient = _plain(model)(
            params,
            np.concatenate([noisy, batch["tokens"]], axis=1),
            two(batch["positions"]),
            training_mask(batch, BLOCK),
            two(batch["document"] > 0),
            np.concatenate([added, np.zeros_like(added)], axis=1),
            batch["tokens"],
            zero if w is None else np.asarray(w, np.float32),
            zero if e is None else np.asarray(e, np.float32),
            np.float32(temperature),
        )
        self.logits, self.log_prob, self.entropy = (np.asarray(a) for a in aux)


def kind_of(noisy, batch):
    """``"m2t"``, ``"t2t"``, ``"keep"`` or ``""`` for every position of one copy ``[B, L]``."""
    kinds = np.full(noisy.shape, "", dtype="<U4")
    for row, column in np.ndindex(noisy.shape):
        if batch["supervised"][row, column] and batch["document"][row, column]:
            now, target = noisy[row, column], batch["tokens"][row, column]
            kinds[row, column] = "m2t" if now == MASK else "keep" if now == target else "t2t"
    return kinds


def plain_weights(config, noisy, batch, rates=None):
    """One copy's weights, position by position."""
    kinds = kind_of(noisy, batch)
    weights = np.zeros(noisy.shape)
    for place in np.ndindex(noisy.shape):
        if kinds[place] == "m2t":
            weights[place] = config.mask_loss
            if rates is not None:
                weights[place] /= max(rates[place], 1e-3)
        elif kinds[place] == "t2t":
            weights[place] = config.edit_loss
        elif kinds[place] == "keep":
            weights[place] = config.keep_loss
    return kinds, weights


def plain_cart(masked, batch, p, with_context=True):
    """Dream's token weights with everything that a noisy copy ``[B, L]`` sees, in loops."""
    weights = np.zeros(masked.shape)
    place = batch["positions"] // (BLOCK if with_context else LENGTH)
    for row, i in np.ndindex(masked.shape):
        for j in range(LENGTH):
            if j == i or batch["document"][row, i] != batch["document"][row, j]:
                continue
            own = place[row, i] == place[row, j] and not masked[row, j]
            before = with_context and place[row, j] < place[row, i]
            if own or before:
                weights[row, i] += 0.5 * p * (1 - p) ** (abs(i - j) - 1)
    return weights


def assert_trees_close(got, expected, tolerance=1e-4):
    """Largest deviation over the largest entry, tensor by tensor."""
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(paths, jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        bound = tolerance * max(np.abs(b).max(), 1e-3)
        assert np.abs(a - b).max() <= bound, jax.tree_util.keystr(path)


def add_trees(*trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)
