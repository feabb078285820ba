"""Script that generates answers with a saved model, using transformers only.

Run it in an environment where vlparts cannot be imported:
`ask.py FOLDER QUESTIONS.jsonl ANSWERS.json [TOKENS]`.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

_BATCH = 50


def main(folder: str, questions: str, answers: str, tokens: str = "40") -> None:
    """Generate an answer for each record of a file.

    Args:
        folder: A checkpoint with its code.
        questions: JSON Lines file of records; the first user turn is the question.
        answers: JSON file to write the list of answers to.
        tokens: Maximum number of tokens per answer.

    Raises:
        RuntimeError: If vlparts can be imported.
    """
    if importlib.util.find_spec("vlparts") is not None:
        raise RuntimeError("vlparts can be imported; expected an environment without it.")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    root = Path(questions).parent
    records = [json.loads(line) for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    texts: list[str] = []
    for start in range(0, len(records), _BATCH):
        chats = [_chat(root, record) for record in records[start : start + _BATCH]]
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        with torch.inference_mode():
            generated = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
        texts += processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    Path(answers).write_text(json.dumps([text.strip() for text in texts]), encoding="utf-8")


def _chat(root: Path, record: dict) -> list[dict]:
    question = next(message["content"] for message in record["messages"] if message["role"] == "user")
    image = {"type": "image", "path": str(root / record["image"])}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


if __name__ == "__main__":
    main(*sys.argv[1:])
