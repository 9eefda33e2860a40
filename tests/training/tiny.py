"""A model, a tokenizer and texts so small that a training step takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

MOE = {
    "model_type": "llada2_moe",
    "vocab_size": 261,  # ByteTokenizer's, like the special tokens below
    "mask_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
}
DENSE = MOE | {"num_experts": 0}  # compiles in a third of the time


def write_files(folder: Path, model: dict[str, Any] = DENSE) -> dict[str, Any]:
    """Writes everything that a run reads, and returns its configuration without an output_dir."""
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    (folder / "tokenizer").mkdir()
    kind = {"tokenizer_class": "ByteTokenizer"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(kind))
    rng = np.random.default_rng(0)
    for name, count in (("train", 90), ("valid", 12)):
        rows = (
            {"text": "".join(rng.choice(list("abc "), rng.integers(3, 28)))} for _ in range(count)
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {
            "config_path": str(folder / "model.yaml"),
            "tokenizer_path": str(folder / "tokenizer"),
        },
        "data": {
            "train_path": str(folder / "train.jsonl"),
            "validation_path": str(folder / "valid.jsonl"),
            "max_seq_len": 32,
            "cache_dir": str(folder / "cache"),
        },
        "diffusion": {"block_size": 8},
        "train": {
            "max_steps": 12,
            "global_batch_size": 8,
            "lr": 3e-3,
            "lr_min": 1e-4,
            "lr_warmup_ratio": 0.2,
            "enable_mixed_precision": False,
            "expert_bias_update_rate": 1e-2,
            "save_steps": 3,
            "keep_checkpoints": 9,
            "log_steps": 2,
            "fsdp": 1,
            "save_hf_weights": False,
        },
    }
