"""What a step computes of each of its sequences: a chunk of the prompt, or the next token and a draft.

A step has few shapes, rows times width, of at most ``Limits.step_tokens`` tokens. Wide rows suit long prompts and many
rows short ones; the width of a prefill step is the one that gets the most tokens done.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from kimi_jax.inference.limits import Limits, padded
from kimi_jax.inference.plan import Row
from kimi_jax.inference.sequence import Sequence
from kimi_jax.inference.shards import Shard


def prefill_width(sequences: Many[Sequence], limits: Limits) -> int:
    """At which the first in rank, as many as a step holds, get the most tokens done."""
    return max(limits.chunks, key=lambda T: sum(min(T, s.unplanned) for s in sequences[: limits.rows_of_width(T)]))


def prefill_rows(sequences: Many[Sequence], T: int, limits: Limits) -> list[Row]:
    """The next ``T`` tokens of the first in rank; a row samples once it reaches the end of its prompt."""
    found = []
    for sequence in sequences[: limits.rows_of_width(T)]:
        stop = min(sequence.planned + T, len(sequence.tokens))
        tokens, samples = sequence.tokens[sequence.planned : stop], stop == len(sequence.tokens)
        found.append(Row(sequence, sequence.planned, tokens, samples=samples, scores=not sequence.scored))
    return found


def decode_rows(sequences: Many[Sequence], shards: Many[Shard], limits: Limits) -> list[Row]:
    """One token of every sequence, which has a page for it. Drafts come where they and their pages find room."""
    rows = []
    drafting = sequences and padded(len(sequences), limits.rows) * (1 + limits.draft) <= limits.step_tokens
    for sequence in sequences:
        start, shard = sequence.planned, shards[sequence.shard]
        draft = sequence.draft(min(limits.draft, shard.room(sequence) - start - 1)) if drafting else []
        shard.grow(sequence, start + 1 + len(draft))
        if sequence.pending:
            rows.append(Row(sequence, start, [0], feed=sequence.row))
        else:
            rows.append(Row(sequence, start, [sequence.tokens[-1], *draft], drafted=len(draft)))
    return rows
