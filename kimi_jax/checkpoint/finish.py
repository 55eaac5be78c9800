"""The end of a conversion: tokenizer files, the list of arrays, and last of all the manifest that makes it complete."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

from kimi_jax.checkpoint import arrays, digest, paths, safetensors
from kimi_jax.checkpoint.source import Source
from kimi_jax.checkpoint.units import DTYPES, Plan
from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.errors import UserError

HF_FOLDER = "hf"
KEPT = re.compile(r".*\.(json|jinja|py|model|txt|md)|LICENSE.*")  # beside the weights, for whoever serves the model


def read(target: paths.AnyPath) -> dict[str, Any] | None:
    """The manifest; None if the target is not complete."""
    path = paths.join(target, "meta", "metadata")
    if not paths.exists(path):
        return None
    try:
        return dict(json.loads(paths.read_bytes(path)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove {target} and convert again") from error


def write(source: Source, target: str, plan: Plan, digests: list[str]) -> dict[str, Any]:
    """Makes a target complete, all of whose chunks are written."""
    paths.remove(paths.join(target, HF_FOLDER))  # a kill may have left half a file
    for name in paths.sizes(source.folder):
        if KEPT.fullmatch(name) and name != safetensors.INDEX:
            content = paths.read_bytes(paths.join(source.folder, name))
            paths.write_bytes(paths.join(target, HF_FOLDER, name), content)
    arrays.finalise(paths.join(target, "state"), plan.arrays)
    manifest = _manifest(source, plan, digests)
    _write_meta(target, json.dumps(manifest))
    return manifest


def stored_dtype(plan: Plan) -> str:
    """As the manifest says it: "bfloat16", "float32" or "fp8"."""
    return plan.dtype if plan.dtype == "fp8" else DTYPES[plan.dtype].name


def _manifest(source: Source, plan: Plan, digests: list[str]) -> dict[str, Any]:
    kept = stored_dtype(plan)
    compute = "float32" if plan.dtype == "fp8" else kept
    model = dataclasses.asdict(source.cfg.replace(dtype=compute, param_dtype=compute))
    content = [[name, str(s.dtype), list(s.shape)] for name, s in plan.arrays.items()]
    return {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "config": {"model": model, "data": {"tokenizer": None}},
        "dtype": kept,
        "fp8_block": list(source.block) if plan.dtype == "fp8" else None,
        "digest": digest.of_json([content, digests]),
        "source": {"digest": source.digest(), "files": source.files},
    }


def _write_meta(target: str, text: str) -> None:
    """The folder appears with its file in it."""
    folder = paths.join(target, "meta")
    if paths.is_remote(target):
        paths.write_text(paths.join(folder, "commit_success.txt"), "")
        paths.write_text(paths.join(folder, "metadata"), text)
        return
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    paths.write_text(unfinished / "metadata", text)
    unfinished.replace(folder)
