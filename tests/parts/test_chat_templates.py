"""openPangu's chat template, and the placeholders of videos."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError, nodes
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.tiny import picture, tokenizer
from vlparts import NaViTImageProcessor, VisionLanguageProcessor
from vlparts.parts import chat_templates
from vlparts.parts.chat_placeholders import with_placeholders
from vlparts.parts.chat_templates import OPENPANGU_CHAT_TEMPLATE, OPENPANGU_VISION_TOKENS
from vlparts.parts.image_processing_windowfree import WindowFreeViTImageProcessor
from vlparts.parts.thinking import with_thinking_mode

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
TOKENS = ["<s>", *(f"[unused{number}]" for number in (9, 10, 16, 17, 18, 19, 20, 32))]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def pangu_tokenizer() -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": TOKENS}, replace_extra_special_tokens=False)
    return words


class VideoImageProcessor(NaViTImageProcessor):
    """A NaViT image processor whose videos are frames packed one after another."""

    def preprocess_videos(self, videos: list[Any], **options: Any) -> BatchFeature:
        packed = [self(list(video), return_tensors="np") for video in videos]
        grids = [[len(video), *one["image_grid_thw"][0][1:]] for video, one in zip(videos, packed, strict=True)]
        data = {
            "pixel_values_videos": np.concatenate([one["pixel_values"] for one in packed]),
            "video_grid_thw": np.array(grids),
        }
        return BatchFeature(data, tensor_type=options.get("return_tensors"))


def processor(image_processor: Any = None, **changes: Any) -> VisionLanguageProcessor:
    settings = {
        "chat_template": OPENPANGU_CHAT_TEMPLATE,
        "spatial_merge_size": 2,
        **OPENPANGU_VISION_TOKENS,
        **changes,
    }
    return VisionLanguageProcessor(
        image_processor or VideoImageProcessor(patch_size=4, merge_size=2, do_resize=False),
        pangu_tokenizer(),
        **settings,
    )


EMPTY_SYSTEM = "<s>[unused9]系统：[unused10]"


@pytest.mark.parametrize(
    ("chat", "options", "expected"),
    [
        ([], {}, EMPTY_SYSTEM),
        ([user("Hi")], {}, f"{EMPTY_SYSTEM}[unused9]用户：Hi[unused10]"),
        (
            [user("Hi")],
            {"add_generation_prompt": True},
            f"{EMPTY_SYSTEM}[unused9]用户：Hi[unused10][unused9]助手：",
        ),
        (
            [{"role": "system", "content": "Be brief."}, user("Hi")],
            {},
            "<s>[unused9]系统：Be brief.[unused10][unused9]用户：Hi[unused10]",
        ),
        (
            [
                user("Hi"),
                {"role": "assistant", "content": "Hello"},
                {"role": "tool", "content": "3"},
                {"role": "function", "content": "4"},
                {"role": "system", "content": "Stop."},
            ],
            {},
            f"{EMPTY_SYSTEM}[unused9]用户：Hi[unused10][unused9]助手：Hello[unused10][unused9]工具：3[unused10]"
            "[unused9]方法：4[unused10][unused9]系统：Stop.[unused10]",
        ),
        (
            [user([IMAGE, text("What?"), VIDEO, text(" And?")])],
            {},
            f"{EMPTY_SYSTEM}[unused9]用户：[unused18][unused19][unused20]What?[unused18][unused32][unused20] And?"
            "[unused10]",
        ),
        (
            [user([IMAGE, VIDEO, IMAGE]), {"role": "assistant", "content": [text("So.")]}, user([VIDEO, IMAGE])],
            {"add_vision_id": True},
            f"{EMPTY_SYSTEM}[unused9]用户：图片 1: [unused18][unused19][unused20]"
            "视频 1: [unused18][unused32][unused20]图片 2: [unused18][unused19][unused20][unused10]"
            "[unused9]助手：So.[unused10]"
            "[unused9]用户：视频 2: [unused18][unused32][unused20]图片 3: [unused18][unused19][unused20][unused10]",
        ),
        (
            [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Why?")],
            {"thinking_mode": "fast", "add_generation_prompt": True},
            f"{EMPTY_SYSTEM}[unused9]用户：Hi[unused10][unused9]助手：Hello[unused10]"
            "[unused9]用户：Why? /no_think[unused10][unused9]助手：",
        ),
        (
            [user([text("What?"), IMAGE]), {"role": "assistant", "content": "A"}],
            {"thinking_mode": "auto"},
            f"{EMPTY_SYSTEM}[unused9]用户：What?[unused18][unused19][unused20] /auto_think[unused10]"
            "[unused9]助手：A[unused10]",
        ),
        ([user("Hi")], {"thinking_mode": "slow"}, f"{EMPTY_SYSTEM}[unused9]用户：Hi[unused10]"),
        (
            [user("Hi /no_think")],
            {"thinking_mode": "fast"},
            f"{EMPTY_SYSTEM}[unused9]用户：Hi /no_think[unused10]",
        ),
    ],
)
def test_conversations_are_written_as_openpangu_does(chat: Any, options: dict[str, Any], expected: str) -> None:
    # With `[chat]`, since transformers cannot tell what an empty conversation is.
    assert processor().apply_chat_template([chat], **options) == [expected]


blocks = st.sampled_from([IMAGE, VIDEO, text("What?"), text("")])
contents = st.one_of(st.sampled_from(["", "Hi", " 你好 \n"]), st.lists(blocks, max_size=3))
conversations = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "tool", "function"]),
        contents,
    ),
    max_size=4,
)
PANGU = processor()


@given(conversations, st.sampled_from(["slow", "fast", "auto"]))
@example([user([text(""), text("")])], "fast")
@example([user([text("Why? /no_think"), text("")])], "fast")
@example([user([text("Why?"), text("")])], "auto")
def test_the_mode_of_the_template_is_that_of_the_messages(chat: list[dict[str, Any]], mode: str) -> None:
    chat = [*chat, user("Why?")] if all(message["role"] != "user" for message in chat) else chat
    of_messages = PANGU.apply_chat_template([with_thinking_mode(chat, mode)])
    assert PANGU.apply_chat_template([chat], thinking_mode=mode) == of_messages
    assert PANGU.apply_chat_template([with_thinking_mode(chat, mode)], thinking_mode=mode) == of_messages


@given(conversations)
def test_every_turn_opens_and_closes_once(chat: list[dict[str, Any]]) -> None:
    (written,) = PANGU.apply_chat_template([chat])
    turns = len(chat) + (not chat or chat[0]["role"] != "system")
    assert written.count("[unused9]") == written.count("[unused10]") == turns
    assert written.startswith("<s>[unused9]系统：")
    assert written.count("<s>") == 1
    given_blocks = [
        block["type"] for message in chat if isinstance(message["content"], list) for block in message["content"]
    ]
    assert written.count("[unused19]") == given_blocks.count("image")
    assert written.count("[unused32]") == given_blocks.count("video")


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        ([{"role": "judge", "content": "Hi"}], {}, "A role must be one of system, user, .*, got judge"),
        ([user([{"type": "audio"}])], {}, "must have the type image, video or text, got audio"),
        ([{"role": "assistant"}], {}, "A message must have a content, got none from assistant"),
        ([user("Hi")], {"thinking_mode": "quick"}, "thinking_mode must be one of slow, fast, auto, got quick"),
        ([user("Hi/auto_think")], {"thinking_mode": "fast"}, "thinking_mode is fast, but .* ends with /auto_think"),
        ([user([text("/no_think ")])], {"thinking_mode": "slow"}, "thinking_mode is slow, but .* ends with /no_think"),
        ([{"role": "tool", "content": "3"}], {"thinking_mode": "fast"}, "thinking_mode needs a message .* user"),
    ],
)
def test_bad_conversations_are_refused(chat: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        processor().apply_chat_template(chat, **options)


def frames(count: int, width: int = 16, height: int = 8) -> list[Any]:
    return [picture(width, height, seed) for seed in range(count)]


@pytest.mark.parametrize("as_array", [False, True])
def test_a_video_becomes_one_group_for_each_frame(as_array: bool) -> None:
    one = processor()
    videos = [frames(3), frames(1, 8, 8)]
    if as_array:
        videos = [np.stack([np.array(frame) for frame in video]) for video in videos]
    place = "[unused18][unused32][unused20]"
    inputs = one(
        text=f"a {place} b [unused18][unused19][unused20] c {place}",
        videos=videos,
        images=[picture(24, 8)],
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )
    assert inputs["video_grid_thw"].tolist() == [[3, 2, 4], [1, 2, 2]]
    assert inputs["pixel_values_videos"].shape == (3 * 8 + 4, 48)
    group = "[unused18]" + 2 * "[unused32]" + "[unused20]"
    image = "[unused18]" + 3 * "[unused19]" + "[unused20]"
    expected = f"a {3 * group} b {image} c [unused18][unused32][unused20]"
    assert one.tokenizer.decode(inputs["input_ids"][0]) == expected
    ids, kinds = inputs["input_ids"][0], torch.as_tensor(inputs["mm_token_type_ids"][0])
    assert torch.equal(kinds == 1, ids == one.image_token_id)
    assert torch.equal(kinds == 2, ids == one.video_token_id)


def test_without_start_and_end_the_groups_follow_each_other() -> None:
    one = processor(vision_start_token=None, vision_end_token=None)
    inputs = one(text="a [unused32] b", videos=[frames(3)], return_tensors="pt")
    assert one.tokenizer.decode(inputs["input_ids"][0]) == "a " + 6 * "[unused32]" + " b"


def test_videos_come_from_the_conversation() -> None:
    one = processor()
    chats = [
        [user([{"type": "video", "video": frames(2)}, text("What?"), {"type": "image", "image": picture(8, 8)}])],
        [user([{"type": "video", "video": frames(1)}, {"type": "video", "video": frames(2, 8, 8)}])],
    ]
    inputs = one.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert inputs["video_grid_thw"].tolist() == [[2, 2, 4], [1, 2, 4], [2, 2, 2]]
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert (inputs["input_ids"] == one.video_token_id).sum(1).tolist() == [4, 2 + 2]


def test_the_windowfree_processor_takes_videos() -> None:
    images = WindowFreeViTImageProcessor(
        patch_size=4, merge_size=2, video_min_frame_pixels=64, video_min_total_pixels=64, video_max_frame_pixels=256
    )
    one = processor(images)
    inputs = one(text=2 * "[unused18][unused32][unused20]", videos=[frames(2, 16, 16), frames(1, 32, 16)])
    counts = [int(t) * int(h) * int(w) // 4 for t, h, w in inputs["video_grid_thw"]]
    assert inputs["input_ids"][0].count(one.video_token_id) == sum(counts)
    assert len(inputs["pixel_values_videos"]) == 4 * sum(counts)


def test_the_default_template_takes_videos_where_there_is_a_token() -> None:
    chat = [user([VIDEO, IMAGE, text("What?")])]
    written = processor(chat_template=None).apply_chat_template(chat)
    assert written == (
        "<|im_start|>user\n[unused18][unused32][unused20]\n[unused18][unused19][unused20]\nWhat?<|im_end|>\n"
    )
    without = processor(chat_template=None, video_token=None, vision_start_token=None, vision_end_token=None)
    with pytest.raises(TemplateError, match="must have the type image or text, got video"):
        without.apply_chat_template(chat)


PLACE = "[unused18][unused32][unused20]"


@pytest.mark.parametrize(
    ("videos", "texts", "message"),
    [
        (None, [PLACE], "1 .unused32. tokens in the text but no videos"),
        ([frames(1)], ["no place"], "0 .unused32. tokens and 1 videos"),
        ([frames(1)], [2 * PLACE], "2 .unused32. tokens and 1 videos"),
        ([[frames(1)], [frames(1), frames(1)]], [2 * PLACE, PLACE], "Sample 0 has 2 .unused32. tokens .* 1 videos"),
        ([[frames(1)], []], ["", PLACE], "Sample 0 has 0 .* 1 videos"),
        ([frames(1)], ["[unused32]"], r"Sample 0 must have each \[unused32\] in `text` as \[unused18\]\[unused32\]"),
        (["film.mp4"], [PLACE], "`videos` must hold videos .* decoded already, got 'film.mp4'"),
        ([], [""], "`videos` is empty; expected None"),
        ([3], [PLACE], "`videos` must hold videos .* got 'int'"),
        ([[picture(8, 8), picture(16, 8)]], [PLACE], r"frames of one size .* got .* \[\(8, 8\), \(8, 16\)\]"),
    ],
)
def test_videos_and_placeholders_must_match(videos: Any, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()(text=texts, videos=videos)


def test_a_flat_list_of_videos_is_not_taken_for_one_list_per_sample() -> None:
    inputs = processor()(text=[2 * PLACE, "none"], videos=[frames(2), frames(1)])
    assert inputs["video_grid_thw"].tolist() == [[2, 2, 4], [1, 2, 4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_token": "<nowhere>"}, "`tokenizer` has no token '<nowhere>'"),
        ({"vision_start_token": "<nowhere>"}, "`tokenizer` has no token '<nowhere>'"),
        ({"vision_end_token": None}, "must be given together, got '.unused18.' and None"),
        ({"video_token": "[unused19]"}, "`image_token` and `video_token` must differ"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**changes)


def test_videos_need_a_token_and_a_processor() -> None:
    with pytest.raises(ValueError, match="`videos` were given, but this processor has no `video_token`"):
        processor(video_token=None)(text="a", videos=[frames(1)])
    images_only = processor(NaViTImageProcessor(patch_size=4, merge_size=2))
    assert not hasattr(images_only, "video_processor")
    with pytest.raises(ValueError, match="NaViTImageProcessor has no method `preprocess_videos`"):
        images_only(text=PLACE, videos=[frames(1)])


def test_saving_keeps_the_tokens_and_the_template(tmp_path: Path) -> None:
    saved = processor(NaViTImageProcessor(patch_size=4, merge_size=2))
    saved.save_pretrained(tmp_path)
    loaded = VisionLanguageProcessor.from_pretrained(tmp_path)
    for name in (*OPENPANGU_VISION_TOKENS, "image_token_id", "video_token_id", "spatial_merge_size", "chat_template"):
        assert getattr(loaded, name) == getattr(saved, name) is not None
    chat = [user([IMAGE, VIDEO, text("What?")])]
    assert loaded.apply_chat_template(chat) == saved.apply_chat_template(chat)


TEXT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SERVED_TEMPLATES = {name: getattr(chat_templates, name) for name in dir(chat_templates) if name.endswith("_TEMPLATE")}
SERVED_TEMPLATES["extended"] = with_placeholders(TEXT_TEMPLATE, {"image": "<image>"})


def loops_over_blocks(template: str) -> bool:
    """Whether vLLM finds that the template takes content as a list of blocks."""
    tree = _compile_jinja_template(template).environment.parse(template)
    in_macros = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in macro.find_all(nodes.For)}
    for loop in tree.find_all(nodes.For):
        match loop.iter:
            case nodes.Getitem(node=nodes.Name(name="message"), arg=nodes.Const(value="content")):
                return True
            case nodes.Name(name="content") if id(loop) not in in_macros:
                return True
    return False


@pytest.mark.parametrize("name", SERVED_TEMPLATES)
def test_servers_find_that_templates_take_blocks(name: str) -> None:
    assert len(SERVED_TEMPLATES) == 5
    assert loops_over_blocks(SERVED_TEMPLATES[name])
    assert not loops_over_blocks(TEXT_TEMPLATE)
