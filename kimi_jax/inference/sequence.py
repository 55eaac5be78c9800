"""One continuation of a request: its tokens, what is left of them to compute, and what the client has seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.errors import UserError, one_line
from kimi_jax.inference.drafting import Drafter
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Event, Finish, Logprob, Request
from kimi_jax.inference.stops import StopStrings

Rank = tuple[float, int, int]


class Sequence:
    """``tokens`` are the prompt and what was sampled; ``planned`` of them are in the cache once all steps are done.

    Between a step's start and its end, ``pending`` counts the tokens that it samples and nobody knows yet.
    """

    def __init__(
        self, id: int, sample: int, request: Request, seed: int, arrived: float, limits: Limits,
        detokenizer: Callable[[], Detokenizer] | None,
    ):  # fmt: skip
        self.id, self.sample, self.request = id, sample, request
        self.arrived = arrived
        self.rank: Rank = (arrived - request.priority * limits.age_s, id, sample)  # the lowest goes first
        self.seed = row_seed(seed, sample)
        self.tokens = list(request.prompt)
        self.n_prompt = len(request.prompt)
        self.last = limits.most_tokens if request.max_tokens is None else self.n_prompt + request.max_tokens
        self.planned = self.pending = 0
        self.steps = 0  # in flight, with a row of this sequence
        self.row = -1  # in the last of them
        self.shard = 0  # while it runs: where its pages are
        self.pages: list[int] = []
        self.keys: list[bytes] = []  # of full pages, see ``prefix.chain``
        self.published = 0  # pages
        self.started = self.running = self.finished = False
        self.followers: list[Sequence] = []  # wait for this one to compute the prompt they share
        self.cached_tokens = 0
        self.scores: dict[int, Logprob] = {}  # of prompt positions
        self.scored = request.sampling.prompt_logprobs is None or sample > 0  # whether no scores are due
        self.seen: dict[int, int] = {}  # token -> how often it was sampled; kept for penalties alone
        if request.sampling.penalised:
            self.seen = dict.fromkeys(request.prompt if request.sampling.repetition_penalty != 1 else (), 0)
        self._drafts = bool(limits.draft) and request.grammar is None
        self._drafter: Drafter | None = None  # from the first draft on: a long prompt's takes a second
        self._vocab_size = limits.vocab_size
        self.grammar = request.grammar() if request.grammar else None
        self.mask = self._read_mask()
        if self.mask is not None and not self.mask.any():
            raise UserError("grammar allows no first token")
        self._text = detokenizer() if detokenizer else None
        self._stops = StopStrings(request.stop)

    @property
    def unplanned(self) -> int:
        """Tokens to compute before the next one can be sampled, the one that a step in flight samples included."""
        return len(self.tokens) + self.pending - self.planned

    @property
    def done_when_known(self) -> bool:
        """Whether the tokens in flight are the last. Even if none are wanted, the prompt is computed."""
        return len(self.tokens) + self.pending >= max(self.last, self.n_prompt + 1)

    @property
    def needs_tokens(self) -> bool:
        """Whether a step cannot be planned before all tokens are known: they decide what may follow, or the draft."""
        return self.grammar is not None or self._drafts or self.request.sampling.penalised

    def draft(self, most: int) -> list[int]:
        if not self._drafts:
            return []
        if self._drafter is None:
            self._drafter = Drafter(self.tokens)
        return self._drafter.propose(min(most, self.last - len(self.tokens) - 1))

    def append(self, tokens: list[int], logprobs: list[Logprob]) -> Event:
        """Takes over sampled tokens up to the first that ends the text; what is new of them for the client."""
        before, text, finish, stopped_by, message = len(self.tokens), "", None, None, None
        if before == self.last:
            return self.event("length")
        for token in tokens:
            self.tokens.append(token)
            if token in self.request.stop_ids:
                finish, stopped_by = "stop", token
                break
            text += self._stops.feed(self._text.feed(token)) if self._text else ""
            if self._stops.met is not None:
                finish, stopped_by = "stop", self._stops.met
                break
            if len(self.tokens) == self.last:
                finish = "length"
                break
            if self.grammar is not None:
                finish, message = self._follow_grammar(token)
                if finish:
                    break
        new = tuple(self.tokens[before:])
        if self._drafter is not None:
            self._drafter.extend(new)
        if self.request.sampling.penalised:
            for token in new:
                self.seen[token] = self.seen.get(token, 0) + 1
        asked = self.request.sampling.logprobs is not None
        event = self.event(finish, tokens=new, logprobs=tuple(logprobs[: len(new)]) if asked else ())
        return event._replace(text=text + event.text, stopped_by=stopped_by, message=message)

    def event(self, finish: Finish | None = None, **what) -> Event:
        """With ``finish``, also the text that was held back."""
        text = ""
        if finish and self._text:
            text = self._stops.feed(self._text.finish()) + self._stops.finish()
        return Event(self.id, self.sample, text=text, finish=finish, cached_tokens=self.cached_tokens, **what)

    def score(self, start: int, found: list[Logprob]) -> None:
        """Takes over the log probabilities of what follows position ``start`` in the prompt."""
        self.scores.update(zip(range(start + 1, self.n_prompt), found, strict=False))

    def prompt_logprobs(self) -> tuple[Logprob | None, ...]:
        return tuple(self.scores.get(i) for i in range(self.n_prompt))

    def _follow_grammar(self, token: int) -> tuple[Finish | None, str | None]:
        assert self.grammar is not None
        try:
            self.grammar.accept(token)
            self.mask = self._read_mask()
        except Exception as error:  # the caller's code: its failure ends its own request alone
            return "error", one_line(error)
        return ("stop" if self.mask is not None and not self.mask.any() else None), None

    def _read_mask(self) -> np.ndarray | None:
        """Without the bits past the vocabulary: they allow nothing."""
        mask = None if self.grammar is None else self.grammar.mask()
        if mask is None:
            return None
        words = -(-self._vocab_size // 32)
        if np.shape(mask) != (words,):
            raise UserError(f"grammar: a mask must have shape ({words},), not {np.shape(mask)}")
        mask = np.array(mask).astype(np.uint32)
        mask[-1] &= np.uint32((2**32 - 1) >> (32 * words - self._vocab_size))
        return mask


def row_seed(seed: int, sample: int) -> int:
    """32 bits for one of the n continuations of a request with that seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=4).digest(), "little")


def by_rank(sequence: Sequence) -> Rank:
    return sequence.rank
