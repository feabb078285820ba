"""Further Auto classes of a checkpoint, beside the one that transformers writes."""

from transformers.modeling_utils import PreTrainedModel


def add_auto_classes(model: PreTrainedModel, **classes: type[PreTrainedModel]) -> None:
    """Let the configuration of a model that is about to be saved name more classes of the model's own file.

    transformers writes the one Auto class that a model is registered for. With this, `AutoModel` also finds the model
    without its head in the same folder.

    Args:
        model: The model. Nothing happens if it is not registered for an Auto class, since its code is not saved then.
        **classes: Classes by the name of their Auto class.
    """
    if model._auto_class is None:
        return
    module = type(model).__module__.split(".")[-1]
    known = getattr(model.config, "auto_map", None) or {}
    model.config.auto_map = known | {name: f"{module}.{one.__name__}" for name, one in classes.items()}
