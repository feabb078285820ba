"""Requests of the OpenAI client to `vllm serve`, with images as data URLs."""

import base64
import mimetypes
from pathlib import Path
from typing import Any

TOP = 5  # tokens of each step whose log-probabilities are given
# Tokens, the log-probabilities of the likeliest tokens of each step, and the number of tokens of the prompt.
Answer = tuple[list[int], list[dict[int, float]], int]
Conversation = list[dict[str, Any]]


def with_images(conversation: Conversation, blocks: list[dict[str, Any]]) -> Conversation:
    """The conversation, in which these blocks take the places of the images."""
    rest = iter(blocks)
    return [
        {**turn, "content": [next(rest) if block["type"] == "image" else block for block in turn["content"]]}
        for turn in conversation
    ]


def with_files(conversation: Conversation, files: list[Path]) -> Conversation:
    """The conversation with the images of these files as data URLs."""
    blocks = []
    for file in files:
        data = base64.b64encode(file.read_bytes()).decode()
        url = f"data:{mimetypes.guess_type(file)[0]};base64,{data}"
        blocks.append({"type": "image_url", "image_url": {"url": url}})
    return with_images(conversation, blocks)


def stream(client: Any, messages: Conversation, new_tokens: int, extra: dict[str, Any] | None = None) -> Answer:
    """Ask the server, with these extra fields of the request, and collect the answer from the stream."""
    events = client.chat.completions.create(
        model="served",
        messages=messages,
        temperature=0.0,
        max_completion_tokens=new_tokens,
        logprobs=True,
        top_logprobs=TOP,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True, **(extra or {})},
    )
    tokens: list[int] = []
    logprobs: list[dict[int, float]] = []
    prompt_tokens = 0
    for event in events:
        for choice in event.choices:
            tokens += getattr(choice, "token_ids", None) or []
            if choice.logprobs is not None and choice.logprobs.content:
                steps = [step.top_logprobs for step in choice.logprobs.content]
                logprobs += [{int(one.token.removeprefix("token_id:")): one.logprob for one in step} for step in steps]
        if event.usage is not None:
            prompt_tokens = event.usage.prompt_tokens
    return tokens, logprobs, prompt_tokens
