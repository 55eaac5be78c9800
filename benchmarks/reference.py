"""How fast PyTorch and transformers are at one of our shapes: the other half of the speed comparison.

Builds ``DeepseekV3ForCausalLM`` with random weights from a preset and times each operation in every setting that could
be its best one. One JSON line per operation and setting, on standard output:

    {"what": "adamw_step", "setting": "f32 grouped_mm fused", "tokens_per_cpu_s": 314.0, "tokens_per_s": 570.0}

Tokens per CPU-second (user + system time of the process, median over the repeats) is the fair column on a shared
machine. Operations:

``forward``          logits of 4 x 512 tokens
``forward_backward`` the same with the mean cross-entropy and all gradients
``adamw_step``       forward, backward and AdamW on every parameter
``muon_step``        forward, backward, Muon on every hidden matrix (each expert its own) and AdamW on the rest
``decode_1/8``       64 greedy steps behind a prompt of 32 tokens, batch 1 / 8, KV cache; the prompt is not timed

Settings: ``f32`` is f32 throughout; ``bf16`` has bf16 weights; ``autocast`` has f32 weights and bf16 products. Then
how transformers computes the experts, and the variant of the optimizer.

    python benchmarks/reference.py                                  # everything
    python benchmarks/reference.py --only forward,decode_1 --repeats 3 --settings f32
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kimi_jax import presets
from kimi_jax.config import ModelConfig

BATCH, LENGTH = 4, 512
PROMPT, NEW = 32, 64
NOT_READ = {"architectures", "model_type", "torch_dtype"}  # keys of config.json that choose a class, not a shape

SETTINGS = {
    "forward": ("f32 grouped_mm", "f32 eager", "bf16 grouped_mm", "bf16 eager"),
    "forward_backward": ("f32 grouped_mm", "autocast grouped_mm", "bf16 grouped_mm"),
    "adamw_step": (
        "f32 grouped_mm fused",
        "f32 grouped_mm foreach",
        "autocast grouped_mm fused",
        "bf16 grouped_mm fused",
    ),
    "muon_step": ("f32 grouped_mm", "autocast grouped_mm", "bf16 grouped_mm"),
    "decode_1": ("f32 grouped_mm", "f32 batched_mm", "f32 eager", "bf16 grouped_mm"),
    "decode_8": ("f32 grouped_mm", "f32 eager", "bf16 grouped_mm"),
}


def build(cfg: ModelConfig, dtype: str, experts: str) -> DeepseekV3ForCausalLM:
    """A model with random weights; ``experts`` is transformers' name for an experts implementation."""
    values = {key: value for key, value in cfg.to_hf().items() if key not in NOT_READ}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**values), experts_implementation=experts)
    return model.to(torch.bfloat16) if dtype == "bf16" else model  # type: ignore[arg-type]


def precision(dtype: str):
    return torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()


def tokens(cfg: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, ids: torch.Tensor, dtype: str) -> None:
    model.zero_grad(set_to_none=True)
    with precision(dtype):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()


# ---------------------------------------------------------------- Muon


def expert_matrices(name: str, stack: torch.Tensor) -> list[torch.Tensor]:
    """Views of a fused parameter [E, n, m] as stacks of separate matrices: gate and up are two matrices."""
    return list(stack.chunk(2, dim=1)) if name.endswith("gate_up_proj") else [stack]


class ExpertMuon:
    """``torch.optim.Muon`` on stacks [E, n, m]; every expert is a parameter that shares the stack's storage.

    A loop: on one thread it is as fast as Newton-Schulz over the whole stack with ``baddbmm``.
    """

    def __init__(self, stacks: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]], lr: float):
        self.grads = [grad for _, grad in stacks]
        self.matrices = [[torch.nn.Parameter(w) for w in weight] for weight, _ in stacks]
        every = [matrix for matrices in self.matrices for matrix in matrices]
        self.muon = torch.optim.Muon(every, lr=lr, adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        for matrices, grad in zip(self.matrices, self.grads, strict=True):
            for matrix, matrix_grad in zip(matrices, grad(), strict=True):
                matrix.grad = matrix_grad
        self.muon.step()


def muon_optimizers(model, lr: float = 1e-4):
    """Muon on hidden matrices, AdamW on embedding, head and gains."""
    stacks, plain, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            for part, weight in enumerate(expert_matrices(name, parameter.data)):
                stacks.append((weight, functools.partial(_gradient, name, parameter, part)))
        elif parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
            plain.append(parameter)
        else:
            rest.append(parameter)
    return [
        ExpertMuon(stacks, lr),
        torch.optim.Muon(plain, lr=lr, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]


def _gradient(name: str, parameter: torch.Tensor, part: int) -> torch.Tensor:
    assert parameter.grad is not None
    return expert_matrices(name, parameter.grad)[part]


# ---------------------------------------------------------------- operations: each returns (run once, tokens per run)


def forward(cfg: ModelConfig, dtype: str, experts: str):
    model, ids = build(cfg, dtype, experts).eval(), tokens(cfg, BATCH, LENGTH)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=False)

    return run, ids.numel()


def forward_backward(cfg: ModelConfig, dtype: str, experts: str):
    model, ids = build(cfg, dtype, experts).train(), tokens(cfg, BATCH, LENGTH)
    return functools.partial(loss_and_gradients, model, ids, dtype), ids.numel()


def train_step(cfg: ModelConfig, dtype: str, experts: str, optimizers: Callable):
    model, ids = build(cfg, dtype, experts).train(), tokens(cfg, BATCH, LENGTH)
    chain = optimizers(model)

    def run() -> None:
        loss_and_gradients(model, ids, dtype)
        for optimizer in chain:
            optimizer.step()

    return run, ids.numel()


def adamw_step(cfg: ModelConfig, dtype: str, experts: str, variant: str):
    def optimizers(model):
        options = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, variant: True}
        return [torch.optim.AdamW(model.parameters(), **options)]

    return train_step(cfg, dtype, experts, optimizers)


def muon_step(cfg: ModelConfig, dtype: str, experts: str):
    return train_step(cfg, dtype, experts, muon_optimizers)


def decode(batch: int, cfg: ModelConfig, dtype: str, experts: str):
    model, prompt = build(cfg, dtype, experts).eval(), tokens(cfg, batch, PROMPT)

    def start() -> Callable[[], None]:
        with torch.inference_mode():
            out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        return functools.partial(greedy, out.past_key_values, out.logits.argmax(-1))

    @torch.inference_mode()
    def greedy(cache, last_B1: torch.Tensor) -> None:
        for _ in range(NEW):
            last_B1 = model(input_ids=last_B1, past_key_values=cache, use_cache=True).logits.argmax(-1)

    return start, batch * NEW


OPERATIONS = {
    "forward": forward,
    "forward_backward": forward_backward,
    "adamw_step": adamw_step,
    "muon_step": muon_step,
    "decode_1": functools.partial(decode, 1),
    "decode_8": functools.partial(decode, 8),
}


# ---------------------------------------------------------------- timing


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(run: Callable, n_tokens: int, repeats: int) -> tuple[float, float]:
    """Median tokens per CPU-second and per second, after one warm-up; a ``run`` that returns a callable prepares it."""
    rates = []
    for _ in range(repeats + 1):
        wall, cpu = time.perf_counter(), cpu_seconds()
        timed = run()
        if timed is not None:
            wall, cpu = time.perf_counter(), cpu_seconds()
            timed()
        rates.append((n_tokens / (cpu_seconds() - cpu), n_tokens / (time.perf_counter() - wall)))
    per_cpu_s, per_s = zip(*rates[1:], strict=True)
    return statistics.median(per_cpu_s), statistics.median(per_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"operations, comma-separated: {','.join(OPERATIONS)}")
    parser.add_argument("--settings", default="", help="only the settings that contain this text")
    parser.add_argument("--preset", default="mid_196m", help=f"one of {', '.join(presets.PRESETS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="1 never spins at a barrier, which counts as CPU time")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cfg = presets.get(args.preset)
    for what in args.only.split(",") if args.only else OPERATIONS:
        for setting in SETTINGS[what]:
            if args.settings not in setting:
                continue
            run, n_tokens = OPERATIONS[what](cfg, *setting.split())
            per_cpu_s, per_s = measure(run, n_tokens, args.repeats)
            row = {"what": what, "setting": setting, "threads": args.threads}
            print(
                json.dumps(row | {"tokens_per_cpu_s": round(per_cpu_s, 1), "tokens_per_s": round(per_s, 1)}), flush=True
            )


if __name__ == "__main__":
    main()
