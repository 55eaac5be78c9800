"""The published simple chat, whole or as a stream.

python examples/chat.py --base-url http://127.0.0.1:8000/v1 --model kimi_jax
python examples/chat.py --stream --prompt "What is a TPU?"
"""

from __future__ import annotations

import argparse
from typing import Any

from openai import OpenAI

SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
PROMPT = "Please give a brief self-introduction."


def ask(client: OpenAI, model: str, prompt: str, stream: bool) -> str:
    """Prints the answer, and returns it."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
    ]
    request: Any = dict(model=model, messages=messages, temperature=0.6, max_tokens=256)
    if not stream:
        text = client.chat.completions.create(**request).choices[0].message.content or ""
        print(text)
        return text
    text = ""
    for chunk in client.chat.completions.create(**request, stream=True):
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="kimi_jax")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    ask(OpenAI(base_url=args.base_url, api_key=args.api_key), args.model, args.prompt, args.stream)


if __name__ == "__main__":
    main()
