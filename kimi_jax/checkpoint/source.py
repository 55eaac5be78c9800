"""A Hugging Face checkpoint as a stream: its headers up front, rows of its tensors when they are asked for.

Weights are f32, f16 or bf16; e4m3 with block scales (NAME_scale_inv); or int4 with group scales (NAME_packed,
NAME_scale, NAME_shape). A weight and its scales may lie in different files, and files may be cut anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import digest, fp8, int4, paths, safetensors
from kimi_jax.checkpoint.finite import is_finite
from kimi_jax.checkpoint.hf_config import Quantisation, extra_layers, quantisation_of, read_config
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, STRAY, Entry, plan, text_part
from kimi_jax.checkpoint.safetensors import Stored
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError, os_errors_as

FLOATS = tuple(map(np.dtype, (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)))
SAMPLES, SAMPLE_BYTES = 4, 4096  # of each file, in the digest
STRIP_BYTES = 2 << 20  # of the f32 weights that are held at a time: what a core's own cache takes


@dataclass(frozen=True)
class Source:
    """One directory. ``tensors`` is what its files hold, under the names of ``hf_names``."""

    folder: str
    cfg: ModelConfig
    quantisation: Quantisation
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]  # the text model's part of config.json

    @classmethod
    def open(cls, folder: paths.AnyPath) -> Source:
        """Reads config.json and every header, and checks that all tensors of the model are there, and no others."""
        config = read_config(folder)
        cfg = ModelConfig.from_hf(config)
        tensors = text_part(safetensors.read_headers(folder))
        tensors = {
            name: t for name, t in tensors.items() if 0 not in t.shape
        }  # so transformers saves no shared experts
        found = cls(str(folder), cfg, quantisation_of(config), tensors, config)
        found._check_names()
        for entry in found.entries:
            found._check(entry)
        return found

    @cached_property
    def entries(self) -> list[Entry]:
        return list(plan(self.cfg))

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of every file that holds tensors, by name."""
        return {paths.name(file): paths.size(file) for file in sorted({t.file for t in self.tensors.values()})}

    def digest(self) -> str:
        """Of the config, the headers, and each file's size and samples: revisions may differ in their data alone."""
        tensors = [(n, paths.name(t.file), str(t.dtype), t.shape, t.start) for n, t in sorted(self.tensors.items())]
        return digest.of_json([self.config, self.files, tensors, self._samples])

    @cached_property
    def _samples(self) -> list[str]:
        """Digests of SAMPLE_BYTES at SAMPLES places of every file, the last of them its end."""

        def sample(place: tuple[str, int]) -> str:
            file, i = place
            start = max(0, self.files[paths.name(file)] - SAMPLE_BYTES) * i // SAMPLES
            return digest.of_array(paths.read_into(file, start, SAMPLE_BYTES))

        files = sorted({t.file for t in self.tensors.values()})
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(sample, itertools.product(files, range(1, SAMPLES + 1))))

    @property
    def block(self) -> tuple[int, int]:
        return self.quantisation.block

    def dtype(self, entry: Entry) -> np.dtype:
        """As stored; int4 for weights that are packed."""
        return self.tensors[entry.name].dtype if entry.name in self.tensors else np.dtype(ml_dtypes.int4)

    def scale_dtype(self, entry: Entry) -> np.dtype:
        return self.tensors[entry.name + SCALE_SUFFIX].dtype

    def where(self, entry: Entry) -> str:
        """File and tensor, for messages."""
        return f"{self._stored(entry).file}: {entry.name}"

    def _stored(self, entry: Entry) -> Stored:
        return self.tensors.get(entry.name) or self.tensors[entry.name + "_packed"]

    def stored_dtype(self) -> np.dtype:
        """bf16 if every weight but the router's bias is bf16, else f32, which holds fp8, int4, f16 and bf16 exactly."""
        weights = [self.dtype(entry) for entry in self.entries if entry.path[-1] != "bias"]
        half = all(dtype == ml_dtypes.bfloat16 for dtype in weights)
        return np.dtype(ml_dtypes.bfloat16 if half else np.float32)

    def rows(self, entry: Entry, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Rows start..stop of a weight, de-quantised exactly in f32 and rounded once to ``dtype``; or its e4m3 bytes.

        Reads those rows of the file and no more. Raises ``UserError`` if one is not finite in ``dtype``.
        """
        tensor = self._stored(entry)
        raw = self._read(entry.name, tensor, start, stop)
        if tensor.dtype == dtype:
            out = raw
        else:
            out = np.empty((stop - start, *entry.shape[1:]), dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                for at, weights in self._strips(entry, tensor, raw, start, dtype):
                    out[at : at + len(weights)] = weights
        if not is_finite(out):
            raise UserError(f"{self.where(entry)} holds NaN or infinity, or what is too large for {dtype}")
        return out

    def scale(self, entry: Entry) -> np.ndarray:
        """The block scales of an fp8 weight, as stored, once checked."""
        name = entry.name + SCALE_SUFFIX
        tensor = self.tensors[name]
        scale = self._read(name, tensor, 0, tensor.shape[0])
        if not np.isfinite(scale.astype(np.float32)).all():
            raise UserError(f"{tensor.file}: {name}: the block scales hold NaN or infinity; the file is damaged")
        return scale

    def _strips(
        self, entry: Entry, tensor: Stored, raw: np.ndarray, start: int, dtype: np.dtype
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The rows de-quantised in ``dtype`` or f32, a few at a time; and where in ``raw`` they begin."""
        width = math.prod(entry.shape[1:])
        step = max(1, STRIP_BYTES // (4 * max(width, 1)))
        if tensor.dtype == fp8.E4M3:
            scale, where, block = self.scale(entry), self.where(entry), self.quantisation.block
            at = 0
            while at < len(raw):
                i = (start + at) // block[0]
                n = min((i + 1) * block[0] - start, len(raw)) - at  # to the end of the row of blocks
                yield at, fp8.dequantise(raw[at : at + n], scale[i : i + 1], where, (n, block[1]), dtype)
                at += n
        elif tensor.dtype == np.int32:
            name, where, group = entry.name + "_scale", self.where(entry), self.quantisation.group
            scale = self._read(name, self.tensors[name], start, start + len(raw))
            for at in range(0, len(raw), step):
                yield at, int4.dequantise(raw[at : at + step], scale[at : at + step], width, where, group)
        else:
            for at in range(0, len(raw), step):
                yield at, raw[at : at + step].astype(np.float32)

    def _read(self, name: str, tensor: Stored, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor as they are in its file."""
        shape = (stop - start, *tensor.shape[1:])
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        begin, size = tensor.start + start * row, (stop - start) * row
        with os_errors_as(f"{tensor.file}: cannot read {name}"):
            data = paths.read_into(tensor.file, begin, size)
        if len(data) != size:
            raise UserError(f"{tensor.file} is truncated: {name} ends {size - len(data)} bytes early")
        return data.view(tensor.dtype).reshape(shape)

    def _check_names(self) -> None:
        planned = {entry.name for entry in self.entries}
        packed = {name.removesuffix("_packed") for name in self.tensors if name.endswith(".weight_packed")}
        missing = [name for name in planned if name not in self.tensors and name not in packed]
        if missing:
            some = ", ".join(sorted(missing)[:3])
            more = ", ..." if missing[3:] else ""
            raise UserError(f"{self.folder} lacks {len(missing)} of {len(planned)} tensors: {some}{more}")
        known = planned | {name + SCALE_SUFFIX for name in planned - packed}
        known |= {name + suffix for name in planned & packed for suffix in int4.SUFFIXES}
        extra = extra_layers(self.config, self.cfg, self.tensors)
        unknown = sorted(
            name
            for name in self.tensors
            if not (name in known or STRAY.fullmatch(name) or name.startswith(extra)) or (name in packed & planned)
        )
        if unknown:
            some = ", ".join(unknown[:3])
            raise UserError(f"{self.folder} holds {len(unknown)} tensors that this model does not have: {some}")

    def _check(self, entry: Entry) -> None:
        """Shape, dtype and scales of one weight."""
        tensor, where = self._stored(entry), self.where(entry)
        scale = self.tensors.get(entry.name + SCALE_SUFFIX)
        if entry.name not in self.tensors:
            self._check_packed(entry)
            return
        if tensor.shape != entry.shape:
            raise UserError(f"{where} has shape {tensor.shape}, but config.json implies {entry.shape}")
        if tensor.dtype == fp8.E4M3:
            if scale is None:
                raise UserError(f"{where} is fp8, but there is no {entry.name + SCALE_SUFFIX}")
            expected = fp8.grid(entry.shape, self.quantisation.block) if len(entry.shape) == 2 else None
            if scale.shape != expected:
                raise UserError(
                    f"{where}: scales have shape {scale.shape}, expected {expected} for weights {entry.shape}"
                )
            if scale.dtype not in FLOATS:
                raise UserError(f"{where}: scales have dtype {scale.dtype}, expected float32")
        elif scale is not None:
            raise UserError(
                f"{where} is {tensor.dtype}, but there is a {entry.name + SCALE_SUFFIX}: only fp8 weights have scales"
            )
        elif tensor.dtype not in FLOATS:
            raise UserError(f"{where} has dtype {tensor.dtype}, which is not a weight's")

    def _check_packed(self, entry: Entry) -> None:
        where, group = self.where(entry), self.quantisation.group
        if self.quantisation.method != "int4":
            raise UserError(f"{where}_packed is packed, but config.json names no quantization_config for it")
        for suffix in int4.SUFFIXES:
            if entry.name + suffix not in self.tensors:
                raise UserError(f"{where}_packed is packed, but there is no {entry.name + suffix}")
        packed, scale, shape = (self.tensors[entry.name + suffix] for suffix in int4.SUFFIXES)
        if len(entry.shape) != 2:
            raise UserError(f"{where}_packed is packed, but only matrices can be: config.json implies {entry.shape}")
        rows, columns = entry.shape
        expected = {"_packed": (rows, -(-columns // 8)), "_scale": (rows, -(-columns // group))}
        for suffix, part in {"_packed": packed, "_scale": scale}.items():
            if part.shape != expected[suffix]:
                raise UserError(f"{where}{suffix} has shape {part.shape}, but config.json implies {expected[suffix]}")
        if packed.dtype != np.int32:
            raise UserError(f"{where}_packed has dtype {packed.dtype}, expected int32")
        if scale.dtype not in FLOATS:
            raise UserError(f"{where}_scale has dtype {scale.dtype}, which is not a scale's")
        if shape.shape != (2,):
            raise UserError(f"{where}_shape has shape {shape.shape}, expected (2,)")
        found = tuple(self._read(entry.name + "_shape", shape, 0, 2).tolist())
        if found != entry.shape:
            raise UserError(f"{where}_shape says {found}, but config.json implies {entry.shape}")
