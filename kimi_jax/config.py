"""Model configuration, and the checked passage from plain dicts to frozen dataclasses.

``ModelConfig`` uses the field names of a Hugging Face ``config.json``, so that there is nothing to translate.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from kimi_jax.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; ``factor`` 1.0 is plain RoPE, anything above is YaRN.

    ``mscale_all_dim`` 0 means absent: the softmax scale is then not corrected.
    """

    theta: float = 50_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        for name, limit in {"theta": 1, "beta_fast": 0, "beta_slow": 0}.items():
            if not limit < (value := getattr(self, name)) < math.inf:
                raise UserError(f"model.rope.{name} must be above {limit} and finite, not {value}")
        least = {"factor": 1, "original_max_position_embeddings": 1, "mscale": 0, "mscale_all_dim": 0}
        for name, limit in least.items():
            if not limit <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"model.rope.{name} must be at least {limit} and finite, not {value}")

    def magnitude(self, mscale: float) -> float:
        """m(factor, mscale) = 0.1 * mscale * ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4)."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def attention_scaling(self) -> float:
        """The factor A on cos and sin."""
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def softmax_scaling(self) -> float:
        """The factor on (nope + rope)^-0.5."""
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of one model. Defaults: the released Kimi-K2 where it has no natural small value."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    rope: RopeConfig = RopeConfig()
    dtype: str = "bfloat16"  # of the matrix products
    param_dtype: str = "float32"  # of the stored weights
    remat: str = "none"  # which activations of a block are recomputed: see model.REMAT_POLICIES
    experts: str = "fastest"  # how experts are computed: see layers.experts.EXPERT_PATHS

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise UserError(f"model.{field.name} must be at least {least}, not {value}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"model.num_experts_per_tok ({self.num_experts_per_tok}) exceeds "
                f"model.n_routed_experts ({self.n_routed_experts})"
            )
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise UserError(
                f"model.first_k_dense_replace must lie in 0..num_hidden_layers ({self.num_hidden_layers}), "
                f"not {self.first_k_dense_replace}"
            )
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f"model.qk_rope_head_dim must be even (rotation acts on pairs), not {self.qk_rope_head_dim}"
            )
        for name in ("routed_scaling_factor", "initializer_range"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"model.{name} must be at least 0 and finite, not {value}")
        if not 0 < self.rms_norm_eps < math.inf:
            raise UserError(f"model.rms_norm_eps must be positive and finite, not {self.rms_norm_eps}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                raise UserError(f"model.{name} must be bfloat16 or float32, not {getattr(self, name)!r}")

    @property
    def n_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """The factor on q.k: (nope + rope)^-0.5 times YaRN's correction."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_scaling

    def replace(self, **changes) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> ModelConfig:
        """From the ``model`` section of a ``get_config()``; a ``preset`` key names the preset to start from."""
        from kimi_jax import presets

        values = dict(cfg)
        name = values.pop("preset", None)
        base = dataclasses.asdict(presets.get(name)) if name else {}
        given = values.get("rope")
        if given is None or hasattr(given, "keys"):  # a ConfigDict is no Mapping
            values["rope"] = {**base.get("rope", {}), **(given or {})}
        return from_dict(cls, {**base, **values}, "model", also=("preset",))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | Path, **changes) -> ModelConfig:
        """From a Hugging Face ``config.json`` (path, or its parsed content) of the DeepSeek-V3 / Kimi-K2 family."""
        if isinstance(config, (str, Path)):
            try:
                config = json.loads(Path(config).read_text(encoding="utf-8"))
            except OSError as error:
                raise UserError(f"cannot read {config}: {error.strerror}") from error
            except ValueError as error:
                raise UserError(f"{config} is not valid JSON: {error}") from error
        if not isinstance(config, Mapping):
            raise UserError("a Hugging Face config must be a JSON object")
        _refuse_unsupported(config)
        names = {f.name for f in dataclasses.fields(cls)} - {"rope", "dtype", "param_dtype", "remat", "experts"}
        values: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
        for name, none in {"n_shared_experts": 0, "norm_topk_prob": False}.items():  # null is none, not our default
            if config.get(name, none) is None:
                values[name] = none
        values["rope"] = _rope_from_hf(config)
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        values["dtype"] = values["param_dtype"] = "bfloat16" if stored in ("bfloat16", "float16") else "float32"
        return from_dict(cls, {**values, **changes}, "config.json")

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` content that ``from_hf`` and transformers read back as this model."""
        rope, plain = self.rope, self.rope.factor == 1
        scaling = dict(dataclasses.asdict(rope), type="yarn", rope_type="yarn")
        del scaling["theta"]
        if not rope.mscale_all_dim:
            del scaling["mscale_all_dim"]
        own = ("rope", "dtype", "param_dtype", "remat", "experts")
        shape = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        return shape | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            "attention_bias": False,
            "hidden_act": "silu",
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "rope_theta": rope.theta,
            "rope_scaling": None if plain else scaling,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "torch_dtype": self.param_dtype,
        }


_MAY_BE_ZERO = {"first_k_dense_replace", "n_shared_experts"}

_SUPPORTED = {  # key of config.json -> the values this implementation computes exactly
    "attention_bias": (False, None),
    "hidden_act": ("silu", None),
    "moe_layer_freq": (1, None),
    "n_group": (1, None),
    "rope_interleave": (True,),  # null is no
    "scoring_func": ("sigmoid", None),
    "tie_word_embeddings": (False, None),
    "topk_method": ("noaux_tc", None),
}

_BESIDE_ROPE = ("original_max_position_embeddings", "partial_rotary_factor")

_NEEDED = ("first_k_dense_replace", "n_group", "routed_scaling_factor")  # transformers' defaults are not ours


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, allowed in _SUPPORTED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"config.json: {key}={value!r} is not supported (only {allowed[0]!r})")
    model_type = config.get("model_type")
    if model_type not in (None, "deepseek_v3", "kimi_k2"):
        raise UserError(f"config.json: model_type={model_type!r} is not a Kimi-K2 / DeepSeek-V3 model")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise UserError(f"config.json: num_key_value_heads={kv_heads} must equal num_attention_heads={heads} in MLA")
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}: add what the model was trained with")


def _rope_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads ``rope_scaling`` + ``rope_theta`` (released files), or else ``rope_parameters`` (transformers 5).

    Keys of ``_BESIDE_ROPE`` outside either count more than those within, as in transformers.
    """
    released, newer = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for given in (released, newer):
        if not isinstance(given, Mapping):
            raise UserError(f"config.json: the rope parameters must be an object, not {given!r}")
    found = dict(released or newer) | {key: config[key] for key in _BESIDE_ROPE if config.get(key) is not None}
    thetas = (found.pop("rope_theta", None), config.get("rope_theta"), 10_000.0)
    theta = next(value for value in thetas if value is not None)
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rope type {kind!r} is not supported (only 'yarn' and 'default')")
    known = {f.name for f in dataclasses.fields(RopeConfig)} - {"theta"}
    for key in set(found) - known:
        if found[key] != {"truncate": True, "partial_rotary_factor": 1.0}.get(key):
            raise UserError(f"config.json: rope option {key}={found[key]!r} is not supported")
    if kind == "default":
        return {"theta": theta}
    values = {key: value for key, value in found.items() if key in known and value is not None}
    for key in ("beta_fast", "beta_slow"):  # 0 is absent, as in transformers
        values[key] = values.get(key) or getattr(RopeConfig, key)
    longest = config.get("max_position_embeddings") or ModelConfig.max_position_embeddings
    longest = _coerce(longest, int, "config.json.max_position_embeddings")
    original = values.setdefault("original_max_position_embeddings", longest)
    original = _coerce(original, int, "config.json.rope.original_max_position_embeddings")
    values.setdefault("factor", longest / max(original, 1))  # RopeConfig refuses what is below 1
    values.setdefault("mscale", 0.0)
    return {"theta": theta, **values}


def from_dict(cls: type[T], values: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> T:
    """Builds a frozen dataclass from a mapping; unknown, missing and mistyped keys raise ``UserError``.

    A nested dataclass with a ``from_string`` may be given as a plain string. ``also``: keys that the caller took out.
    """
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, (*hints, *also), n=1, cutoff=0.0)
            raise UserError(f"unknown key {where}.{key}; did you mean {where}.{near[0]}?")
    required = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _coerce(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type, or ``UserError``; numbers widen (1 -> 1.0) but never narrow."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where)  # type: ignore[arg-type]
        if isinstance(value, str) and hasattr(hint, "from_string"):
            return hint.from_string(value)  # type: ignore[attr-defined]
    elif get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    elif get_origin(hint) in (Union, type(int | None)):
        for option in get_args(hint):
            try:
                return _coerce(value, option, where)
            except UserError:
                continue
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise UserError(f"{where} must be {expected}, not {value!r}")
