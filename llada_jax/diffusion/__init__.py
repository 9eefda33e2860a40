"""Noise, layout and loss of block-diffusion training: pure functions."""

from llada_jax.diffusion.config import DiffusionConfig, checked_fields
from llada_jax.diffusion.head import HeadStats, head_stats
from llada_jax.diffusion.layout import Rows, clean_context, joint_pass, noisy_pass
from llada_jax.diffusion.noise import Noise, draw_noise, mask_rates, random_tokens, write_draft
from llada_jax.diffusion.objective import Losses, Mean, objective

__all__ = [
    "DiffusionConfig",
    "HeadStats",
    "Losses",
    "Mean",
    "Noise",
    "Rows",
    "checked_fields",
    "clean_context",
    "draw_noise",
    "head_stats",
    "joint_pass",
    "mask_rates",
    "noisy_pass",
    "objective",
    "random_tokens",
    "write_draft",
]
