"""What SGLang's transformers backend (0.5.23) asks of a saved composed model, without SGLang.

The backend builds the model without its head from `auto_map`, replaces linear layers, RMS normalizations and token
embeddings, and runs all requests of a step as one row with an attention of its own that keeps their keys and values.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.parts import test_vlm, test_vlm_views
from tests.parts.openpangu_shaped import openpangu
from tests.tiny import order_one, picture, text_config, tokenizer
from vlparts import MoGEConfig, PanguEmbeddedConfig, WindowFreeViTConfig, compose, compose_processor

NEW_TOKENS = 5
IMAGES = [[picture(20, 9), picture(5, 13)], [], [picture(11, 11)]]


class Linear(nn.Module):
    """A layer without `in_features`, `out_features` and `bias=None`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(layer.weight))
        self.register_parameter("bias", None if layer.bias is None else nn.Parameter(torch.empty(len(self.weight))))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


class Norm(nn.Module):
    """Takes two axes, as kernels do."""

    def __init__(self, norm: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.eps = next(
            value for name in ("eps", "variance_epsilon") if (value := getattr(norm, name, None)) is not None
        )
        assert torch.all(type(norm)(1).weight == 1)  # zeros would be taken for Gemma's, which adds 1 to the weight
        self.weight = nn.Parameter(torch.empty(norm.weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        return (rows * self.weight).view_as(x)


class Requests:
    """The requests of a step: the tokens of each, and keys and values of earlier steps by layer."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.kept = lengths, dict[int, list[tuple[Tensor, Tensor]]]()


class Attention:
    """One layer's attention over rows `(tokens, heads * channels)` of all requests."""

    def __init__(self, layer: int, heads: int, kv_heads: int) -> None:
        self.layer, self.heads, self.kv_heads, self.scaling = layer, heads, kv_heads, 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, forward_batch: Requests) -> Tensor:
        kept = forward_batch.kept.setdefault(self.layer, [(key[:0], value[:0])] * len(forward_batch.lengths))
        outputs = []
        rows = zip(*(x.split(forward_batch.lengths) for x in (query, key, value)), strict=True)
        for request, (q, k, v) in enumerate(rows):
            k, v = kept[request] = tuple(torch.cat(pair) for pair in zip(kept[request], (k, v), strict=True))
            heads = (x.unflatten(-1, (n, -1)).transpose(0, 1) for x, n in zip((q, k, v), self.counts, strict=True))
            mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            attended = nn.functional.scaled_dot_product_attention(
                *heads, attn_mask=mask, scale=self.scaling, enable_gqa=True
            )
            outputs.append(attended.transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    attention_instances: dict[int, Attention],
    forward_batch: Requests,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = attention_instances[module.layer_idx]
    layer.scaling = scaling
    rows = (x.transpose(1, 2).reshape(x.shape[2], -1) for x in (query, key, value))
    return layer.forward(*rows, forward_batch), None


@pytest.fixture
def backend() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS["sglang"] = attend
    yield
    del ALL_ATTENTION_FUNCTIONS["sglang"]


class Server:
    """A model that is loaded as SGLang loads it."""

    def __init__(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.text = config.get_text_config()
        self.text._attn_implementation = "sglang"
        self.model = AutoModel.from_config(config).eval()  # parameters without values, buffers as they are made
        self.replace(self.model)
        width = self.model.get_input_embeddings().embedding_dim
        self.model.set_input_embeddings(nn.Embedding(self.text.vocab_size, width))
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.full_like(parameter, torch.nan)))
        weights = load_file(folder / "model.safetensors")
        self.head = weights.pop("lm_head.weight", None)
        missing, unexpected = self.model.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in weights.items()}, strict=False
        )
        assert (missing, unexpected) == ([], [])
        if self.head is None:
            assert self.text.tie_word_embeddings
            self.head = self.model.get_input_embeddings().weight
        heads = self.text.num_attention_heads, self.text.num_key_value_heads
        self.layers = {index: Attention(index, *heads) for index in range(self.text.num_hidden_layers)}

    def replace(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear(child))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Norm(child, self.text.hidden_size))
            else:
                self.replace(child)

    def step(self, ids: list[Tensor], starts: list[int], requests: Requests, **media: Any) -> Tensor:
        """Return the next token of each request."""
        requests.lengths = [len(one) for one in ids]
        positions = [start + torch.arange(len(one)) for start, one in zip(starts, ids, strict=True)]
        with torch.no_grad():
            hidden = self.model(
                input_ids=torch.cat(ids)[None],
                inputs_embeds=None,
                use_cache=False,
                position_ids=torch.cat(positions)[None],
                return_dict=False,
                forward_batch=requests,
                attention_instances=self.layers,
                **media,
            )[0][0]
        ends = torch.tensor(requests.lengths).cumsum(0) - 1
        return (hidden[ends] @ self.head.T).argmax(-1)

    def generate(self, ids: list[Tensor], media: dict[str, Tensor]) -> Tensor:
        """Return `NEW_TOKENS` tokens of each request, `(requests, new)`."""
        requests, starts = Requests([]), [0] * len(ids)
        new = []
        for step in range(NEW_TOKENS):
            chosen = self.step(ids, starts, requests, **(media if step == 0 else {}))
            starts = [start + len(one) for start, one in zip(starts, ids, strict=True)]
            ids = list(chosen.split(1))
            new.append(chosen)
        return torch.stack(new, 1)


def with_text(text: Any) -> tuple[Any, Any]:
    words = tokenizer()
    encoder = WindowFreeViTConfig.from_preset("hybrid_tiny", feature_layers=[-1])
    model = compose(encoder, text(words), "patch_merger")
    return order_one(model).eval(), compose_processor(model, words)


MODELS = {
    "navit": test_vlm.composed,
    "clip": lambda: test_vlm.composed("clip", "llama"),
    "windowed encoder and Pangu": lambda: with_text(
        lambda words: PanguEmbeddedConfig.from_preset("tiny", vocab_size=len(words))
    ),
    "deepencoder": lambda: test_vlm_views.composed("qwen3"),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", MODELS)
def test_requests_of_one_row_are_answered_as_by_generate(name: str, tmp_path: Path) -> None:
    model, processor = MODELS[name]()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    chats = [processor.apply_chat_template(test_vlm.chat(group), add_generation_prompt=True) for group in IMAGES]
    alone = [
        processor(text=text, images=group or None, return_tensors="pt")
        for text, group in zip(chats, IMAGES, strict=True)
    ]
    expected = [
        model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False)[0, one["input_ids"].shape[1] :]
        for one in alone
    ]
    names = {name for one in alone for name in one} - {"input_ids", "attention_mask", "mm_token_type_ids"}
    media = {name: torch.cat([one[name] for one in alone if name in one]) for name in names}
    found = Server(tmp_path).generate([one["input_ids"][0] for one in alone], media)
    assert torch.equal(found, torch.stack(expected))
    assert len({tuple(row.tolist()) for row in found}) > 1


@pytest.mark.usefixtures("backend")
def test_stacked_experts_which_it_would_leave_without_values_are_refused(tmp_path: Path) -> None:
    model, _ = with_text(lambda words: MoGEConfig.from_preset("tiny", vocab_size=len(words)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would skip the stacked weights"):
        Server(tmp_path)


@pytest.mark.usefixtures("backend")
def test_the_vision_encoder_keeps_its_attention_and_layers_their_index(tmp_path: Path) -> None:
    model, _ = test_vlm.composed()
    model.save_pretrained(tmp_path)
    server = Server(tmp_path)
    assert server.model.vision_tower.config._attn_implementation != "sglang"
    assert server.model.language_model.config._attn_implementation == "sglang"
    indices = [module.layer_idx for module in server.model.language_model.modules() if hasattr(module, "layer_idx")]
    assert set(indices) == set(server.layers)


def test_classes_and_fields_that_it_reads(tmp_path: Path) -> None:
    model, processor = test_vlm.composed()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map["AutoModel"] == "modeling_vlm.VisionLanguageModel"
    assert config.auto_map["AutoConfig"] == "configuration_vlm.VisionLanguageConfig"
    assert AutoModel.from_pretrained(tmp_path)._supports_attention_backend
    assert config.get_text_config() is not config  # it is taken for multimodal by this
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == config.image_token_id


def test_features_of_an_item_are_one_tensor_by_name() -> None:
    """Each item is one image; of a tuple only the first tensor is used."""
    model, processor = test_vlm.composed()
    encode = model.model.get_image_features
    assert "pixel_values" in inspect.signature(encode).parameters
    image = processor.image_processor(IMAGES[2], return_tensors="pt")
    features = encode(pixel_values=image["pixel_values"], image_grid_thw=image["image_grid_thw"]).pooler_output
    assert isinstance(features, tuple)
    assert len(features) == 1
    assert features[0].shape == (int(image["image_grid_thw"].prod()), model.config.text_config.hidden_size)


def test_three_axis_positions_are_known_to_it_by_the_section() -> None:
    """It then asks for the positions of a model type that it knows, and stops with an error for ours."""
    assert "mrope_section" in openpangu()[0].config.text_config.rope_scaling
    assert "mrope_section" not in (text_config("qwen3", tokenizer()).rope_scaling or {})
