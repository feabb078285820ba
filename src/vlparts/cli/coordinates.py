"""The coordinate commands: `python -m vlparts coordinates convert | check | show`."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ..coordinates.checking import PROBLEMS, Problem, check_region, check_text
from ..coordinates.codec import decode
from ..coordinates.conversion import convert as convert_text
from ..coordinates.formats.registry import CoordinateFormat, get_format
from ..coordinates.io.annotations import region_from_dict
from ..coordinates.io.json_lines import json_line
from ..coordinates.regions import KINDS, Region
from ..coordinates.suspicion import CoordinateWarning
from .errors import exit_on_value_error
from .jsonl import (
    STANDARD,
    SizeFields,
    changed_line,
    line_with_error,
    map_texts,
    open_output,
    read_line_texts,
    read_rows,
    source_name,
)

__all__ = ["app"]

app = typer.Typer(help="Convert, check and draw coordinates in text.", no_args_is_help=True)
POLICIES = ("raise", "skip", "collect")
EXAMPLES = 3  # warnings that are printed in full

Source = Annotated[str, typer.Argument(help="JSON Lines file, or - for the standard input.")]
Target = Annotated[str, typer.Option("--output", "-o", help="JSON Lines file to write, or - for the standard output.")]
FormatName = Annotated[str, typer.Option("--format", help="Format of the coordinates.")]
Width = Annotated[str, typer.Option(help="Field with the width of the image.")]
Height = Annotated[str, typer.Option(help="Field with the height of the image.")]
ImageField = Annotated[str, typer.Option(help="Field with the path of the image.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the images; by default that of the input file.")]
MaxImagePixels = Annotated[
    int | None, typer.Option(help="Largest number of pixels of an image file; by default Pillow's limit.")
]
TextField = Annotated[str, typer.Option(help="Field with the text, or with messages that contain it.")]
SkipThinking = Annotated[bool, typer.Option("--skip-thinking", help="Leave out reasoning, such as in <think>.")]
RegionsField = Annotated[str, typer.Option(help="Field with regions.")]


def _sizes(
    source: str, width: str, height: str, image: str, root: Path | None, max_image_pixels: int | None
) -> SizeFields:
    folder = Path() if source == STANDARD else Path(source).parent
    return SizeFields(width, height, image, folder if root is None else root, max_image_pixels)


def _policy(value: str) -> str:
    if value not in POLICIES:
        raise ValueError(f"`--on-error` must be one of {', '.join(POLICIES)}, got {value!r}.")
    return value


def _check_output(source: str, target: str) -> None:
    """Raise ValueError if the output would overwrite the input."""
    if STANDARD not in (source, target) and Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"`--output` must be another file than the input, got {target}.")


@app.command()
def convert(
    source: Source,
    from_format: Annotated[str, typer.Option("--from", help="Format of the texts, such as qwen2_5_vl.")],
    to_format: Annotated[str, typer.Option("--to", help="Format to write, such as gemini.")],
    output: Target = STANDARD,
    text_field: TextField = "text",
    width_field: Width = "width",
    height_field: Height = "height",
    image_field: ImageField = "image",
    image_root: Root = None,
    max_image_pixels: MaxImagePixels = None,
    on_error: Annotated[
        str,
        typer.Option(help="If a line cannot be converted: raise, skip it, or collect (keep it with `convert_error`)."),
    ] = "raise",
    skip_thinking: SkipThinking = False,
) -> None:
    """Convert the coordinates in texts to another format; no other character of a line changes."""
    with exit_on_value_error():
        policy, source_format, target_format = _policy(on_error), get_format(from_format), get_format(to_format)
        _check_output(source, output)
        sizes = _sizes(source, width_field, height_field, image_field, image_root, max_image_pixels)
        counts: Counter[str] = Counter()
        suspicious: list[str] = []
        with open_output(output) as file:
            for number, line, row in read_line_texts(source):
                try:
                    _check_field(row, text_field)
                    change = partial(
                        convert_text,
                        source=source_format,
                        target=target_format,
                        image_size=sizes.size(row),
                        skip_thinking=skip_thinking,
                    )
                    changed, warned = _with_warnings(partial(changed_line, line, row, text_field, change))
                except ValueError as error:
                    if policy == "raise":
                        raise ValueError(f"{source_name(source)}, line {number}: {error}") from None
                    counts["failed"] += 1
                    if policy == "collect":
                        file.write(line_with_error(line, row, "convert_error", str(error)))
                    continue
                counts["converted"] += 1
                if policy != "skip":
                    suspicious += [f"{source_name(source)}, line {number}: {message}" for message in warned]
                file.write(changed)
    for message in suspicious[:EXAMPLES]:
        typer.echo(f"warning: {message}", err=True)
    if len(suspicious) > EXAMPLES:
        typer.echo(f"warning: {len(suspicious) - EXAMPLES} further texts look like coordinates.", err=True)
    action = "skipped" if policy == "skip" else "kept unchanged"
    failed = f", {counts['failed']} {action}" if counts["failed"] else ""
    typer.echo(f"{_count(counts['converted'], 'line')} converted{failed}.", err=True)


def _with_warnings(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a function, and the messages of the coordinate warnings that it issues."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CoordinateWarning)
        result = function()
    messages = [str(one.message) for one in caught if issubclass(one.category, CoordinateWarning)]
    for one in caught:
        if not issubclass(one.category, CoordinateWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return result, messages


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _check_field(row: dict[str, Any], field: str) -> None:
    if field not in row:
        raise ValueError(f"A line must have the field {field!r}, got {', '.join(row)}.")


def _region_fields(row: dict[str, Any], field: str) -> Iterator[Any]:
    """Yield the regions of a line as plain data: those of its field, or of a training record's messages."""
    if field in row:
        if not isinstance(row[field], list):
            raise ValueError(f"The field {field!r} must contain a list of regions, got {row[field]!r}.")
        yield from row[field]
        return
    if not isinstance(row.get("messages"), list):
        raise ValueError(f"A line must have the field {field!r} or messages, got {', '.join(row)}.")
    for message in row["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for block in content if isinstance(content, list) else [content]:
            if isinstance(block, dict) and not KINDS.keys().isdisjoint(block):
                yield block


def _texts(row: dict[str, Any], field: str) -> list[str]:
    """Return all texts of a field."""
    _check_field(row, field)
    texts: list[str] = []

    def keep(text: str) -> str:
        texts.append(text)
        return text

    map_texts(row[field], keep)
    return texts


def _checked(
    source: str,
    sizes: SizeFields,
    fmt: CoordinateFormat,
    regions: str,
    texts: str | None,
    most: float,
    skip_thinking: bool,
) -> Iterator[tuple[int, int, list[Problem]]]:
    """Yield line number, index in the line, and problems of each region or text."""
    for number, row in read_rows(source):
        try:
            size = sizes.size(row)
            if texts is not None:
                check = partial(check_text, image_size=size, format=fmt, skip_thinking=skip_thinking)
                items: Iterable[list[Problem]] = map(check, _texts(row, texts))
            else:
                items = (check_region(fields, size, fmt, most=most) for fields in _region_fields(row, regions))
            for index, found in enumerate(items):
                yield number, index, found
        except ValueError as error:
            raise ValueError(f"{source_name(source)}, line {number}: {error}") from None


@app.command()
def check(
    source: Source,
    format: FormatName = "openpangu",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="JSON Lines file for all problems, or - for the standard output."),
    ] = None,
    regions_field: RegionsField = "regions",
    text_field: Annotated[str | None, typer.Option(help="Check the texts of this field instead of regions.")] = None,
    width_field: Width = "width",
    height_field: Height = "height",
    image_field: ImageField = "image",
    image_root: Root = None,
    max_image_pixels: MaxImagePixels = None,
    most: Annotated[
        float, typer.Option(help="Maximum pixels that a coordinate may move when written and read.")
    ] = 1.0,
    examples: Annotated[int, typer.Option(help="Number of examples per kind of problem.")] = 3,
    skip_thinking: SkipThinking = False,
) -> None:
    """Report invalid regions, and regions that a format cannot write or moves; the exit code is 1 if there are any."""
    total, counts, shown = 0, Counter[str](), dict[str, list[str]]()
    with exit_on_value_error():
        fmt = get_format(format)
        if skip_thinking and text_field is None:
            raise ValueError("`--skip-thinking` needs `--text-field`, since regions have no reasoning.")
        _check_output(source, output or STANDARD)
        sizes = _sizes(source, width_field, height_field, image_field, image_root, max_image_pixels)
        with nullcontext() if output is None else open_output(output) as file:
            for number, index, found in _checked(source, sizes, fmt, regions_field, text_field, most, skip_thinking):
                total += 1
                for name, detail in found:
                    counts[name] += 1
                    if counts[name] <= examples:
                        shown.setdefault(name, []).append(f"line {number}, {index}: {detail}")
                    if file is not None:
                        file.write(json_line({"line": number, "index": index, "problem": name, "detail": detail}))
    checked = _count(total, "region" if text_field is None else "text")
    typer.echo(f"{checked} checked for {fmt.name}: {_count(counts.total(), 'problem')}.", err=output == STANDARD)
    for name in (name for name in PROBLEMS if counts[name]):
        typer.echo(f"{counts[name]} {name}: {PROBLEMS[name]}", err=output == STANDARD)
        for line in shown.get(name, []):
            typer.echo(f"  {line}", err=output == STANDARD)
    if counts:
        raise typer.Exit(1)


def _picture(
    row: dict[str, Any], sizes: SizeFields, fmt: CoordinateFormat, texts: str, regions: str
) -> dict[str, Any]:
    """Return the item of `show.box_grid` for a line: its first image, predicted and true regions."""
    paths, size = sizes.paths(row), sizes.size(row)
    has_truth = regions in row or (texts not in row and "messages" in row)
    if texts not in row and not has_truth:
        raise ValueError(f"A line must have the field {texts!r} or {regions!r}, got {', '.join(row)}.")
    predicted: list[Region] = []
    for text in _texts(row, texts) if texts in row else []:
        predicted += [region for region in decode(text, size, fmt, on_error="skip").regions if region.image == 0]
    truth = [region_from_dict(fields) for fields in (_region_fields(row, regions) if has_truth else ())]
    truth = [region for region in truth if region.image == 0]
    from ..parts.image_files import open_image  # imports torch, which the other commands do not need

    image = open_image(paths[0], max_image_pixels=sizes.max_image_pixels)
    expected = size if isinstance(size, tuple) else size[0]
    if image.size != expected:
        raise ValueError(
            f"Image {paths[0]} has {image.width} x {image.height} pixels after its EXIF orientation, but the line has "
            f"{expected[0]} x {expected[1]}; regions refer to the upright image."
        )
    item: dict[str, Any] = {"image": image, "title": paths[0].name}
    return item | ({"predicted": predicted} if texts in row else {}) | ({"truth": truth} if has_truth else {})


@app.command()
def show(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
    format: FormatName = "openpangu",
    text_field: TextField = "text",
    regions_field: RegionsField = "regions",
    width_field: Width = "width",
    height_field: Height = "height",
    image_field: ImageField = "image",
    image_root: Root = None,
    max_image_pixels: MaxImagePixels = None,
    limit: Annotated[int, typer.Option(help="Maximum number of lines to draw.")] = 12,
    columns: Annotated[int, typer.Option(help="Pictures per row.")] = 4,
) -> None:
    """Draw the regions of texts with solid lines, and the true regions of the same lines with dashed lines."""
    with exit_on_value_error():
        try:
            from ..show import box_grid

            fmt = get_format(format)
            if not output.parent.is_dir():
                raise ValueError(f"The output must be in an existing folder, got {output}.")
            sizes = _sizes(source, width_field, height_field, image_field, image_root, max_image_pixels)
            items = []
            for number, row in islice(read_rows(source), limit):
                try:
                    items.append(_picture(row, sizes, fmt, text_field, regions_field))
                except ValueError as error:
                    raise ValueError(f"{source_name(source)}, line {number}: {error}") from None
            box_grid(items, output, columns)
        except ImportError as error:
            raise ValueError(str(error)) from None
    typer.echo(f"{_count(len(items), 'picture')} in {output}.", err=True)
