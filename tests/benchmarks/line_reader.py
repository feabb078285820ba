"""A small model that reads pages with a few lines of large text, trained in minutes, and such pages."""

import random
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers.trainer_pt_utils import get_parameter_names

from vlparts import DeepEncoderConfig, DeepEncoderImageProcessor, MoGEConfig, compose, compose_processor
from vlparts.documents import DEEPSEEK_OCR_PROMPTS
from vlparts.parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE
from vlparts.parts.modeling_vlm import VisionLanguageForConditionalGeneration
from vlparts.parts.processing_vlm import VisionLanguageProcessor
from vlparts.training.tokenizer import train_tokenizer

Drawn = tuple[Image.Image, str]
Parts = tuple[VisionLanguageForConditionalGeneration, VisionLanguageProcessor]
PROMPT = DEEPSEEK_OCR_PROMPTS["markdown"]
WORDS = ["apple", "bread", "chair", "dance", "eagle", "flame", "house", "mirror", "ocean", "tiger"]
SIZE = (256, 256)
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
ENCODER = dict(
    sam_hidden_size=64,
    sam_intermediate_size=128,
    sam_num_hidden_layers=2,
    sam_num_attention_heads=2,
    sam_position_size=8,
    sam_window_size=4,
    sam_global_layers=[1],
    neck_channels=32,
    compressor_channels=[64, 128],
    clip_hidden_size=128,
    clip_intermediate_size=256,
    clip_num_hidden_layers=2,
    clip_num_attention_heads=4,
    clip_position_size=2,
)


def draw_page(seed: int) -> Drawn:
    """A page with a title and a line of text or a figure, and the answer of a perfect model."""
    chance = random.Random(seed)
    page = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.truetype(FONT, 54)
    blocks = []
    for slot, kind in enumerate(("title", chance.choice(["text", "text", "image"]))):
        left, top = 12 + chance.randint(0, 6), 24 + 128 * slot + chance.randint(0, 6)
        if kind == "image":
            box = (left, top, left + 130, top + 70)
            pen.rectangle(box, fill=chance.choice(["navy", "darkred", "darkgreen"]))
            blocks.append(f"{_mark(kind, box)}\n")
            continue
        word = chance.choice(WORDS)
        pen.text((left, top), word, font=font, fill="black")
        mark = _mark(kind, pen.textbbox((left, top), word, font=font))
        blocks.append(f"{mark}\n{'# ' if kind == 'title' else ''}{word}\n")
    return page, "\n".join(blocks)


def _mark(kind: str, box: tuple[float, float, float, float]) -> str:
    """A mark whose coordinates are rounded to multiples of 50 thousandths."""
    edges = [min(999, 50 * round(20 * edge / SIZE[index % 2])) for index, edge in enumerate(box)]
    return f"<|ref|>{kind}<|/ref|><|det|>[[{', '.join(map(str, edges))}]]<|/det|>"


def build() -> Parts:
    """The model with new weights, and its processor."""
    tokenizer = train_tokenizer([PROMPT, *(draw_page(seed)[1] for seed in range(500))], 400)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"]}
    )
    text = MoGEConfig.from_preset("tiny", vocab_size=len(tokenizer), router_aux_loss_coef=0.0)
    model = compose(DeepEncoderConfig(**ENCODER), text, "deepseek_ocr")
    processor = compose_processor(model, tokenizer, chat_template=DEEPSEEK_OCR_CHAT_TEMPLATE)
    processor.image_processor = DeepEncoderImageProcessor(mode=None, base_size=128, do_pad=False, do_tile=False)
    return model, processor


def train(steps: int, batch_size: int = 16, report: int = 50) -> Parts:
    """Train the model on pages with the seeds 1,000 and above."""
    torch.manual_seed(0)
    model, processor = build()
    start = processor(images=[[draw_page(0)[0]]], text=[PROMPT], return_tensors="pt")["input_ids"][0]
    decayed = get_parameter_names(model, [torch.nn.LayerNorm, torch.nn.Embedding])
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if (name in decayed) is chosen],
            "weight_decay": 0.05 * chosen,
        }
        for chosen in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.95))
    # At the full rate the loss falls from 0.09 (positions) at step 300 to 0.01 (words) at step 550.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 150, (steps - step) / 200)
    )
    model.train()
    for step in range(steps):
        pages = [draw_page(1000 + step * batch_size + index) for index in range(batch_size)]
        inputs = _batch(processor, start, pages)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % report == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return model.eval(), processor


def _batch(
    processor: VisionLanguageProcessor, start: Tensor, pages: list[tuple[Image.Image, str]]
) -> dict[str, Tensor]:
    """Inputs with labels; all prompts are `start`."""
    tokenizer = processor.tokenizer
    answers = [
        torch.tensor([*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id])
        for _, answer in pages
    ]
    padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
    labels = torch.cat([torch.full((len(pages), len(start)), -100), padded], 1)
    ids = torch.cat([start.expand(len(pages), -1), padded.where(padded >= 0, tokenizer.pad_token_id)], 1)
    mask = torch.cat([torch.ones(len(pages), len(start), dtype=torch.int64), (padded >= 0).long()], 1)
    images = processor.image_processor([page for page, _ in pages], return_tensors="pt")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images}
