"""Imports point one way, layers know no mesh, the serving side knows no jax, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A part may import the parts of the levels below its own, and itself.
LEVELS = (
    {"dims", "errors", "host_memory"},
    {"config"},
    {"presets"},
    {"kernels"},
    {"layers"},
    {"model"},
    {"flops"},
    {"optim", "checkpoint", "data"},
    {"sharding"},  # mesh, rules, exchanges: placement is decided above the mathematics
    {"loading"},
    {"inference"},
    {"pods"},
    {"training"},  # shows a sample at the end
    {"server", "agent", "ahead"},
    {"rl"},
    {"cli"},
    {"train", "generate", "serve", "aot", "synthesize"},
    {""},  # kimi_jax itself
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ONLY = {  # parts that a stranger can lift out
    "optim": {"dims", "errors"},
    "data": {"dims", "errors", "config"},
    "checkpoint": {"dims", "errors", "config", "model"},
}
UPWARD = {("config", "presets")}  # a configuration may name the preset it starts from

PLANNING = (
    "request", "limits", "stops", "drafting", "prefix", "pages", "sequence", "plan", "shards", "rows", "scheduler"
)  # fmt: skip
NO_JAX = (
    *(f"kimi_jax.inference.{name}" for name in PLANNING),
    "kimi_jax.server",
    "kimi_jax.agent",
    "kimi_jax.rl.rewards",
)
NEVER = {"torch", "transformers", "configs", "tests", "benchmarks", "tools"}
MESH = {"Mesh", "PartitionSpec", "NamedSharding", "make_mesh", "shard_map", "devices", "device_count"}
MESH |= {"local_devices", "local_device_count"}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def part_of(module: str) -> str:
    """``kimi_jax.layers.mla`` belongs to ``layers``."""
    return (*module.split("."), "")[1]


def imports(tree: ast.AST, module: str) -> list[str]:
    """Every imported name in full, wherever the import stands: ``from a.b import c`` is ``a.b.c``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def violations(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    part = part_of(module)
    if part not in LEVEL:
        return [f"{module}: {part!r} has no place in LEVELS"]
    found = []
    for name in imports(tree, module):
        root, target = name.split(".")[0], part_of(name)
        if root in NEVER:
            found.append(f"{module} imports {name}")
        if root in ("jax", "jaxlib", "flax", "optax") and any(within(module, package) for package in NO_JAX):
            found.append(f"{module} imports {name}, but is plain Python")
        if root != "kimi_jax" or target == part or (part, target) in UPWARD:
            continue
        if LEVEL.get(target, len(LEVELS)) >= LEVEL[part] or target not in ONLY.get(part, {target}):
            found.append(f"{module} imports {name}: {part or 'kimi_jax'} does not stand on {target or 'kimi_jax'}")
    if part == "layers":
        found += [f"{module} knows {name}" for name in sorted(mesh_names(tree, module))]
    return found


def mesh_names(tree: ast.AST, module: str) -> set[str]:
    """What a layer says about devices: names from jax.sharding, or attributes of jax that create placements."""
    names = {name for name in imports(tree, module) if within(name, "jax.sharding") or name.split(".")[-1] in MESH}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr in MESH or ast.unparse(node) == "jax.sharding"):
            names.add(ast.unparse(node))
    return names


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def sources() -> list[Path]:
    return sorted((ROOT / "kimi_jax").rglob("*.py"))


def test_imports_point_one_way():
    found = [line for path in sources() for line in violations(module_name(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_files_stay_small():
    long = {}
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (600 if within(module_name(path), "kimi_jax.kernels") else 400):
            long[module_name(path)] = lines
    assert not long, f"split by idea: {long}"


@pytest.mark.parametrize(
    "module, source",
    [
        ("kimi_jax.layers.mla", "from kimi_jax.model import KimiK2"),
        ("kimi_jax.layers.mla", "def f():\n    from kimi_jax import training"),
        ("kimi_jax.layers.mla", "from ..training import step"),
        ("kimi_jax.layers.mla", "from kimi_jax.sharding.rules import TRAIN"),
        ("kimi_jax.layers.moe", "from jax.sharding import PartitionSpec as P"),
        ("kimi_jax.layers.moe", "import jax\nmesh = jax.sharding.Mesh"),
        ("kimi_jax.layers.moe", "import jax\nn = jax.device_count()"),
        ("kimi_jax.optim.muon", "from kimi_jax.config import ModelConfig"),
        ("kimi_jax.optim.muon", "from kimi_jax.data.packing import pack"),
        ("kimi_jax.data.packing", "import kimi_jax.checkpoint.manager"),
        ("kimi_jax.dims", "import kimi_jax"),
        ("kimi_jax.presets", "from kimi_jax.flops import count"),
        ("kimi_jax.loading", "import torch"),
        ("kimi_jax.inference.scheduler", "import jax.numpy as jnp"),
        ("kimi_jax.server.app", "from jax import Array"),
        ("kimi_jax.somewhere", "import numpy"),
    ],
)
def test_a_violation_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    "module, source",
    [
        ("kimi_jax.layers.moe", "from kimi_jax.kernels import splash\nfrom kimi_jax.layers import mlp"),
        ("kimi_jax.config", "def f():\n    from kimi_jax import presets"),
        ("kimi_jax.sharding.mesh", "from jax.sharding import Mesh"),
        ("kimi_jax.training.step", "from kimi_jax.optim.muon import muon\nimport jax"),
        ("kimi_jax", "from kimi_jax.config import ModelConfig"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(module, source) == []
