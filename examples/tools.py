"""Tool calling to its end: the model asks for the weather until it can answer, whole or as a stream.

python examples/tools.py --base-url http://127.0.0.1:8000/v1 --model kimi_jax
python examples/tools.py --stream
python examples/tools.py --tool-choice required --rounds 1    # what any weights can do: one call that is valid
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI

PROMPT = "What's the weather like in Beijing today? Let's check using the tool."


def get_weather(city: str) -> dict[str, str]:
    return {"city": city, "weather": "Sunny"}


FUNCTIONS = {"get_weather": get_weather}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Retrieve current weather information. Call this when the user asks about the weather.",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {"city": {"type": "string", "description": "Name of the city", "maxLength": 64}},
            },
        },
    }
]


def whole(client: OpenAI, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Why the answer ended, and the assistant's message."""
    choice = client.chat.completions.create(**request).choices[0]
    return choice.finish_reason, choice.message.model_dump(exclude_none=True)


def streamed(client: OpenAI, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The same, put together from the pieces: a call's first has its id and name, the others more of its arguments."""
    reason, content, calls = "", "", {}
    for chunk in client.chat.completions.create(**request, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for piece in choice.delta.tool_calls or []:
            part: Any = piece.function
            if piece.id:
                function = {"name": part.name, "arguments": ""}
                calls[piece.index] = {"id": piece.id, "type": "function", "function": function}
            calls[piece.index]["function"]["arguments"] += part.arguments or ""
    message = {"role": "assistant", "content": content}
    return reason, {**message, "tool_calls": list(calls.values())} if calls else message


def run(client: OpenAI, model: str, stream: bool, tool_choice: str = "auto", rounds: int = 8) -> list[dict[str, Any]]:
    """The whole dialogue. It ends with the answer, or with the results of the last round's calls."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {"role": "user", "content": PROMPT},
    ]
    for _ in range(rounds):
        request: Any = dict(model=model, messages=messages, tools=TOOLS, tool_choice=tool_choice, temperature=0.6)
        reason, message = (streamed if stream else whole)(client, request)
        messages.append(message)
        if reason != "tool_calls":
            break
        for call in message["tool_calls"]:
            name, given = call["function"]["name"], json.loads(call["function"]["arguments"])
            result = FUNCTIONS[name](**given)
            print(f"{name}({given}) -> {result}")
            content = json.dumps(result, ensure_ascii=False)
            messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="kimi_jax")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--tool-choice", choices=("auto", "required"), default="auto")
    parser.add_argument("--rounds", type=int, default=8, help="at most so many requests")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    print(run(client, args.model, args.stream, args.tool_choice, args.rounds)[-1]["content"])


if __name__ == "__main__":
    main()
