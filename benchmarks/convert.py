"""How fast is the conversion, beside `cp -r` of the same source on the same disk, and how much memory does it hold?

    python benchmarks/convert.py --folder /some/disk           # 8.6 GB of fp8; needs 40 GB of room
    python benchmarks/convert.py --folder /some/disk --layers 2 --dtypes fp8

Makes a block-fp8 source, most of it in two stacked arrays that are larger than any bound on memory, then copies and
converts it in turn, each from a cold page cache where the system lets us drop it, each until the bytes are on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import fp8
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.config import ModelConfig
from kimi_jax.presets import kimi_k2_1t

ROOT = Path(__file__).parents[1]


def model(layers: int, experts: int) -> ModelConfig:
    """Experts as large as those of the released model, fewer of them."""
    return kimi_k2_1t().replace(
        vocab_size=8192, num_hidden_layers=layers + 1, n_routed_experts=experts, intermediate_size=2048,
        num_attention_heads=8,
    )  # fmt: skip


def make(folder: Path, cfg: ModelConfig) -> None:
    """One shard a layer, as released, of random bytes; one block of them is drawn and repeated."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 126, 64 << 20, np.uint8)
    files: dict[str, dict[str, np.ndarray]] = {}
    for entry in plan(cfg):
        layer = entry.name.split(".")[2] if entry.name.startswith("model.layers.") else "0"
        tensors = files.setdefault(f"model-{layer}.safetensors", {})
        n = int(np.prod(entry.shape))
        if "_proj" in entry.name:
            tensors[entry.name] = drawn[:n].view(ml_dtypes.float8_e4m3fn).reshape(entry.shape)
            grid = fp8.grid((entry.shape[0], entry.shape[1]))
            tensors[entry.name + "_scale_inv"] = rng.uniform(1e-4, 1e-3, grid).astype(np.float32)
        else:
            dtype = np.float32 if entry.path[-1] == "bias" else ml_dtypes.bfloat16
            tensors[entry.name] = np.resize(drawn[: min(n, 1 << 20)], n).astype(dtype).reshape(entry.shape)
    folder.mkdir(parents=True)
    for file, tensors in files.items():
        write_file(folder / file, tensors)
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(cfg.to_hf() | {"quantization_config": quantisation}))


def timed(command: list[str], target: Path) -> float:
    """Seconds until the target is on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    drop_caches()
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    os.sync()
    return time.perf_counter() - began


def disk_rate(target: Path, n_bytes: int) -> float:
    """Bytes per second of writing as much, from memory, in files as large as an expert matrix in bf16, to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    target.mkdir()
    piece = np.random.default_rng(0).integers(0, 256, 2 * 7168 * 2048, np.uint8).tobytes()
    began = time.perf_counter()
    n_files = -(-n_bytes // len(piece))
    for i in range(n_files):
        (target / str(i)).write_bytes(piece)
    os.sync()
    return n_files * len(piece) / (time.perf_counter() - began)


def drop_caches() -> None:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        print("the page cache stays warm: dropping it needs root", file=sys.stderr)


def rss_after_import() -> int:
    code = "import kimi_jax.checkpoint.convert as convert; print(convert.peak_rss())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where source and targets go; removed at the end")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers")
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--dtypes", nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = args.folder / "kimi_jax_convert"
    source, target = folder / "source", folder / "target"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make(source, model(args.layers, args.experts))
        size, base = sum(f.stat().st_size for f in source.iterdir()), rss_after_import()
        copies: list[float] = []
        results: dict[str, list[tuple[float, dict]]] = {dtype: [] for dtype in args.dtypes}
        disk: dict[str, list[float]] = {dtype: [] for dtype in args.dtypes}
        for _ in range(args.repeats):
            copies.append(timed(["cp", "-r", str(source), str(target)], target))
            for dtype in args.dtypes:
                command = [sys.executable, str(ROOT / "tools" / "convert_ckpt.py"), "from-hf", str(source), str(target)]
                command += ["--dtype", dtype, "--workers", str(args.workers)]
                seconds = timed(command, target)
                report = json.loads(Path(f"{target}.report.json").read_text())
                results[dtype].append((seconds, report))
                disk[dtype].append(disk_rate(target, report["bytes_written"]))
        copy = size / statistics.median(copies)
        print(json.dumps({"what": "cp -r", "bytes": size, "bytes_per_second": round(copy)}))
        for dtype, runs in results.items():
            seconds, report = statistics.median([s for s, _ in runs]), runs[-1][1]
            written = report["bytes_written"]
            record = {
                "what": f"from-hf --dtype {dtype}",
                "bytes_read": size,
                "bytes_written": written,
                "read_per_second_of_cp": round(size / seconds / copy, 3),
                "written_per_second_of_cp": round(written / seconds / copy, 3),
                "written_per_second_of_disk": round(written / seconds / statistics.median(disk[dtype]), 3),
                "seconds": round(seconds, 2),
                "peak_rss_above_import": max(r["peak_rss_bytes"] for _, r in runs) - base,
            }
            print(json.dumps(record), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
