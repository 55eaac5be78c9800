"""Dialogues at random for hypothesis: every field that a client fills may spell control tokens."""

from hypothesis import strategies as st

from kimi_jax.data import tokenizer as tk

BYTES = tk.load("bytes")
MARKERS = list(BYTES.special_ids)
FRAME = [name for name in MARKERS if "reserved" not in name]

texts = st.lists(st.sampled_from([*FRAME, "<|", "|>", "im_end", "\n", " "]) | st.text(max_size=5), max_size=4).map(
    "".join
)
filled = texts.filter(bool)
contents = st.none() | texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)

functions = st.fixed_dictionaries({"name": filled, "description": texts, "parameters": objects})
tools = st.none() | st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=3)
calls = st.fixed_dictionaries(
    {"id": filled, "function": st.fixed_dictionaries({"name": filled, "arguments": texts | objects})}
)


def messages_of(role):
    fields = {"role": st.just(role), "content": contents}
    optional = {"name": texts}
    if role == "assistant":
        optional["tool_calls"] = st.lists(calls, max_size=3)
    if role == "tool":
        fields["tool_call_id"] = texts
    return st.fixed_dictionaries(fields, optional=optional)


roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "critic"])
dialogues = st.lists(roles.flatmap(messages_of), max_size=6)
