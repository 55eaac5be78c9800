"""Stop strings against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.inference.stops import StopStrings


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first prefix of the text that ends with a stop string ends it."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_any_cut_of_the_text_gives_the_same(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stream, shown = StopStrings(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += stream.feed(text[start:end])
        seen = text[:end]
        if stream.met is None:  # all is shown but what a stop string may begin with, and no less
            held = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
            assert shown == seen[: len(seen) - held]
    shown += stream.finish()
    assert (shown, stream.met) == expected(text, stops)


def test_a_long_stop_string_costs_no_more_per_character():
    """Half a million characters of the worst kind: with a search at every one, this would take hours."""
    stream = StopStrings(["a" * 100_000 + "b"])
    assert len(stream.feed("a" * 500_000)) == 400_000
    assert stream.feed("b") == "" and stream.met
    assert stream.feed("more") == "" and stream.finish() == ""
