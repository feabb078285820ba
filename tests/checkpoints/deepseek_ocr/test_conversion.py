"""DeepSeek-OCR folders to models and back: every bit, the published encoder's outputs, and refused input."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from tests.checkpoints.deepseek_ocr.files import CONFIG, LANGUAGE, TOKENIZER, shapes, tensors
from tests.checkpoints.files import assert_same_bytes, read_folder, write_folder, write_json
from tests.parity.unlimited_ocr import native_of
from tests.tiny import tokenizer
from vlparts import DeepEncoderConfig, MoGEConfig, VisionLanguageConfig, VisionLanguageForConditionalGeneration
from vlparts.checkpoints import _safetensors
from vlparts.checkpoints.deepseek_ocr import model_from_deepseek_ocr, processor_from_deepseek_ocr, to_deepseek_ocr
from vlparts.checkpoints.deepseek_ocr.names import get_slices


def folder_of(path: Path, **changes: Any) -> Path:
    folder = write_folder(path, tensors(), {**CONFIG, **changes})
    write_json(folder / "tokenizer.json", TOKENIZER)
    return folder


def test_the_published_model_has_2710_tensors() -> None:
    config = VisionLanguageConfig(
        vision_config=DeepEncoderConfig.from_preset("deepseek_ocr", clip_patch_embedding=14),
        text_config=MoGEConfig.from_preset("deepseek_ocr"),
        projector_type="deepseek_ocr",
    )
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    assert len(get_slices(model)) == 2710
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 3_336_106_240


@pytest.mark.usefixtures("poisoned_empty")
def test_reading_and_writing_keeps_every_bit(tmp_path: Path) -> None:
    model = model_from_deepseek_ocr(folder_of(tmp_path / "in"))
    assert model.dtype == torch.bfloat16
    assert not model.training
    to_deepseek_ocr(model, tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = {"auto_map", "transformers_version", "torch_dtype", "candidate_resolutions"}
    for name in CONFIG.keys() - ignored - {"vision_config"}:
        assert written[name] == CONFIG[name], name
    assert written["vision_config"]["width"] == CONFIG["vision_config"]["width"]
    write_json(tmp_path / "out" / "tokenizer.json", TOKENIZER)
    again = model_from_deepseek_ocr(tmp_path / "out")
    assert again.config.to_dict() == model.config.to_dict()
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def test_pages_of_one_large_file_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of a mapped file is memory of the process until the file is closed."""
    folder, openings = write_folder(tmp_path / "in", tensors(), CONFIG, shards=1), []
    write_json(folder / "tokenizer.json", TOKENIZER)

    def counting(*args: Any, **kwargs: Any) -> Any:
        openings.append(args)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(_safetensors, "safe_open", counting)
    # Some tensors are larger than a tenth.
    monkeypatch.setattr(_safetensors, "BYTES_PER_OPENING", sum(tensor.nbytes for tensor in tensors().values()) // 10)
    to_deepseek_ocr(model_from_deepseek_ocr(folder), tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors())
    assert len(openings) >= 4


@pytest.mark.parametrize("form", ["top level", "language_config"])
def test_both_forms_of_the_configuration(tmp_path: Path, form: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name not in LANGUAGE}
    if form == "top level":
        config = {name: value for name, value in CONFIG.items() if name != "language_config"}
    folder = write_folder(tmp_path / "in", tensors(), config)
    write_json(folder / "tokenizer.json", TOKENIZER)
    text = model_from_deepseek_ocr(folder).config.text_config
    assert (text.num_experts, text.mlp_only_layers, text.shared_expert_intermediate_size) == (4, [0], 32)
    assert (text.router_aux_loss_coef, text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (0.001, 1e-6, 1e4)


@pytest.mark.parametrize(("published", "form"), [(None, "sequence"), (True, "sequence"), (False, "batch")])
def test_the_form_of_the_balance_loss(tmp_path: Path, published: bool | None, form: str) -> None:
    fields = {} if published is None else {"seq_aux": published}
    folder = folder_of(tmp_path / "in", **fields, language_config={**CONFIG["language_config"], **fields})
    model = model_from_deepseek_ocr(folder)
    assert model.config.text_config.router_aux_loss_form == form
    to_deepseek_ocr(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.get("seq_aux", True) == (form == "sequence")


def test_the_encoder_computes_what_the_published_names_say(tmp_path: Path) -> None:
    encoder = model_from_deepseek_ocr(folder_of(tmp_path / "in"), dtype=torch.float64).model.vision_tower
    native = native_of(encoder.config).double()
    published = {name: tensor.double() for name, tensor in tensors().items()}
    for name, parameter in native.named_parameters():
        parameter.data.copy_(published_tensor(name, published))
    view = torch.randn(3, 128, 128, dtype=torch.float64)
    expected = native(view[None]).last_hidden_state[0]
    patches = view.unflatten(1, (8, 16)).unflatten(3, (8, 16)).permute(1, 3, 0, 2, 4).reshape(64, 768)
    found = encoder(patches, torch.tensor([[1, 8, 8]])).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def published_tensor(name: str, published: dict[str, Tensor]) -> Tensor:
    """The published tensor of a parameter of transformers' `UnlimitedOcrVisionModel`."""
    room, _, rest = name.partition(".")
    if room == "sam_encoder":
        rest = re.sub(r"^layers\.(\d+)\.layer_norm", r"blocks.\1.norm", rest)
        rest = re.sub(r"^layers\.", "blocks.", rest).replace("patch_embed.projection", "patch_embed.proj")
        for old, new in {"conv1": "0", "layer_norm1": "1", "conv2": "2", "layer_norm2": "3"}.items():
            rest = rest.replace(f"neck.{old}", f"neck.{new}")
        rest = re.sub(r"^proj\.conv([12])", lambda match: f"net_{int(match[1]) + 1}", rest)
        return published[f"model.sam_model.{rest}"]
    rest = rest.replace("encoder.", "transformer.")
    match = re.fullmatch(r"(.+self_attn)\.([qkv])_proj\.(.+)", rest)
    if match:
        return published[f"model.vision_model.{match[1]}.qkv_proj.{match[3]}"].chunk(3)["qkv".index(match[2])]
    return published[f"model.vision_model.{rest}"]


def test_generation_options(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    options = model_from_deepseek_ocr(folder).generation_config
    assert (options.no_repeat_ngram_size, options.no_repeat_ngram_window_size) == (30, 90)
    assert (options.no_repeat_ngram_allowed_ids, options.suppress_tokens) == ([8, 9], [7])
    assert options.eos_token_id == 1
    write_json(folder / "generation_config.json", {"no_repeat_ngram_size": 20, "eos_token_id": 1})
    options = model_from_deepseek_ocr(folder).generation_config
    assert (options.no_repeat_ngram_size, options.no_repeat_ngram_window_size) == (20, 90)


def test_a_processor_whose_prompt_is_plain(tmp_path: Path) -> None:
    made = tokenizer()
    made.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    made.chat_template = None
    made.save_pretrained(tmp_path)
    processor = processor_from_deepseek_ocr(tmp_path, mode="small")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nFree OCR."}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == f"{made.bos_token or ''}<image>\nFree OCR."
    inputs = processor(images=[Image.new("RGB", (9, 9))], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 111


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "deepseek_v2", "architectures": ["Other"]},
            "must have the model_type 'deepseek_vl_v2', got 'deepseek_v2'",
        ),
        ({"topk_method": "noaux_tc"}, "one value of topk_method, got 'noaux_tc' and 'greedy'"),
        ({"hidden_size": 64}, "one value of hidden_size, got 64 and 32 in language_config"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'softmax' or without scoring_func, got 'sigmoid'"),
        ({"seq_aux": 1}, "seq_aux true or false, got 1"),
        ({"tile_tag": "1D"}, "tile_tag '2D', got '1D'"),
        ({"projector_config": {"projector_type": "mlp_gelu"}}, "must have a linear projector"),
        ({"vision_config": {"image_size": 128}}, "as width of its vision_config"),
    ],
)
def test_bad_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_deepseek_ocr(folder_of(tmp_path / "in", **changes))


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    changed = tensors()
    changed["model.other"] = changed.pop("model.image_newline")
    folder = write_folder(tmp_path / "in", changed, CONFIG)
    write_json(folder / "tokenizer.json", TOKENIZER)
    with pytest.raises(ValueError, match=r"Missing: model\.image_newline\. Unexpected: model\.other"):
        model_from_deepseek_ocr(folder)
    assert len(shapes()) == len(tensors())


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    model = model_from_deepseek_ocr(folder_of(tmp_path / "in"))
    model.config.text_config.router_aux_loss_form = "global"
    with pytest.raises(ValueError, match="`router_aux_loss_form` 'sequence' or 'batch' .* got 'global'"):
        to_deepseek_ocr(model, tmp_path / "out")
    model.config.text_config.renormalize = True
    with pytest.raises(ValueError, match="renormalize"):
        to_deepseek_ocr(model, tmp_path / "out")
    with pytest.raises(ValueError, match="must be a VisionLanguageForConditionalGeneration"):
        to_deepseek_ocr(model.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
