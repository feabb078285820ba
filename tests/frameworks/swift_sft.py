"""Composed models in ms-swift, which the session `frameworks` installs: encoding, batches, training, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swift.arguments import SftArguments
from swift.infer_engine import InferRequest, RequestConfig, TransformersEngine
from swift.model import get_processor
from swift.pipelines import sft_main
from swift.template import get_template
from swift.utils import import_external_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.serving.models import COMPOSITIONS, build
from tests.tiny import order_one, picture, save_turned, text_config, tokenizer, vision_config
from tests.training.making import save, write_records
from vlparts import compose, compose_processor
from vlparts.demo.isolation import environment_without, run_without
from vlparts.frameworks import MODULES
from vlparts.training.encoding import SampleEncoder
from vlparts.training.records import Record

PLUGIN = Path(__file__).parents[2] / "src/vlparts/frameworks/ms_swift.py"
LOAD = """
import json, sys, torch
import json
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, out = map(Path, sys.argv[1:])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
blocks = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "Where is cat 0?"}]
inputs = processor.apply_chat_template([[{"role": "user", "content": blocks}]], tokenize=True, return_dict=True,
    return_tensors="pt", add_generation_prompt=True)
out.write_text(json.dumps(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()))
"""


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Any:
    """The plugin, loaded as `--external_plugins` loads it."""
    return import_external_file(str(PLUGIN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, and four records with one, two or no images."""
    folder = tmp_path_factory.mktemp("composed")
    words = tokenizer()
    model = order_one(compose(vision_config("navit"), text_config("qwen3", words)))
    processor = compose_processor(model, words)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_records(folder / "train.jsonl", [swift_record(index, folder) for index in range(4)])
    return folder


def swift_record(index: int, folder: Path, system: bool = False) -> dict[str, Any]:
    """A record with `index % 3` images in ms-swift's form, whose images are saved in the folder."""
    images = [
        save(folder, f"{index}-{number}.png", picture(24 + 8 * number, 16, index)) for number in range(index % 3)
    ]
    user = "".join(f"<image>{number} " for number in range(len(images))) + f"Where is cat {index}?"
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "there" * (1 + index)},
    ]
    if system:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    return {"messages": messages, "images": [str(folder / name) for name in images]}


def own_record(row: dict[str, Any]) -> Record:
    """The same record in the form of vlparts."""
    messages = []
    for message in row["messages"]:
        first, *rest = message["content"].split("<image>")
        blocks = [first] if first else []
        for part in rest:
            blocks += [{"type": "image"}, part]
        messages.append({"role": message["role"], "content": blocks})
    return Record.model_validate({"messages": messages, "images": row["images"]})


def template_of(folder: Path, **options: Any) -> Any:
    template = get_template(get_processor(str(folder), model_type="vlparts_vlm"), **options)
    template.set_mode("train")
    return template


def arguments(folder: Path, output: Path, **changes: Any) -> list[str]:
    """The command line of two steps on the CPU."""
    options = {
        "model": folder / "model",
        "external_plugins": PLUGIN,
        "model_type": "vlparts_vlm",
        "dataset": folder / "train.jsonl",
        "strict": "true",
        "load_from_cache_file": "false",
        "split_dataset_ratio": 0,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "learning_rate": 1e-2,
        "save_only_model": "true",
        "dataloader_num_workers": 0,
        "output_dir": output,
        "add_version": "false",
        "report_to": "none",
        **changes,
    }
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def changes(folder: Path, result: dict[str, Any]) -> dict[str, float]:
    """Largest change of a weight in each part of the model."""
    before = load_file(folder / "model/model.safetensors")
    after = load_file(Path(result["last_model_checkpoint"]) / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name: float((after[name] - one).abs().max()) for name, one in before.items()}
    return {
        part: max(value for name, value in moved.items() if name.startswith(tuple(modules)))
        for part, modules in MODULES.items()
    }


@pytest.mark.parametrize(
    "name", ["navit_moge", "openpangu", "points", "deepencoder_moge", "clip_llama", "siglip2_qwen3"]
)
def test_records_are_encoded_as_by_vlparts(name: str, tmp_path: Path) -> None:
    model, processor = build(COMPOSITIONS[name])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    template = template_of(tmp_path / "model")
    encoder = SampleEncoder(processor, tmp_path)
    for index in range(3):
        row = swift_record(index, tmp_path, system=index == 2 and name != "points")
        found, wanted = template.encode(row), encoder(own_record(row))
        assert found["input_ids"] == wanted.input_ids.tolist()
        assert found["labels"] == wanted.labels.tolist()
        images = {key: found[key] for key in found.keys() - {"input_ids", "labels"}}
        assert images.keys() == wanted.images.keys()
        assert all(torch.equal(images[key], wanted.images[key]) for key in images)


@pytest.mark.parametrize("name", ["navit_moge", "openpangu", "siglip2_qwen3"])
def test_the_loss_of_a_batch_is_that_of_its_samples_padded_or_not(name: str, tmp_path: Path) -> None:
    model, processor = build(COMPOSITIONS[name])
    model = order_one(model).eval()
    if hasattr(model.config.text_config, "router_aux_loss_coef"):
        model.config.text_config.router_aux_loss_coef = 0.0  # which is no mean over tokens
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [swift_record(index, tmp_path) for index in range(4)]
    total = count = 0.0
    for row in rows:
        sample = SampleEncoder(processor, tmp_path)(own_record(row))
        targets = int((sample.labels[1:] != -100).sum())
        with torch.no_grad():
            loss = model(sample.input_ids[None], labels=sample.labels[None], **sample.images).loss
        total, count = total + float(loss) * targets, count + targets
    for padding_free in (False, True):
        template = template_of(tmp_path / "model", padding_free=padding_free)
        batch = template.data_collator([template.encode(row, return_length=True) for row in rows])
        batch = {key: value for key, value in batch.items() if key not in ("length", "lengths")}
        assert len(batch["input_ids"]) == (1 if padding_free else 4)
        with torch.no_grad():
            assert abs(float(model(**batch).loss) - total / count) < 1e-5


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps with a frozen vision encoder, as for a new projector."""
    return sft_main(arguments(folder, tmp_path_factory.mktemp("trained"), freeze_vit="true", freeze_aligner="false"))


def test_a_frozen_encoder_does_not_change(folder: Path, trained: dict[str, Any]) -> None:
    moved = changes(folder, trained)
    assert {part: value == 0 for part, value in moved.items()} == {"vision": True, "projector": False, "text": False}


def test_a_frozen_text_model_does_not_change(folder: Path, tmp_path: Path) -> None:
    options = {"freeze_vit": "false", "freeze_aligner": "true", "freeze_llm": "true", "max_steps": 1}
    moved = changes(folder, sft_main(arguments(folder, tmp_path, **options)))
    assert {part: value == 0 for part, value in moved.items()} == {"vision": False, "projector": True, "text": True}


def test_parts_have_learning_rates_of_their_own(folder: Path, tmp_path: Path) -> None:
    """The first step of Adam changes every weight by its learning rate."""
    rates = {"learning_rate": 1e-2, "vit_lr": 1e-4, "aligner_lr": 1e-3}
    options = {**rates, "freeze_vit": "false", "freeze_aligner": "false", "max_steps": 1, "optim": "adamw_torch"}
    moved = changes(folder, sft_main(arguments(folder, tmp_path, **options)))
    wanted = {"vision": 1e-4, "projector": 1e-3, "text": 1e-2}
    assert all(abs(moved[part] / rate - 1) < 0.02 for part, rate in wanted.items()), moved


def test_the_trained_folder_needs_neither_ms_swift_nor_vlparts(trained: dict[str, Any], tmp_path: Path) -> None:
    saved = Path(trained["last_model_checkpoint"])
    python = environment_without(tmp_path / "bare")
    save(tmp_path, "cat.png", picture(24, 16))
    answer = tmp_path / "answer.json"
    run_without(python, LOAD, saved, tmp_path / "cat.png", answer, modules_cache=tmp_path / "code")
    model = AutoModelForImageTextToText.from_pretrained(saved).eval()
    processor = AutoProcessor.from_pretrained(saved)
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    request = {
        "messages": [{"role": "user", "content": "<image>Where is cat 0?"}],
        "images": [str(tmp_path / "cat.png")],
    }
    engine = TransformersEngine(
        str(saved), model_type="vlparts_vlm", template_type="vlparts", torch_dtype=torch.float32
    )
    prompt = engine.template.encode(request)["input_ids"]
    tokens = json.loads(answer.read_text())[0]
    assert tokens[: len(prompt)] == prompt
    wanted = processor.decode(tokens[len(prompt) :], skip_special_tokens=False)
    found = (
        engine.infer([InferRequest(**request)], RequestConfig(max_tokens=6, temperature=0))[0]
        .choices[0]
        .message.content
    )
    assert found == wanted


def test_adapters_are_in_the_parts_that_are_not_frozen(folder: Path, tmp_path: Path) -> None:
    options = {"tuner_type": "lora", "freeze_vit": "false", "freeze_aligner": "true", "max_steps": 1}
    result = sft_main(arguments(folder, tmp_path, **options))
    adapter = load_file(Path(result["last_model_checkpoint"]) / "adapter_model.safetensors")
    parts = {
        part for name in adapter for part, modules in MODULES.items() if any(f".{one}." in name for one in modules)
    }
    assert parts == {"vision", "text"}


def test_images_are_upright(folder: Path, tmp_path: Path) -> None:
    template, image = template_of(folder / "model"), picture(32, 16)
    chat = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "cat"}]
    image.save(tmp_path / "upright.png")
    save_turned(image, tmp_path / "turned.png", 6)
    upright, turned = (
        template.encode({"messages": chat, "images": [str(tmp_path / f"{name}.png")]})
        for name in ("upright", "turned")
    )
    assert torch.equal(upright["pixel_values"], turned["pixel_values"])
    assert torch.equal(upright["image_grid_thw"], turned["image_grid_thw"])


def test_an_image_without_a_tag_is_first(folder: Path) -> None:
    template, row = template_of(folder / "model"), swift_record(1, folder)
    without = {
        **row,
        "messages": [{**one, "content": one["content"].replace("<image>", "")} for one in row["messages"]],
    }
    assert template.encode(without)["input_ids"] == template.encode(row)["input_ids"]


REFUSED = {
    "tools": {"tools": [{"type": "function"}]},
    "videos": {"videos": ["cat.mp4"]},
    "objects": {"objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_without_a_counterpart_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be empty for the template 'vlparts'"):
        template_of(folder / "model").encode({**swift_record(1, folder), **REFUSED[name]})


def test_messages_that_would_be_changed_are_refused(folder: Path) -> None:
    template, row = template_of(folder / "model"), swift_record(1, folder)
    user, *rest = row["messages"]
    more = {**row, "messages": [{**user, "content": "<image>" + user["content"]}, *rest]}
    with pytest.raises(ValueError, match="`messages` have 2 <image> tags for 1 images"):
        template.encode(more)
    weighted = {**row, "messages": [user, {**rest[0], "loss": False}]}
    with pytest.raises(ValueError, match="`messages` must have no field loss"):
        template.encode(weighted)
    tool = {**row, "messages": [user, {"role": "tool", "content": "1"}, rest[0]]}
    with pytest.raises(ValueError, match="`messages` must have the roles system, user, assistant, got 'tool'"):
        template.encode(tool)


@pytest.mark.parametrize(
    ("name", "value"), [("enable_thinking", True), ("use_chat_template", False), ("response_prefix", "<think>")]
)
def test_options_without_a_counterpart_are_refused(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        template_of(folder / "model", **{name: value})


@pytest.mark.parametrize("value", ["all", "last_round", "default+ignore_empty_think"])
def test_other_losses_are_refused(folder: Path, value: str) -> None:
    with pytest.raises(ValueError, match="`loss_scale` must be one of default for a conversation with 2"):
        template_of(folder / "model", loss_scale=value).encode(swift_record(1, folder))


def test_another_engine_is_refused(folder: Path) -> None:
    template = template_of(folder / "model")
    template.set_mode("vllm")
    with pytest.raises(ValueError, match="`infer_backend` must be 'transformers'"):
        template.encode(swift_record(1, folder))


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_packing_needs_flash_attention(folder: Path, tmp_path: Path, option: str) -> None:
    """A rule of ms-swift, for all models."""
    with pytest.raises(ValueError, match="requires a flash attention implementation"):
        SftArguments(model=str(folder / "model"), external_plugins=[str(PLUGIN)], dataset=["x"], **{option: True})
