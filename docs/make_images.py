"""Draw the pictures of the pages: `python docs/make_images.py [name ...]` writes `docs/images/<name>.png`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from vlparts import (
    NaViTConfig,
    NaViTImageProcessor,
    NaViTModel,
    RouterStatistics,
    VisionTokenReducer,
    WindowFreeViTConfig,
    WindowFreeViTModel,
    show,
)
from vlparts.coordinates import FORMATS, Frame, Region, SmartResize, decode, encode
from vlparts.parts.moe_options import RoutingOptions
from vlparts.parts.moe_routing import route
from vlparts.parts.ops_attention import packed_attention
from vlparts.parts.packed_index import get_position_ids
from vlparts.parts.pos_embed import PositionEmbedding
from vlparts.parts.redundant_patches import find_redundant, get_blocks
from vlparts.training.bins import plan_packing
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import PackedImageDataset
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.sampler import PackedImageSampler
from vlparts.training.images.token_drop import BetaDrop, ResolutionDrop, ScheduledDrop

FOLDER = Path(__file__).parent / "images"


def coordinates(path: Path) -> None:
    """Draw regions on a photograph beside their text in six formats."""
    photo = load_sample_image("china.jpg")
    size = (photo.shape[1], photo.shape[0])
    pavilion, tree = Region.box(64, 30, 352, 427, "pavilion"), Region.box(546, 135, 640, 427, "tree")
    finial = Region.point(205, 32, "finial")
    roof = Region.polygon([(96, 128), (190, 68), (220, 68), (320, 120), (300, 134), (205, 120)], "roof")
    texts = {
        "openpangu": [pavilion, tree, finial],
        "qwen2_5_vl": [pavilion],
        "gemini": [pavilion],
        "paligemma": [pavilion, tree],
        "molmo": [finial],
        "florence2": [roof],
    }
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    read: dict[str | None, Region] = {}
    right.axis("off")
    height = 0.99
    for name, regions in texts.items():
        text = encode(regions, size, name)
        read |= {region.label: region for region in decode(text, size, name).regions}
        shown = text.replace("```json\n", "").replace("\n```", "").replace("\t", "  ")
        shown = shown.replace("<loc_343>", "\n<loc_343>")  # too long for a line
        right.text(0, height, name, weight="bold", fontsize=9, va="top", transform=right.transAxes)
        right.text(0, height - 0.045, shown, family="monospace", fontsize=8, va="top", transform=right.transAxes)
        height -= 0.075 + 0.043 * (1 + shown.count("\n"))
    show.boxes(photo, list(read.values()), ax=left)
    figure.savefig(path, dpi=100)


def _draw_frame(ax: Axes, photo: np.ndarray, frame: Frame, box: Region, title: str) -> None:
    """Draw the image that a model sees, with a box and its coordinates."""
    canvas = np.full((frame.size[1], frame.size[0], 3), 190, dtype=np.uint8)
    (left, top), (right, bottom) = frame.to_frame([(0, 0), frame.image_size]).round().astype(int).tolist()
    part = Image.fromarray(photo).resize((right - left, bottom - top))
    canvas[max(top, 0) : bottom, max(left, 0) : right] = np.asarray(part)[max(-top, 0) :, max(-left, 0) :][
        : canvas.shape[0], : canvas.shape[1]
    ]
    points = np.clip(frame.to_frame(box.points), 0, frame.size)
    show.boxes(canvas, [Region.box(*points.ravel().tolist(), box.label)], ax=ax)
    pixels = ", ".join(f"{value:.0f}" for value in points.ravel())
    shares = ", ".join(f"{value:.0f}" for value in (points / frame.size * 1000).ravel())
    ax.set(xlim=(-6, 655), ylim=(690, -12))
    ax.set_title(f"{title}, {frame.size[0]} x {frame.size[1]}", fontsize=10, loc="left")
    ax.text(0, frame.size[1] + 12, f"pixels  {pixels}\n/ 1000  {shares}", family="monospace", fontsize=9, va="top")


def coordinate_frames(path: Path) -> None:
    """Draw one box in the frames that models see, with its coordinates."""
    photo = load_sample_image("china.jpg")
    size = (photo.shape[1], photo.shape[0])
    box = Region.box(64, 30, 352, 427, "pavilion")
    frames = {
        "original": Frame.original(size),
        "resized (Qwen2.5-VL with 256 tokens)": SmartResize(28, max_pixels=256 * 28 * 28)(size),
        "padded square (LLaVA)": FORMATS["llava"].frame(size),
    }
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for ax, (title, frame) in zip(figure.subplots(1, 3), frames.items(), strict=True):
        _draw_frame(ax, photo, frame, box, title)
    figure.savefig(path, dpi=90)


def coordinate_show(path: Path) -> None:
    """Draw the output of the command `coordinates show` for one answer."""
    photo = load_sample_image("china.jpg")
    answer = (
        "The <ref>pavilion</ref><box>(100,70),(550,999)</box> stands left of a "
        "<ref>tree</ref><box>(853,316),(999,999)</box>."
    )
    regions = decode(answer, (photo.shape[1], photo.shape[0]), "qwen_vl").regions
    show.box_grid([{"image": photo, "predicted": regions, "title": "china.jpg"}], path)


def packing_plan(path: Path) -> None:
    """Draw a packing plan of images of mixed sizes."""
    sides = np.random.default_rng(0).integers(4, 33, (30, 2))
    lengths = [int(rows * columns) for rows, columns in sides]
    show.packing_plan(plan_packing(lengths, capacity=1024), lengths, 1024, path=path)


def navit(path: Path) -> None:
    """Draw a photograph and a crop, each at its own resolution, cut into patches."""
    photo = load_sample_image("flower.jpg")
    images = [photo[:416], photo[100:164, 80:400]]
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots(1, 2, width_ratios=[640, 320])
    for ax, image in zip(axes, images, strict=True):
        _, rows, columns = NaViTImageProcessor(patch_size=32).get_grid_thw(*image.shape[:2])
        ax.imshow(image)
        ax.set_xticks(np.arange(columns + 1) * 32 - 0.5, [])
        ax.set_yticks(np.arange(rows + 1) * 32 - 0.5, [])
        ax.grid(color="white", linewidth=0.8)
        ax.tick_params(length=0)
        ax.set_title(f"{rows} x {columns} = {rows * columns} patches", fontsize=10)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def token_reduction(path: Path) -> None:
    """Draw what each method leaves of the patches of a photograph, and what an encoder merges layer by layer."""
    photo, side = load_sample_image("flower.jpg")[:416, :640], 16
    grid = (photo.shape[0] // side, photo.shape[1] // side)
    blocks = get_blocks(photo.transpose(2, 0, 1), side)
    tokens = torch.tensor(blocks, dtype=torch.float32).flatten(0, 1)
    tokens = tokens - tokens.mean(0)
    shown = {}
    for method in ("average_pool", "merge_similar", "prune_by_norm", "prune_by_attention", "prune_diverse"):
        shown[method] = VisionTokenReducer(method, 0.25)(tokens, [grid]).assignment
    page = np.full((416, 640, 3), 255, dtype=np.uint8)
    page[96:224, 64:400] = photo[96:224, 64:400]
    keep, source = find_redundant(get_blocks(page.transpose(2, 0, 1), side))
    shown = {title: assignment.numpy() for title, assignment in shown.items()}
    figure = show.kept_tokens(photo, grid, shown, columns=3)
    ax = figure.axes[5]
    ax.set_visible(True)
    pale = np.where(keep.repeat(side, 0).repeat(side, 1)[..., None], page, 225)
    ax.imshow(pale.astype(np.uint8))
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"not redundant: {int(keep.sum())} of {keep.size:,}", fontsize=9, loc="left")
    figure.savefig(path, dpi=100)


def token_merging(path: Path) -> None:
    """Draw which patches of a photograph an encoder holds as one token, layer by layer."""
    photo = load_sample_image("flower.jpg")[:416, :640]
    torch.manual_seed(0)
    config = NaViTConfig.from_preset("tiny", merge_layers=[0, 1, 2], merge_ratio=0.5, position_kind="none")
    inputs = NaViTImageProcessor(patch_size=16)(Image.fromarray(photo), return_tensors="pt")
    with torch.no_grad():
        held = NaViTModel(config).eval()(**inputs).merge_assignments
    grid = inputs["image_grid_thw"][0, 1:].tolist()
    shown = {f"after layer {layer}": assignment.numpy() for layer, assignment in enumerate(held)}
    show.kept_tokens(photo, grid, shown, columns=3).savefig(path, dpi=100)


def positions(path: Path) -> None:
    """Draw the similarity of the position vector of one patch to all others, in a wide image."""
    torch.manual_seed(0)
    rows, columns, patch = 10, 24, (3, 7)
    position_ids = get_position_ids(torch.tensor([[1, rows, columns]]))
    grid_sizes = torch.tensor([[rows, columns]]).expand_as(position_ids)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for line, (kind, combination) in zip(axes, [("sinusoidal", "stack"), ("fourier", "joint")], strict=True):
        for ax, coordinates in zip(line, ["absolute", "fractional", "fractional_aspect"], strict=True):
            embedding = PositionEmbedding(512, 32, kind=kind, coordinates=coordinates, combination=combination)
            with torch.no_grad():
                vectors = torch.nn.functional.normalize(embedding(position_ids, grid_sizes), dim=-1)
            similarity = (vectors @ vectors[patch[0] * columns + patch[1]]).view(rows, columns)
            image = ax.imshow(similarity.numpy(), cmap="viridis", vmin=0, vmax=1)
            ax.plot(patch[1], patch[0], "+", color="black")
            ax.set(title=f"{kind}, {coordinates}", xticks=[], yticks=[])
            ax.title.set_fontsize(9)
    figure.colorbar(image, ax=axes, label="cosine similarity to +")
    figure.savefig(path, dpi=100)


def sampling(path: Path) -> None:
    """Draw the eight resolution distributions, and the drop rates of the policies."""
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(11, 5.8), layout="constrained")
    axes = figure.subplots(3, 4)
    distributions = [("uniform", 0.0), *(("truncated_normal", mean) for mean in (-0.5, 0.0, 0.5))]
    for row, quantity, colour in zip(axes, ("side", "area"), ("#4292c6", "#9ecae1"), strict=False):
        for ax, (distribution, mean) in zip(row, distributions, strict=True):
            sampler = ResolutionSampler(64, 384, quantity, distribution, mean)
            ax.hist([sampler.sample(rng) for _ in range(8000)], 32, range=(64, 384), color=colour, density=True)
            name = "uniform" if distribution == "uniform" else f"normal, mean {mean:g}"
            ax.set(title=f"{quantity}, {name}", xlabel="resolution in pixels", xticks=[64, 224, 384], ylim=(0, 0.007))
    for ax, mean in zip(axes[2], (0.25, 0.5), strict=False):
        rates = [BetaDrop(mean, 0.7).rate(196, 0, rng) for _ in range(8000)]
        ax.hist(rates, 40, range=(0, 1), color="#fd8d3c", density=True)
        ax.set(title=f"BetaDrop({mean}, 0.7)", xlabel="drop rate", xlim=(0, 1))
    lengths = rng.integers(16, 577, 500)
    by_length = ResolutionDrop(0.25, 0.75, 16, 576)
    axes[2, 2].scatter(lengths, [by_length.rate(int(n), 0, rng) for n in lengths], 2, color="#d94801")
    axes[2, 2].set(title="ResolutionDrop(0.25, 0.75, 16, 576)", xlabel="patches", ylim=(0, 1))
    seen = np.linspace(0, 1, 100)
    for timescale, style in ((-0.1, "-"), (0.1, ":")):
        scheduled = ScheduledDrop(0.2, 0.8, 0.5, timescale)
        label = "decreasing" if timescale < 0 else "increasing"
        axes[2, 3].plot(seen, [scheduled.mean_rate(n) for n in seen], style, color="#d94801", label=label)
    axes[2, 3].legend(fontsize=7, handlelength=1.5, frameon=False, loc="center left")
    axes[2, 3].set(title="ScheduledDrop(0.2, 0.8, 0.5 N, ±0.1 N)", xlabel="images seen, of N", ylim=(0, 1))
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
        ax.title.set_fontsize(8)
        ax.xaxis.label.set_fontsize(8)
    for ax in (*axes[:2].flat, *axes[2, :2]):
        ax.set_yticks([])
    for ax in axes[2, 2:]:
        ax.set_ylabel("drop rate", fontsize=8)
    figure.savefig(path, dpi=90)


def image_packing(path: Path) -> None:
    """Draw the images of a pack at their sampled sizes without dropped patches, above the packed sequence."""
    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    images = [china, flower, china[150:427, :320], flower[60:400, 150:500]]
    sampler = PackedImageSampler(
        [image.shape[:2] for image in images],
        patch_size=16,
        capacity=256,
        resolution=ResolutionSampler(128, 256),
        token_drop=BetaDrop(0.55, 0.8),
        carry_over=False,
        seed=1,
    )
    pack = max(sampler, key=len)
    batch = PackedImageCollator(256, len(pack))(PackedImageDataset(images, NaViTImageProcessor(patch_size=16))[pack])
    patches = batch["pixel_values"].view(-1, 3, 16, 16).permute(0, 2, 3, 1).numpy() * 0.5 + 0.5
    bounds, grids = batch["cu_seqlens"].tolist(), batch["image_grid_thw"][:, 1:].tolist()
    colours = ["#b84a00", "#0067a5", "#3a7d34", "#7a4fa3"]

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 1.5])
    for image, ax in enumerate(top.subplots(1, len(pack), squeeze=False)[0]):
        rows, columns = grids[image]
        canvas = np.full((rows, columns, 16, 16, 3), 0.9)
        own = slice(*bounds[image : image + 2])
        canvas[tuple(batch["position_ids"][own].T.numpy())] = patches[own]
        ax.imshow(canvas.swapaxes(1, 2).reshape(rows * 16, columns * 16, 3), extent=(0, columns, rows, 0))
        ax.set(xlim=(-0.2, 17), ylim=(11.2, -0.2))
        title = f"{rows} x {columns} patches, {pack[image].kept} stay"
        ax.set_title(title, fontsize=9, color=colours[image], loc="left")
        ax.axis("off")
    ax = bottom.subplots()
    for line in range(4):
        strip = patches[64 * line : 64 * line + 64].swapaxes(0, 1).reshape(16, 64 * 16, 3)
        ax.imshow(strip, extent=(0, 64, 1.6 * line + 1, 1.6 * line), aspect="auto")
    for image, colour in enumerate(colours[: len(pack)]):
        for line in range(4):
            start, end = (min(max(bound - 64 * line, 0), 64) for bound in bounds[image : image + 2])
            ax.plot([start, end], [1.6 * line + 1.15] * 2, color=colour, linewidth=3, solid_capstyle="butt")
    ax.set(xlim=(0, 64), ylim=(6.1, -0.1))
    ax.axis("off")
    figure.savefig(path, dpi=90)


def attention(path: Path) -> None:
    """Draw the attention weights of three packed segments, full and causal."""
    cu_seqlens = torch.tensor([0, 5, 7, 14], dtype=torch.int32)
    figure = Figure(figsize=(8, 4.2))
    for ax, causal in zip(figure.subplots(1, 2), (False, True), strict=True):
        tokens = torch.eye(14).unsqueeze(1)
        # Equal scores and one-hot values: the output is the weight of each key.
        weights = packed_attention(torch.zeros_like(tokens), tokens, tokens, cu_seqlens, causal=causal)[:, 0]
        ax.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=0.6)
        for edge in cu_seqlens[1:-1].tolist():
            ax.axhline(edge - 0.5, color="grey", linewidth=0.8)
            ax.axvline(edge - 0.5, color="grey", linewidth=0.8)
        ax.set(title="causal" if causal else "full", xlabel="key", ylabel="query", xticks=[], yticks=[])
    figure.savefig(path, dpi=90, bbox_inches="tight")


GREY, BLUE, ORANGE, GREEN = "#dddddd", "#9ecae1", "#fdd0a2", "#a1d99b"


def _flow(ax: Axes, y: float, boxes: list[tuple[float, str, str]], labels: list[str]) -> None:
    """Draw boxes `(x, text, colour)` in a row, and an arrow with a label from each to the next."""
    edges = []
    for x, text, colour in boxes:
        shape = {"boxstyle": "round,pad=0.6", "fc": colour}
        box = ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=shape)
        ax.figure.draw_without_rendering()
        edges.append(ax.transData.inverted().transform(box.get_bbox_patch().get_window_extent())[:, 0])
    for (_, start), (end, _), label in zip(edges[:-1], edges[1:], labels, strict=True):
        ax.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "->", "shrinkA": 3, "shrinkB": 3})
        place = ((start + end) / 2, y)
        ax.annotate(label, place, (0, 5), textcoords="offset points", ha="center", fontsize=7, color="#444444")


def _flow_axes(height: float, rows: float) -> tuple[Figure, Axes]:
    """Empty axes on which the left edge is 0, the right edge 10 and the top edge `rows`."""
    figure = Figure(figsize=(8, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 10), ylim=(0, rows))
    ax.axis("off")
    return figure, ax


def vlm(path: Path) -> None:
    """Draw the data flow of a composed model."""
    figure, ax = _flow_axes(1.5, 1.5)
    stages = [
        (0.65, "images\nof any size", GREY),
        (3.0, "vision tower\nNaViT, Siglip2, CLIP, ...", BLUE),
        (5.6, "projector\nlinear, mlp2_gelu, ...", ORANGE),
        (7.9, "text model\nQwen3, Llama, ...", GREEN),
        (9.5, "answer", GREY),
    ]
    _flow(ax, 1.0, stages, ["patches,\npacked", "features\n(L, D)", "one per\nplaceholder", ""])
    ax.text(7.9, 0.2, "text with <image> placeholders", ha="center", va="center", fontsize=8)
    ax.annotate("", (7.9, 0.72), (7.9, 0.32), arrowprops={"arrowstyle": "->"})
    figure.savefig(path, dpi=120)


def published(path: Path) -> None:
    """Draw which function reads which published model, and the resulting part."""
    figure, ax = _flow_axes(3.6, 6)
    rows = [
        ("openPangu-VL", "model_from_openpangu_vl", "window encoder + mergers + text model", BLUE),
        ("DeepSeek-OCR", "model_from_deepseek_ocr", "DeepEncoder + decoder with experts", BLUE),
        ("POINTS1.5, POINTS-Reader", "model_from_points15", "Qwen2-VL's encoder + text model", BLUE),
        ("Qwen2-VL to Qwen3-VL", "encoder_from_qwen_vl", "packed vision encoder", BLUE),
        ("Pangu Pro MoE", "model_from_pangu_pro_moe", "decoder with grouped experts", GREEN),
        ("ViT, Siglip2, NaFlexVit", "from_vit", "NaViT for images of any size", BLUE),
    ]
    for y, (source, function, result, colour) in zip((5.5, 4.5, 3.5, 2.5, 1.5, 0.5), rows, strict=True):
        _flow(ax, y, [(1.5, source, GREY), (7.7, result, colour)], [function])
    figure.savefig(path, dpi=120)


def serving(path: Path) -> None:
    """Draw how a model is saved with its code and loaded by transformers alone."""
    figure, ax = _flow_axes(1.6, 1.6)
    files = (
        "my-vlm/\n  model.safetensors\n  config.json, tokenizer.json, ...\n  modeling_vlm.py, ops_attention.py, ..."
    )
    boxes = [
        (0.9, "model and\nprocessor", BLUE),
        (3.95, files, GREY),
        (8.45, "transformers alone:\ngenerate, pipeline", GREEN),
    ]
    _flow(ax, 1.05, boxes, ["save_pretrained", "from_pretrained(...,\ntrust_remote_code=True)"])
    ax.text(8.45, 0.2, "with vlparts: fast kernels", ha="center", va="center", fontsize=8)
    ax.annotate("", (8.45, 0.75), (8.45, 0.32), arrowprops={"arrowstyle": "->"})
    figure.savefig(path, dpi=120)


def served(path: Path) -> None:
    """Draw a request to a model of `tests/serving/models.py`, served by vLLM, and its streamed answer."""
    draw, pictures = np.random.default_rng(0), []
    for colour, shape in (((40, 60, 220), (48, 96, 3)), ((230, 220, 40), (90, 56, 3))):
        pictures.append(np.clip(np.array(colour) + draw.normal(0, 12, shape), 0, 255).astype(np.uint8))
    request = (
        'POST /v1/chat/completions\n{"model": "my-vlm", "stream": true,\n "messages": [{"role": "user", "content": ['
        '\n   {"type": "image_url", ...},   # 96 x 48 pixels\n   {"type": "image_url", ...},   # 56 x 90 pixels'
        '\n   {"type": "text", "text": "Which colours?"}]}]}'
    )
    answer = 'data: {"delta": {"content": "blue"}}\ndata: {"delta": {"content": " yellow"}}\ndata: [DONE]'
    figure = Figure(figsize=(9, 1.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.6, 1, 4.4, 3.4])
    for ax, picture in zip(axes, pictures, strict=False):
        ax.imshow(picture)
        ax.set_axis_off()
    for ax, title, text in zip(axes[2:], ("request", "answer"), (request, answer), strict=True):
        ax.set_axis_off()
        ax.set_title(title, fontsize=9, loc="left")
        ax.text(0, 0.95, text, family="monospace", fontsize=8, va="top", transform=ax.transAxes)
    figure.savefig(path, dpi=120)


def router_load(path: Path) -> None:
    """Draw the expert load of free and of grouped routing with the same scores, which prefer the last experts."""
    torch.manual_seed(0)
    logits = torch.randn(512, 64) + torch.linspace(-1, 1, 64)
    loads = []
    for grouping in ({"grouping": "none"}, {"grouping": "equal", "num_expert_groups": 8}):
        statistics = RouterStatistics(64, num_groups=8)
        _, indices = route(logits, RoutingOptions(64, 8, **grouping))
        statistics.update(indices, logits.softmax(-1))
        loads.append(statistics.compute())
    show.router_load(loads, path)


def windowfree(path: Path) -> None:
    """Draw the gradient of one patch after a layer with windows, and after one without."""
    rows, columns, place = 24, 40, (9, 17)
    grid = torch.tensor([[1, rows, columns]])
    order = get_position_ids(grid, 2)
    patch = int(((order[:, 0] == place[0]) & (order[:, 1] == place[1])).nonzero())
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    titles = ("a layer with windows", "a layer without")
    for ax, title, full in zip(figure.subplots(1, 2), titles, ([], [0]), strict=True):
        torch.manual_seed(0)
        pattern = {"window_size": 64, "full_attention_layers": full}
        config = WindowFreeViTConfig.from_preset("window_free_tiny", num_hidden_layers=1, attention_pattern=pattern)
        pixels = torch.randn(rows * columns, 192, requires_grad=True)
        WindowFreeViTModel(config)(pixels, grid).last_hidden_state[patch].pow(2).sum().backward()
        sizes = torch.full((rows, columns), float("nan"))
        sizes[order[:, 0], order[:, 1]] = pixels.grad.norm(dim=1)
        sizes[place] = 0  # by far the largest
        seen = torch.where(sizes > 0, sizes.log10(), float("nan"))
        ax.imshow(seen, cmap="viridis")
        ax.plot(place[1], place[0], "o", color="red", markersize=4)
        ax.set_xticks(np.arange(0, columns + 1, 8) - 0.5, [])
        ax.set_yticks(np.arange(0, rows + 1, 8) - 0.5, [])
        ax.grid(color="0.7", linewidth=0.8)
        ax.set_title(title)
    figure.savefig(path, dpi=110)


def loss_weights(path: Path) -> None:
    """Draw the weights of answers of very different lengths under each preset."""
    prompts, answers = (24, 40, 18, 30, 22, 36), (3, 60, 9, 400, 24, 150)
    lengths = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    labels = torch.cat(
        [torch.tensor([-100] * prompt + [0] * answer) for prompt, answer in zip(prompts, answers, strict=True)]
    )
    show.loss_weights(labels, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), path=path)


# arXiv 2510.18234, section 4.1: text tokens per vision token, and precision, with 64 and with 100 vision tokens.
PAPER = {
    64: ((10.5, 11.8, 13.2, 15.1, 16.5, 17.7, 19.7), (0.965, 0.938, 0.838, 0.859, 0.793, 0.764, 0.591)),
    100: ((6.7, 7.5, 8.5, 9.7, 10.6, 11.3, 12.6), (0.985, 0.973, 0.968, 0.968, 0.915, 0.898, 0.871)),
}


def compression(path: Path) -> None:
    """Draw the precision of reading against text tokens per vision token, from `images/compression.json`."""
    runs = json.loads((FOLDER / "compression.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    for tokens, style in ((64, "o:"), (100, "s:")):
        label = f"DeepSeek-OCR, {tokens} tokens (the paper)"
        ax.plot(*PAPER[tokens], style, color="0.6", markersize=4, linewidth=1, label=label)
    colours = ("#b84a00", "#0067a5", "#3a7d34")
    for tokens, colour in zip(sorted({run["vision_tokens"] for run in runs}), colours, strict=True):
        own = [run["precision"] for run in runs if run["vision_tokens"] == tokens]
        ratios = np.array([int(length) for length in own[0]]) / tokens
        values = np.array([list(one.values()) for one in own])
        ax.fill_between(ratios, values.min(0), values.max(0), color=colour, alpha=0.15)
        ax.plot(ratios, values.mean(0), "o-", color=colour, label=f"in small, {tokens} tokens")
    chance = [value for run in runs for value in run["chance"].values()]
    ax.axhspan(min(chance), max(chance), color="0.9", label="another page's text")
    ax.set(xscale="log", xlabel="text tokens per vision token", ylabel="precision", ylim=(0, 1.02))
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.grid(color="0.9", linewidth=0.8)
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def run(path: Path) -> None:
    """Draw the log that `docs/make_run.py` writes to `images/run`."""
    show.run(FOLDER / "run", path)


IMAGES: dict[str, Callable[[Path], None]] = {
    "attention": attention,
    "compression": compression,
    "coordinate_frames": coordinate_frames,
    "coordinate_show": coordinate_show,
    "coordinates": coordinates,
    "image_packing": image_packing,
    "loss_weights": loss_weights,
    "navit": navit,
    "packing_plan": packing_plan,
    "positions": positions,
    "published": published,
    "router_load": router_load,
    "run": run,
    "sampling": sampling,
    "served": served,
    "serving": serving,
    "token_merging": token_merging,
    "token_reduction": token_reduction,
    "vlm": vlm,
    "windowfree": windowfree,
}


def main(names: list[str]) -> None:
    """Draw the named pictures, or all."""
    unknown = sorted(set(names) - set(IMAGES))
    if unknown:
        raise SystemExit(f"unknown pictures {unknown}; there are {sorted(IMAGES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or IMAGES:
        IMAGES[name](FOLDER / f"{name}.png")
        print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
