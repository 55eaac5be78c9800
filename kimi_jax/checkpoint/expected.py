"""What a released checkpoint holds, from its config.json alone: for planning before anything is downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import fp8, int4, paths, safetensors
from kimi_jax.checkpoint.hf_config import Quantisation, extra_layers, quantisation_of, read_config
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, Entry, plan
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError

STRAY = "model.layers.{layer}.self_attn.rotary_emb.inv_freq"  # in the released fp8 shards, one a layer; no parameter
KINDS = ("weights", "scales", "strays")


@dataclass(frozen=True)
class Expected:
    """The tensors of a release: fp8 of every projection, int4 of the routed experts, or none quantised."""

    cfg: ModelConfig
    quantisation: Quantisation

    @classmethod
    def open(cls, folder: paths.AnyPath) -> Expected:
        """Needs config.json alone; an index of safetensors that lies beside it must name the same tensors."""
        config = read_config(folder)
        found = cls(ModelConfig.from_hf(config), quantisation_of(config))
        if safetensors.INDEX in paths.sizes(folder):
            found._compare(set(safetensors.read_index(folder)), config, folder)
        return found

    @property
    def block(self) -> tuple[int, int]:
        return self.quantisation.block

    def dtype(self, entry: Entry) -> np.dtype:
        if self.quantisation.method == "fp8" and "_proj" in entry.name:
            return fp8.E4M3
        if self.quantisation.method == "int4" and "experts" in entry.path:
            return np.dtype(ml_dtypes.int4)
        return np.dtype(np.float32 if entry.path[-1] == "bias" else ml_dtypes.bfloat16)

    def scale_dtype(self, entry: Entry) -> np.dtype:
        return np.dtype(np.float32)

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
            yield from ((STRAY.format(layer=layer), "strays") for layer in range(self.cfg.num_hidden_layers))

    def _compare(self, found: set[str], config: Mapping[str, Any], folder: paths.AnyPath) -> None:
        found = {name for name in found if not name.startswith(extra_layers(config, self.cfg))}
        missing = sorted(name for name, kind in self.names.items() if kind != "strays" and name not in found)
        unknown = sorted(found - self.names.keys())
        for names, fact in ((missing, "lacks"), (unknown, "also names")):
            if names:
                some = ", ".join(names[:3])
                raise UserError(f"{paths.join(folder, safetensors.INDEX)} {fact} {len(names)} tensors: {some}")
