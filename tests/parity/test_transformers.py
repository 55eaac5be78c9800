"""Against transformers' DeepseekV3 on random small models: everything that the forward and backward pass compute."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

import kimi_jax
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.model import KimiK2, head

YARN = dict(
    rope_type="yarn",
    rope_theta=50_000.0,
    factor=32.0,
    original_max_position_embeddings=4096,
    beta_fast=1.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Changes against the base shape, and the absolute positions of the tokens."""

    changes: dict
    rope: dict = dataclasses.field(default_factory=dict)
    tokens: int = 48
    first_position: int = 0


CASES = {
    "base": Case({}),
    "odd": Case(dict(hidden_size=52, v_head_dim=12, kv_lora_rank=20, q_lora_rank=28, moe_intermediate_size=18)),
    "far": Case({}, first_position=100_000),
    "far_with_the_released_heads": Case(
        dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128), first_position=100_000
    ),
    "two_dense_two_shared": Case(dict(num_hidden_layers=4, first_k_dense_replace=2, n_shared_experts=2)),
    "mscales": Case({}, rope=dict(mscale=0.7, mscale_all_dim=1.3)),
    "wide": Case(dict(n_routed_experts=64, num_experts_per_tok=8, routed_scaling_factor=2.82)),
    "no_query_latent": Case(dict(q_lora_rank=None)),
    "plain_rope": Case({}, rope=dict(rope_type="default", rope_theta=10_000.0)),
    "betas": Case({}, rope=dict(beta_fast=32.0, beta_slow=1.0, factor=8.0), first_position=5000),
    "long": Case(dict(num_hidden_layers=2), tokens=700),
}


def build(case: Case) -> DeepseekV3ForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 10_000.0} if case.rope.get("rope_type") else YARN | case.rope
    config = DeepseekV3Config(
        **{
            **dict(
                vocab_size=160,
                hidden_size=48,
                intermediate_size=80,
                moe_intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=3,
                num_key_value_heads=3,
                n_routed_experts=8,
                num_experts_per_tok=2,
                kv_lora_rank=24,
                q_lora_rank=32,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=16,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                routed_scaling_factor=2.5,
                max_position_embeddings=131_072,
                rope_parameters=rope,
                attn_implementation="eager",
                experts_implementation="eager",
            ),
            **case.changes,
        }
    )
    torch.manual_seed(len(str(case)))
    model = DeepseekV3ForCausalLM(config).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.numel():
                p.normal_(std=1.5 * p.shape[-1] ** -0.5)
            else:
                p.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()


class Reference:
    """What the torch model computes: logits, last hidden states, expert choice, gradients, largest logits per head."""

    def __init__(self, model: DeepseekV3ForCausalLM, tokens: np.ndarray, positions: np.ndarray):
        choices, maxima = [], []

        def gate(_, __, output):
            choices.append(np.sort(output[2].numpy(), axis=-1))

        def attention(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
            logits = torch.einsum("bntx,bnsx->bnts", query, key) * scaling + mask
            maxima.append(logits.amax(dim=(0, 2, 3)).detach().numpy())
            weights = torch.softmax(logits, dim=-1)
            return torch.einsum("bnts,bnsw->btnw", weights, value), weights

        hooks = [m.register_forward_hook(gate) for m in model.modules() if type(m).__name__.endswith("TopkRouter")]
        plain, reference.eager_attention_forward = reference.eager_attention_forward, attention
        try:
            ids = torch.tensor(tokens)
            output = model(ids, position_ids=torch.tensor(positions), output_hidden_states=True)
        finally:
            reference.eager_attention_forward = plain
            for hook in hooks:
                hook.remove()
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        self.logits = output.logits.detach().numpy()
        self.hidden = output.hidden_states[-1].detach().numpy()
        self.experts, self.max_logits = np.stack(choices), np.stack(maxima)
        self.gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}


def hf_gradient(gradients: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The gradient of one released tensor; transformers keeps a layer's experts in two stacked parameters."""
    if ".experts." not in name:
        return gradients[name]
    prefix, rest = name.split(".experts.")
    expert, which, _ = rest.split(".")
    if which == "down_proj":
        return gradients[f"{prefix}.experts.down_proj"][int(expert)]
    gate, up = np.split(gradients[f"{prefix}.experts.gate_up_proj"][int(expert)], 2)
    return gate if which == "gate_proj" else up


QUICK = ("base", "odd", "far_with_the_released_heads", "two_dense_two_shared", "wide")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_forward_and_backward(name, tmp_path):
    case = CASES[name]
    torch_model = build(case)
    torch_model.save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 160, (2, case.tokens))
    positions = np.broadcast_to(case.first_position + np.arange(case.tokens), tokens.shape)
    expected = Reference(torch_model, tokens, positions)

    model, params = kimi_jax.load(tmp_path)
    cfg = model.cfg

    @jax.jit
    def run(params):
        def loss(params):
            inputs = (jnp.asarray(tokens), jnp.asarray(positions))
            hidden, stats = model.apply({"params": params}, *inputs, method=KimiK2.hidden_states)
            logits = head(params, hidden)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            picked = jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=-1)
            return -jnp.mean(picked), (logits, stats, hidden)

        grads, aux = jax.grad(loss, has_aux=True)(params)
        return *aux, grads

    logits, stats, hidden, grads = jax.device_get(run(params))
    assert relative(logits, expected.logits) <= 2e-5
    assert relative(hidden, expected.hidden) <= 2e-5
    experts = np.sort(stats.experts_LBTK.reshape(cfg.n_moe_layers, -1, cfg.num_experts_per_tok), axis=-1)
    np.testing.assert_array_equal(experts, expected.experts)
    np.testing.assert_allclose(stats.max_logits_LN, expected.max_logits, rtol=1e-5)

    for entry in plan(cfg):
        part = grads
        for key in entry.path:
            part = part[key]
        ours = entry.to_hf(part[entry.index])
        if entry.path[-1] == "bias":
            assert not ours.any()
            continue
        theirs = hf_gradient(expected.gradients, entry.name)
        distance = np.linalg.norm(ours.astype(np.float64) - theirs)
        assert distance <= 5e-4 * np.linalg.norm(theirs.astype(np.float64)), entry.name


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
