"""What a checkpoint holds, from its config.json and index alone: for planning before anything is downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import fp8, int4, paths, safetensors
from kimi_jax.checkpoint.hf_config import Quantisation, extra_layers, quantisation_of, read_config
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, STRAY, Entry, plan, text_part
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError

RELEASED_STRAY = "model.layers.{layer}.self_attn.rotary_emb.inv_freq"  # in fp8 shards, one a layer; no parameter
KINDS = ("weights", "scales", "strays")


@dataclass(frozen=True)
class Expected:
    """The tensors that the index lists; without one those of a release: fp8 of every projection, int4 of the routed
    experts, or none quantised.
    """

    cfg: ModelConfig
    quantisation: Quantisation
    listed: frozenset[str] | None = None  # of the text model

    @classmethod
    def open(cls, folder: paths.AnyPath) -> Expected:
        """Needs config.json alone; an index of safetensors that lies beside it must name the tensors of the model."""
        config = read_config(folder)
        cfg, quantisation = ModelConfig.from_hf(config), quantisation_of(config)
        if safetensors.INDEX not in paths.sizes(folder):
            return cls(cfg, quantisation)
        names = text_part(safetensors.read_index(folder))
        extra = extra_layers(config, cfg, names)
        found = cls(cfg, quantisation, frozenset(name for name in names if not name.startswith(extra)))
        found._compare(found.listed or frozenset(), paths.join(folder, safetensors.INDEX))
        return found

    @property
    def block(self) -> tuple[int, int]:
        return self.quantisation.block

    def dtype(self, entry: Entry) -> np.dtype:
        method, is_matrix = self.quantisation.method, len(entry.shape) == 2
        if is_matrix and self._has(entry.name + SCALE_SUFFIX, method == "fp8" and "_proj" in entry.name):
            return fp8.E4M3
        if is_matrix and method == "int4" and self._has(entry.name + int4.SUFFIXES[0], "experts" in entry.path):
            return np.dtype(ml_dtypes.int4)
        return np.dtype(np.float32 if entry.path[-1] == "bias" else ml_dtypes.bfloat16)

    def scale_dtype(self, entry: Entry) -> np.dtype:
        return np.dtype(np.float32)

    def _has(self, name: str, as_released: bool) -> bool:
        return as_released if self.listed is None else name in self.listed

    @cached_property
    def names(self) -> dict[str, str]:
        """Every tensor, and which of KINDS it is."""
        return dict(self._names())

    def count(self) -> Counter[str]:
        return Counter(self.names.values())

    def _names(self) -> Iterator[tuple[str, str]]:
        for entry in plan(self.cfg):
            dtype = self.dtype(entry)
            if dtype == ml_dtypes.int4:
                yield entry.name + int4.SUFFIXES[0], "weights"
                yield from ((entry.name + suffix, "scales") for suffix in int4.SUFFIXES[1:])
            else:
                yield entry.name, "weights"
            if dtype == fp8.E4M3:
                yield entry.name + SCALE_SUFFIX, "scales"
        if self.quantisation.method == "fp8":
            yield from ((RELEASED_STRAY.format(layer=layer), "strays") for layer in range(self.cfg.num_hidden_layers))
        yield from ((name, "strays") for name in self.listed or () if STRAY.fullmatch(name))

    def _compare(self, listed: frozenset[str], index: str) -> None:
        missing = sorted(name for name, kind in self.names.items() if kind != "strays" and name not in listed)
        unknown = sorted(listed - self.names.keys())
        for names, fact in ((missing, "lacks"), (unknown, "also names")):
            if names:
                some = ", ".join(names[:3])
                raise UserError(f"{index} {fact} {len(names)} tensors: {some}")
