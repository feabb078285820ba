"""One table registers every part, and the Auto classes then find it."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import transformers
from tests.tiny import SIZES, navit, navit_config, vision_config
from transformers import AutoConfig, BertConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import vlparts
from vlparts import (
    DeepEncoderConfig,
    DeepEncoderModel,
    FusedVisionConfig,
    FusedVisionModel,
    MoGEConfig,
    MoGEForCausalLM,
    NaViTDualEncoder,
    NaViTForImageClassification,
    PanguEmbeddedConfig,
    PanguEmbeddedForCausalLM,
    WindowFreeViTConfig,
    WindowFreeViTModel,
)
from vlparts.parts.part_configs import PART_CONFIGS
from vlparts.parts.part_models import PART_MODELS
from vlparts.registration import PARTS, Part

SOURCE = Path(vlparts.__file__).parent
each_part = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.config.model_type)


def registered_model(auto_name: str, config: type) -> object:
    """Return what the named Auto class builds for the config class."""
    return getattr(transformers, auto_name)._model_mapping[config]


def calls_of(path: Path) -> set[str]:
    """Return the dotted names that the file calls, for example `AutoModel.register`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def registers(call: str) -> bool:
    """Tell whether the called name changes the Auto classes."""
    owner, _, method = call.rpartition(".")
    if method == "register_for_auto_class":
        return True
    return method == "register" and owner.rpartition(".")[2].startswith(("Auto", "CONFIG_MAPPING", "MODEL_"))


@each_part
def test_forward_tells_tools_its_main_input_and_its_options(part: Part) -> None:
    for model in part.models.values():
        parameters = inspect.signature(model.forward).parameters
        assert list(parameters)[1] == model.main_input_name
        options, *_ = parameters["kwargs"].annotation.__args__
        assert {"output_attentions", "output_hidden_states"} <= set(options.__annotations__)


def test_every_part_has_a_row() -> None:
    files = {path.stem for path in (SOURCE / "parts").glob("configuration_*.py")}
    rows = {part.config.__module__.rpartition(".")[2] for part in PARTS}
    assert files == rows


@each_part
def test_config_resolves(part: Part) -> None:
    assert type(AutoConfig.for_model(part.config.model_type)) is part.config


@each_part
def test_models_resolve(part: Part) -> None:
    assert part.models
    for auto_name, model in part.models.items():
        assert registered_model(auto_name, part.config) is model
        assert model.config_class is part.config


@each_part
def test_processors_resolve(part: Part) -> None:
    if part.image_processor is not None:
        found = IMAGE_PROCESSOR_MAPPING[part.config]
        assert part.image_processor in (found.values() if isinstance(found, dict) else [found])
    if part.processor is not None:
        assert PROCESSOR_MAPPING[part.config] is part.processor


@each_part
def test_a_saved_part_carries_its_code(part: Part) -> None:
    """Without an auto class, `save_pretrained` writes an auto_map that points at files it did not copy."""
    classes = [part.config, *part.models.values(), part.image_processor, part.processor]
    without = [cls.__name__ for cls in classes if cls is not None and cls._auto_class is None]
    assert without == []


def small_models() -> list[PreTrainedModel]:
    """A model of every class that the table names."""
    dual = NaViTDualEncoder.from_towers(navit_config(), BertConfig(**SIZES, vocab_size=20))
    text = PanguEmbeddedForCausalLM(PanguEmbeddedConfig.from_preset("tiny"))
    composed = vlparts.compose(vision=navit_config(), text=text)
    decoders = [text, text.model, mixture := MoGEForCausalLM(MoGEConfig.from_preset("tiny")), mixture.model]
    windows = WindowFreeViTModel(WindowFreeViTConfig.from_preset("hybrid_tiny"))
    classifier = NaViTForImageClassification(navit_config(num_labels=2))
    views = DeepEncoderModel(DeepEncoderConfig.from_preset("deepencoder_tiny"))
    two = FusedVisionModel(FusedVisionConfig(general_config=vision_config("clip")))
    return [dual, composed, composed.model, *decoders, windows, views, two, classifier, navit()]


def test_saved_folders_name_the_class_of_every_auto_class(tmp_path: Path) -> None:
    rows = {(name, model.__name__) for part in PARTS for name, model in part.models.items()}
    found = set()
    for model in small_models():
        model.save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        wanted = {row for row in rows if row[1] == type(model).__name__}
        assert wanted <= {(name, path.rpartition(".")[2]) for name, path in auto_map.items()}
        found |= wanted
    assert found == rows


def test_the_tables_of_composed_models_agree() -> None:
    """Composed models find parts in tables that travel with a checkpoint."""
    registered = {part.config.model_type: part for part in PARTS}
    assert PART_CONFIGS.keys() == PART_MODELS.keys()
    for model_type, model in PART_MODELS.items():
        assert PART_CONFIGS[model_type] is registered[model_type].config
        assert model is registered[model_type].models["AutoModel"]


def test_only_registration_changes_the_auto_classes() -> None:
    callers = {path.name for path in SOURCE.rglob("*.py") if any(map(registers, calls_of(path)))}
    assert callers == {"registration.py"}
