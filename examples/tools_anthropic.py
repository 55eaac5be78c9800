"""The same loop through Anthropic's client.

python examples/tools_anthropic.py --base-url http://127.0.0.1:8000 --model kimi_jax [--stream]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from anthropic import Anthropic

PROMPT = "What's the weather like in Beijing today? Let's check using the tool."
TOOL = {
    "name": "get_weather",
    "description": "Retrieve current weather information. Call this when the user asks about the weather.",
    "input_schema": {
        "type": "object",
        "required": ["city"],
        "properties": {"city": {"type": "string", "description": "Name of the city", "maxLength": 64}},
    },
}


def get_weather(city: str) -> dict[str, str]:
    return {"city": city, "weather": "Sunny"}


def run(client: Anthropic, model: str, stream: bool, rounds: int = 8) -> list[dict[str, Any]]:
    """The whole dialogue. It ends with the answer, or with the results of the last round's calls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": PROMPT}]
    for _ in range(rounds):
        request: Any = dict(model=model, messages=messages, tools=[TOOL], max_tokens=1024)
        if stream:
            with client.messages.stream(**request) as events:
                for text in events.text_stream:
                    print(text, end="", flush=True)
                answer = events.get_final_message()
        else:
            answer = client.messages.create(**request)
        blocks = [block.model_dump(exclude_none=True) for block in answer.content]
        messages.append({"role": "assistant", "content": blocks})
        if answer.stop_reason != "tool_use":
            break
        results = []
        for call in (block for block in blocks if block["type"] == "tool_use"):
            found = json.dumps(get_weather(**call["input"]), ensure_ascii=False)
            print(f"get_weather({call['input']}) -> {found}")
            results.append({"type": "tool_result", "tool_use_id": call["id"], "content": found})
        messages.append({"role": "user", "content": results})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="kimi_jax")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    last = run(Anthropic(base_url=args.base_url, api_key=args.api_key), args.model, args.stream)[-1]
    print("".join(block.get("text", "") for block in last["content"]))


if __name__ == "__main__":
    main()
