"""Kimi-K2, 1.03 trillion parameters, as pre-trained (report, section 2.4): 15.5 trillion tokens, 67 million a step.

    python -m kimi_jax.aot --config configs/kimi_k2_1t.py --topology v5p:8x8x8

512 chips of v5p: experts over 128 devices, four sequences a device at a time, tokens on their way to the experts in
eight bits (dispatch="exact" sends them as they are, for a third more bytes). Other slices: docs/scaling.md. Give it
text with data.sources and the released vocabulary with data.tokenizer.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(preset="kimi_k2_1t", remat="full"),
            mesh=dict(fsdp=4, expert=128),
            optimizer=dict(learning_rate=2e-4, weight_decay=0.1),
            schedule=dict(warmup_steps=500, stable_tokens=10 * 10**12, decay_tokens=55 * 10**11, final_factor=0.1),
            steps=231_000,
            batch_size=16_384,
            accumulation=8,
            seq_len=4096,
            dispatch="fp8",
        )
    )
