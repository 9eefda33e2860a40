"""Configuration: frozen dataclasses, read from Hugging Face ``config.json`` or from YAML.

``ModelConfig`` keeps the names of the released ``config.json``, so that a YAML file in
``configs/model/`` and a checkpoint's own configuration are read by the same code.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MASK_TOKEN_ID = 156895  # <|mask|> of the released tokenizer
EOS_TOKEN_ID = 156892  # <|endoftext|>, also the padding

_MODEL_TYPES = ("llada2_moe", "llada2_moe_veomni")

# Keys that the released modelling code never reads, or reads with one value only. Another value
# would describe a model that this code does not compute, so it is refused.
_FIXED = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "norm_topk_prob": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "use_qk_norm": (True,),
    "use_rmsnorm": (True,),
    "moe_router_enable_expert_bias": (True,),
    "router_dtype": ("fp32", "float32"),
    "use_sliding_window": (False,),
    "using_split_qkv_in_self_attention": (False,),
    "attention_dropout": (0, 0.0),
    "embedding_dropout": (0, 0.0),
    "output_dropout": (0, 0.0),
    "expert_capacity": (None,),  # LLaDA2.2's block routing
    "quantization_config": (None,),
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the way out."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length (Hugging Face's fields).

    Attributes:
      rope_type: ``"linear"``, ``"yarn"`` or ``"llama3"``.
      factor: ratio of the new context length to the trained one.
      original_max_position_embeddings: trained context length in tokens; needed by ``"yarn"``
        (where it defaults to ``max_position_embeddings``) and ``"llama3"``.
      low_freq_factor, high_freq_factor: ``"llama3"`` only.
      beta_fast, beta_slow, attention_factor: ``"yarn"`` only.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> RopeScaling | None:
        """Reads ``rope_scaling``; ``None`` for the plain rotary embedding."""
        raw = dict(raw)
        kind = raw.pop("rope_type", raw.pop("type", "default"))
        raw.pop("type", None)
        raw.pop("rope_theta", None)
        raw.pop("partial_rotary_factor", None)
        if kind == "default":
            return None
        if kind not in ("linear", "yarn", "llama3"):
            raise ConfigError(
                f"rope_scaling of type {kind!r} is not supported; use linear, yarn, llama3 or null"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        for key in raw:
            if key not in known:
                raise ConfigError(f"rope_scaling.{key} = {raw[key]!r} is not supported")
        if "factor" not in raw:
            raise ConfigError(f"rope_scaling of type {kind!r} needs a factor")
        if kind == "llama3" and raw.get("original_max_position_embeddings") is None:
            raise ConfigError(
                "rope_scaling of type 'llama3' needs original_max_position_embeddings"
            )
        return cls(rope_type=kind, **_as_declared(cls, raw))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LLaDA2-MoE model; field names as in the released ``config.json``.

    ``num_experts = 0`` (or ``first_k_dense_replace >= num_hidden_layers``) gives a dense model,
    ``num_shared_experts = 0`` leaves the shared expert out. Dimensions count elements, lengths
    count tokens.

    Raises:
      ConfigError: on values that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    num_shared_experts: int = 0
    moe_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    routed_scaling_factor: float = 1.0
    rotary_dim: int = 0
    rope_theta: float = 600_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    use_bias: bool = False
    use_qkv_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    mask_token_id: int = MASK_TOKEN_ID
    eos_token_ids: tuple[int, ...] = (EOS_TOKEN_ID,)
    pad_token_id: int = EOS_TOKEN_ID

    def __post_init__(self):
        def require(ok: bool, message: str):
            if not ok:
                raise ConfigError(message)

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be positive")
        require(
            self.num_key_value_heads > 0
            and self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads = {self.num_key_value_heads}",
        )
        require(
            0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim = {self.rotary_dim} must be even and at most head_dim = {self.head_dim}",
        )
        require(
            self.num_dense_layers == 0 or self.intermediate_size > 0,
            "intermediate_size must be positive for the dense layers",
        )
        if self.num_moe_layers:
            require(
                1 <= self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok = {self.num_experts_per_tok} must be between 1 and "
                f"num_experts = {self.num_experts}",
            )
            require(self.moe_intermediate_size > 0, "moe_intermediate_size must be positive")
            require(
                self.n_group >= 1 and self.num_experts % self.n_group == 0,
                f"num_experts = {self.num_experts} must be a multiple of n_group = {self.n_group}",
            )
            require(
                1 <= self.topk_group <= self.n_group,
                f"topk_group = {self.topk_group} must be between 1 and n_group = {self.n_group}",
            )
            require(
                self.num_experts_per_tok <= self.topk_group * self.num_experts // self.n_group,
                f"num_experts_per_tok = {self.num_experts_per_tok} exceeds the experts in "
                f"topk_group = {self.topk_group} groups",
            )
            require(
                self.n_group == 1 or self.num_experts // self.n_group >= 2,
                f"n_group = {self.n_group} leaves fewer than two experts a group",
            )
        for name in ("mask_token_id", "pad_token_id"):
            require(
                0 <= getattr(self, name) < self.vocab_size,
                f"{name} = {getattr(self, name)} is outside the vocabulary of {self.vocab_size}; "
                f"set {name} in the configuration",
            )
        for token in self.eos_token_ids:
            require(
                0 <= token < self.vocab_size,
                f"eos_token_id = {token} is outside the vocabulary of {self.vocab_size}",
            )

    @property
    def num_dense_layers(self) -> int:
        """Layers with a plain feed-forward network; they come first."""
        if self.num_experts == 0:
            return self.num_hidden_layers
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.num_dense_layers

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Builds the configuration that a released ``config.json`` describes.

        Args:
          raw: the parsed JSON object. Keys that do not change the computation are ignored.

        Raises:
          ConfigError: for another architecture, a missing key, or a value that the released
            modelling code would not honour.
        """
        model_type = raw.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise ConfigError(
                f"config.json says model_type = {model_type!r}; this library reads "
                f"{' and '.join(_MODEL_TYPES)} (architecture LLaDA2MoeModelLM)"
            )
        for key, allowed in _FIXED.items():
            if key in raw and raw[key] not in allowed:
                raise ConfigError(
                    f"config.json says {key} = {raw[key]!r}; only {allowed[0]!r} is supported"
                )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in ("rope_scaling", "rotary_dim", "eos_token_ids"):
                continue
            if raw.get(field.name) is not None:
                values[field.name] = raw[field.name]
            elif field.default is dataclasses.MISSING and field.name != "head_dim":
                raise ConfigError(f"config.json lacks {field.name}")
        if "head_dim" not in values:
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        values["rope_scaling"] = RopeScaling.from_hf(rope) if rope else None
        if rope.get("rope_theta") is not None:
            values["rope_theta"] = rope["rope_theta"]
        values["rotary_dim"] = _rotary_dim(raw, rope, values["head_dim"])
        eos = raw.get("eos_token_id")
        if eos is None:
            eos = raw.get("pad_token_id", EOS_TOKEN_ID)
        values["eos_token_ids"] = tuple(eos) if isinstance(eos, Sequence) else (int(eos),)
        values.setdefault("pad_token_id", values["eos_token_ids"][0])
        return cls(**_as_declared(cls, values))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` object that ``from_hf`` reads back to an equal configuration."""
        raw: dict[str, Any] = {
            "architectures": ["LLaDA2MoeModelLM"],
            "model_type": "llada2_moe",
            "hidden_act": "silu",
            "score_function": "sigmoid",
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "moe_router_enable_expert_bias": True,
            "router_dtype": "fp32",
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "output_dropout": 0.0,
            "output_router_logits": False,
            "use_cache": False,
        }
        raw.update(dataclasses.asdict(self))
        raw["partial_rotary_factor"] = self.rotary_dim / self.head_dim
        eos = raw.pop("eos_token_ids")
        raw["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
        if self.num_experts == 0:
            raw["num_experts"] = None
        return raw

    @classmethod
    def from_name(cls, name: str | Path) -> ModelConfig:
        """Reads a configuration by short name (``"mini"``), YAML file, ``config.json`` or folder.

        Raises:
          ConfigError: if nothing of that name exists; the message lists the short names.
        """
        path = Path(name)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            folder = config_folder() / "model"
            path = folder / f"{name}.yaml"
            if not path.is_file():
                known = sorted(p.stem for p in folder.glob("*.yaml"))
                raise ConfigError(
                    f"no model configuration {str(name)!r}: give a folder with config.json, a "
                    f"YAML file, or one of {', '.join(known)}"
                )
        return cls.from_hf(read_mapping(path))


def _as_declared(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks JSON values against the fields' types; whole floats, written as integers, too."""
    kinds = {"int": int, "float": (int, float), "bool": bool}
    declared = {field.name: str(field.type).split(" ")[0] for field in dataclasses.fields(cls)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        kind = declared[name]
        if kind in kinds and value is not None:
            if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "bool"):
                raise ConfigError(f"{name} = {value!r} must be of type {kind}")
            value = float(value) if kind == "float" else value
        checked[name] = value
    return checked


def _rotary_dim(raw: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> int:
    """The rotated share of a head. The released code derives it from the factor alone."""
    factor = raw.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    stated = raw.get("rotary_dim")
    if factor is None:
        return stated if stated is not None else head_dim
    derived = int(head_dim * factor)
    if stated is not None and stated != derived:
        raise ConfigError(
            f"rotary_dim = {stated} contradicts partial_rotary_factor = {factor} of head_dim = "
            f"{head_dim} (which is {derived})"
        )
    return derived


def config_folder() -> Path:
    """The folder ``configs/``: inside an installed package, or at the top of a checkout."""
    packaged = Path(str(importlib.resources.files("llada_jax"))) / "configs"
    return packaged if packaged.is_dir() else packaged.parent.parent / "configs"


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML file that holds one object.

    Raises:
      ConfigError: if the file cannot be parsed or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold one object, not {type(value).__name__}")
    return value


def unknown_field_message(name: str, known: Sequence[str], what: str) -> str:
    """The error text for a field that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    return f"{what} has no field {name!r}{hint}"
