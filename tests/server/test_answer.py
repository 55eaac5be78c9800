"""Tokens to answers: stop texts, held-back characters, calls, cancelling."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.answer import End, Reader, Step, generate, generate_all
from kimi_jax.server.engine import Finished, Job, PromptScores, Sampling
from kimi_jax.server.tool_parser import Answer, Arguments, CallEnd, CallStart, Text
from tests.server.fake import FakeEngine, script_of

BYTES = tk.load("bytes")
IDS = BYTES.special_ids
STOPS = frozenset({IDS["<|im_end|>"]})


def read(text, stops=(), parse=True):
    reader, answer = Reader(BYTES, stops, parse), Answer()
    for i in BYTES.encode(text, allow_special=True):
        if reader.met:
            break
        answer.add(reader.feed(i))
    answer.add(reader.finish())
    return answer, reader.met


stop_texts = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=12), stop_texts)
def test_text_ends_before_the_stop_that_is_complete_first(text, stops):
    answer, met = read(text, stops)
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    _, at, wanted = min(ends, default=(0, len(text), None))
    assert (answer.content, met) == (text[:at], wanted)


@pytest.mark.parametrize(
    ("text", "stops", "shown", "met"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("aab", ["aac"], "aab", None),
        ("né😀x", ["😀"], "né", "😀"),
        ("ab\n", ["\n\n"], "ab\n", None),
        ("ab\n\n\n\ncd", ["\n\n"], "ab", "\n\n"),
        ("ab\n \ncd", [" "], "ab\n", " "),
    ],
)
def test_stop_texts(text, stops, shown, met):
    for parse in (True, False):
        answer, found = read(text, stops, parse)
        assert (answer.content, found) == (shown, met)


def test_a_stop_of_white_space_needs_nothing_after_it():
    """What the parser would drop before a call is text until the call is there."""
    reader = Reader(BYTES, ["\n"])
    assert [reader.feed(i) for i in BYTES.encode("Hi")] == [[Text("H")], [Text("i")]]
    assert reader.feed(BYTES.encode("\n")[0]) == [] and reader.met == "\n"


def test_stop_texts_do_not_look_into_arguments():
    call = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}STOP<|tool_call_end|>"
    answer, met = read("hello ST<|tool_calls_section_begin|>" + call, ["STOP"])
    assert met is None and answer.content == "hello ST" and answer.calls[0].arguments == "{}STOP"


def test_markers_stay_in_text_that_is_not_parsed():
    assert read("a<|tool_call_begin|>b[EOS]c", parse=False)[0].content == "a<|tool_call_begin|>bc"


def collect(engine, jobs):
    async def run():
        return [item async for item in generate_all(engine, BYTES, jobs)]

    return asyncio.run(run())


def test_steps_of_an_answer():
    text = "é<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>1<|tool_call_end|>"
    engine = FakeEngine(script=script_of(BYTES, text))
    parts = [part for _, part in collect(engine, [Job([1, 2], 50, stop_ids=STOPS)])]
    events = [event for part in parts if isinstance(part, Step) for event in part.events]
    assert events == [Text("é"), CallStart(0, "f:0", "f"), Arguments(0, "1"), CallEnd(0)]
    tokens = [token.id for part in parts if isinstance(part, Step) for token in part.tokens]
    assert tokens == [*BYTES.encode(text, allow_special=True), IDS["<|im_end|>"]]
    assert parts[-1] == End("stop", None, len(tokens), 2)


def test_ends():
    def ends(stops=(), limit=50):
        engine = FakeEngine(script=script_of(BYTES, "one two"))
        return collect(engine, [Job([1], limit, stop_ids=STOPS, stops=stops)])[-1][1], engine

    assert ends()[0].reason == "stop"
    assert ends(limit=3)[0] == End("length", None, 3, 0)
    end, engine = ends(stops=(" t",))
    assert (end.reason, end.stop, end.output_tokens) == ("stop", " t", 5)
    assert (engine.running, engine.cancelled) == (0, 1)


def test_several_jobs_at_once_equal_one_by_one():
    jobs = [Job([i], 30, Sampling(seed=i), STOPS) for i in range(5)]
    together = collect(FakeEngine(), jobs)
    for i, job in enumerate(jobs):
        assert [part for index, part in together if index == i] == [part for _, part in collect(FakeEngine(), [job])]


class AtOnce(FakeEngine):
    """All answers of a request go on step by step."""

    async def generate(self, job):
        self.running += job.n
        answers = {sample: self._answer(sample, job) for sample in range(job.n)}
        try:
            while answers:
                for sample in list(answers):
                    event = await anext(answers[sample])
                    if isinstance(event, Finished):
                        del answers[sample]
                    yield sample, event
        finally:
            self.cancelled += len(answers)
            self.running -= job.n


def test_several_answers_of_a_job_are_numbered_and_end_on_their_own():
    """One of them at its stop text: what the engine goes on to say of it is not heard."""
    alone = [collect(FakeEngine(), [Job([i], 20, Sampling(seed=7), n=2)]) for i in (5, 6)]
    shown = [[part for index, part in alone[i] if index == k] for i in (0, 1) for k in (0, 1)]
    together = collect(AtOnce(), [Job([i], 20, Sampling(seed=7), n=2) for i in (5, 6)])
    assert [[part for index, part in together if index == k] for k in range(4)] == shown

    text = "".join(e.text for part in shown[0] if isinstance(part, Step) for e in part.events)
    engine = AtOnce()
    stopped = collect(engine, [Job([5], 20, Sampling(seed=7), n=2, stops=(text[3:6],))])
    ends = dict(item for item in stopped if isinstance(item[1], End))
    assert ends[0] == End("stop", text[3:6], 6, 0) and ends[1] == shown[1][-1]
    assert [part for index, part in stopped if index == 1][-1] is ends[1] and engine.running == 0


def test_all_answers_hear_of_the_prompt():
    parts = collect(FakeEngine(), [Job([5, 6], 2, Sampling(prompt_logprobs=0), n=2)])
    assert [index for index, part in parts if isinstance(part, PromptScores)] == [0, 1]


def test_closing_cancels_all():
    engine = FakeEngine(delay=0.001)

    async def run():
        jobs = [Job([i], 1000, Sampling(seed=i)) for i in range(3)]
        async with contextlib.aclosing(generate_all(engine, BYTES, jobs)) as parts:
            async for _ in parts:
                assert engine.running
                break
        return engine.running

    assert asyncio.run(run()) == 0
    assert engine.finished == 0 and engine.cancelled


def test_an_error_reaches_the_caller_and_ends_the_rest():
    class Broken(FakeEngine):
        async def generate(self, job):
            async for event in super().generate(job):
                yield event
                if job.prompt_ids == [1]:
                    raise RuntimeError("lost")

    engine = Broken()
    with pytest.raises(RuntimeError, match="lost"):
        collect(engine, [Job([i], 500) for i in range(3)])
    assert engine.running == 0


def test_one_answer_is_closed_with_its_iterator():
    engine = FakeEngine()

    async def run():
        async with contextlib.aclosing(generate(engine, BYTES, Job([1], 100))) as parts:
            async for _ in parts:
                break

    asyncio.run(run())
    assert (engine.running, engine.cancelled) == (0, 1)
