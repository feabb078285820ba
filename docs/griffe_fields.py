"""Griffe extension: signatures of classes whose attributes are the arguments of their constructor.

Strict configurations, pydantic models and image processors have no such `__init__` in their source, so Griffe reports
every argument in their docstring as unknown.
"""

import re
from typing import Any

import griffe

DOCUMENTED = re.compile(r"^    (\*{0,2}\w+): ", re.MULTILINE)


class FieldSignatures(griffe.Extension):
    """Adds an `__init__` with the documented attributes as keyword arguments."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the method where the source has none, or one that takes only `**kwargs`."""
        if cls.docstring is None or any(d.callable_path == "dataclasses.dataclass" for d in cls.decorators):
            return  # Griffe knows dataclasses
        init = cls.members.get("__init__")
        if init is not None and [parameter.name for parameter in init.parameters] != ["self", "kwargs"]:
            return
        names = DOCUMENTED.findall(cls.docstring.value.partition("Args:\n")[2].partition("\n\n")[0])
        fields = [cls.attributes[name] for name in names if name in cls.attributes]
        if not fields:
            return
        parameters = griffe.Parameters(griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword))
        types = _types(cls)
        for field in fields:
            annotation = field.annotation or types.get(field.name)
            kind = griffe.ParameterKind.keyword_only
            parameters.add(griffe.Parameter(field.name, annotation=annotation, kind=kind, default=field.value))
        if "**kwargs" in names:
            parameters.add(griffe.Parameter("kwargs", annotation="Any", kind=griffe.ParameterKind.var_keyword))
        cls.set_member("__init__", griffe.Function("__init__", parameters=parameters, parent=cls))


def _types(cls: griffe.Class) -> dict[str, Any]:
    """Annotations of the TypedDict that an image processor names in `valid_kwargs`."""
    own: dict[str, Any] = {"do_rescale": "bool", "do_normalize": "bool", "size": "dict[str, int]"}  # transformers' own
    kwargs = cls.attributes.get("valid_kwargs")
    table = cls.parent.members.get(str(kwargs.value)) if kwargs and cls.parent else None
    return own | ({name: one.annotation for name, one in table.attributes.items()} if table else {})
