"""Made-up checkpoints in the Hugging Face layout, and a plain twin of the import.

Names, shapes and slices are spelled out here a second time on purpose: the tests compare the key
table with this file, and the files are written by the ``safetensors`` package.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from llada_jax.config import ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)


def make_config(**changes) -> ModelConfig:
    values = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rotary_dim": 4,
        "mask_token_id": 63,
        "eos_token_ids": (62,),
        "pad_token_id": 62,
    }
    return ModelConfig(**(values | changes))


VARIANTS = {
    "plain": {},
    "biases": {"use_bias": True, "use_qkv_bias": True},
    "tied": {"tie_word_embeddings": True},
    "no-shared": {"num_shared_experts": 0},
    "two-shared": {"num_shared_experts": 2},
    "first-k-0": {"first_k_dense_replace": 0},
    "first-k-2": {"first_k_dense_replace": 2},
    "dense": {"num_experts": 0, "num_experts_per_tok": 0, "num_shared_experts": 0},
    "one-layer": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
}


def shapes(c: ModelConfig, merged: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes after spec section 1.3."""
    d, f, e = c.hidden_size, c.moe_intermediate_size, c.num_experts
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    out = {"model.word_embeddings.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
    if not c.tie_word_embeddings:
        out["lm_head.weight"] = (c.vocab_size, d)

    def mlp(prefix: str, ffn: int):
        out[f"{prefix}.gate_proj.weight"] = (ffn, d)
        out[f"{prefix}.up_proj.weight"] = (ffn, d)
        out[f"{prefix}.down_proj.weight"] = (d, ffn)

    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}"
        out[f"{p}.input_layernorm.weight"] = (d,)
        out[f"{p}.post_attention_layernorm.weight"] = (d,)
        out[f"{p}.attention.query_key_value.weight"] = (qkv, d)
        out[f"{p}.attention.query_layernorm.weight"] = (c.head_dim,)
        out[f"{p}.attention.key_layernorm.weight"] = (c.head_dim,)
        out[f"{p}.attention.dense.weight"] = (d, c.num_attention_heads * c.head_dim)
        if c.use_qkv_bias:
            out[f"{p}.attention.query_key_value.bias"] = (qkv,)
        if c.use_bias:
            out[f"{p}.attention.dense.bias"] = (d,)
        if i < c.num_dense_layers:
            mlp(f"{p}.mlp", c.intermediate_size)
            continue
        out[f"{p}.mlp.gate.weight"] = (e, d)
        out[f"{p}.mlp.gate.expert_bias"] = (e,)
        if merged:
            out[f"{p}.mlp.experts.gate_proj"] = (e, f, d)
            out[f"{p}.mlp.experts.up_proj"] = (e, f, d)
            out[f"{p}.mlp.experts.down_proj"] = (e, d, f)
        else:
            for j in range(e):
                mlp(f"{p}.mlp.experts.{j}", f)
        if c.num_shared_experts:
            mlp(f"{p}.mlp.shared_experts", f * c.num_shared_experts)
    return out


def make_tensors(config: ModelConfig, dtype=F32, *, merged=False, seed=0) -> dict[str, np.ndarray]:
    """Random tensors; ``dtype`` is a precision, or a function from name to precision."""
    rng = np.random.default_rng(seed)
    choose = dtype if callable(dtype) else lambda name: dtype
    return {
        name: rng.normal(size=shape).astype(choose(name))
        for name, shape in shapes(config, merged).items()
    }


def twin(c: ModelConfig, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The flat parameters, by plain slicing and stacking of one-tensor-an-expert tensors."""
    n, k, h, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    out = {"embed/embedding": t["model.word_embeddings.weight"]}
    out["final_norm/scale"] = t["model.norm.weight"]
    if not c.tie_word_embeddings:
        out["lm_head/kernel"] = t["lm_head.weight"].T
    rows: dict[str, list[np.ndarray]] = {}
    for i in range(c.num_hidden_layers):
        stack = "dense_layers" if i < c.num_dense_layers else "moe_layers"
        p = f"model.layers.{i}"

        def put(path: str, value: np.ndarray, stack=stack):
            rows.setdefault(f"{stack}/{path}", []).append(value)

        put("attention_norm/scale", t[f"{p}.input_layernorm.weight"])
        put("mlp_norm/scale", t[f"{p}.post_attention_layernorm.weight"])
        put("attention/query_norm/scale", t[f"{p}.attention.query_layernorm.weight"])
        put("attention/key_norm/scale", t[f"{p}.attention.key_layernorm.weight"])
        w = t[f"{p}.attention.query_key_value.weight"]
        q, key, v = w[: n * h], w[n * h : (n + k) * h], w[(n + k) * h :]
        put("attention/query/kernel", q.T.reshape(d, n, h))
        put("attention/key/kernel", key.T.reshape(d, k, h))
        put("attention/value/kernel", v.T.reshape(d, k, h))
        put("attention/out/kernel", t[f"{p}.attention.dense.weight"].T.reshape(n, h, d))
        if c.use_qkv_bias:
            b = t[f"{p}.attention.query_key_value.bias"]
            put("attention/query/bias", b[: n * h].reshape(n, h))
            put("attention/key/bias", b[n * h : (n + k) * h].reshape(k, h))
            put("attention/value/bias", b[(n + k) * h :].reshape(k, h))
        if c.use_bias:
            put("attention/out/bias", t[f"{p}.attention.dense.bias"])
        for part in ("gate", "up", "down"):
            if stack == "dense_layers":
                put(f"mlp/{part}/kernel", t[f"{p}.mlp.{part}_proj.weight"].T)
                continue
            experts = [t[f"{p}.mlp.experts.{e}.{part}_proj.weight"].T for e in range(c.num_experts)]
            put(f"moe/experts/{part}", np.stack(experts))
            if c.num_shared_experts:
                put(f"moe/shared/{part}/kernel", t[f"{p}.mlp.shared_experts.{part}_proj.weight"].T)
        if stack == "moe_layers":
            put("moe/router/kernel", t[f"{p}.mlp.gate.weight"].T)
            put("moe/router/expert_bias", t[f"{p}.mlp.gate.expert_bias"])
    return out | {path: np.stack(values) for path, values in rows.items()}


def merge(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One tensor an expert -> merged experts."""
    out = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    for i in range(config.num_dense_layers, config.num_hidden_layers):
        prefix = f"model.layers.{i}.mlp.experts"
        for part in ("gate_proj", "up_proj", "down_proj"):
            out[f"{prefix}.{part}"] = np.stack(
                [tensors[f"{prefix}.{e}.{part}.weight"] for e in range(config.num_experts)]
            )
    return out


def write(
    folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], files: int = 1
) -> Path:
    """Writes a checkpoint with the ``safetensors`` package, tensors dealt over ``files`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(files):
        name = f"model-{i:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[i::files])
        safetensors.numpy.save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the ``safetensors`` package."""
    out: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(file)
    return out


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Asserts that two sets of tensors are equal, bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name
