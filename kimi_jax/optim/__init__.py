"""MuonClip, AdamW and learning-rate schedules, as optax transforms for any pytree."""

from kimi_jax.optim.muon import MuonClipState, adamw, muon_clip, orthogonalised
from kimi_jax.optim.newton_schulz import newton_schulz
from kimi_jax.optim.qk_clip import largest
from kimi_jax.optim.schedules import warmup_stable_cosine

__all__ = ["MuonClipState", "adamw", "largest", "muon_clip", "newton_schulz", "orthogonalised", "warmup_stable_cosine"]
