"""Chat templates of composed models: ChatML, openPangu's, DeepSeek-OCR's, and that of POINTS1.5.

A template is Jinja text, which transformers saves with a processor. Its variables are `messages`,
`add_generation_prompt`, the tokenizer's special tokens, and keyword arguments of `apply_chat_template`; it can call
`raise_exception`. The tokens that an assistant generates, up to the end of its turn, are marked by
`{% generation %}`; images in its turns are not.

vLLM reads in the text whether a template takes a list of blocks: it loops over `content` or `message['content']`.
Otherwise vLLM joins the blocks of a message to one string, without its images.
"""

from .thinking import THINKING_SWITCHES

__all__ = [
    "CHATML_START",
    "DEEPSEEK_OCR_CHAT_TEMPLATE",
    "DEFAULT_CHAT_TEMPLATE",
    "OPENPANGU_CHAT_TEMPLATE",
    "OPENPANGU_VISION_TOKENS",
    "POINTS_CHAT_TEMPLATE",
    "POINTS_VISION_TOKENS",
    "default_chat_template",
]

CHATML_START = "<|im_start|>"

# ChatML with the tokenizer's own end-of-sequence token, at which generation stops.
DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{{{ '{CHATML_START}' + message['role'] + '\\n' }}}}"
    "{%- if message['content'] is string and message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] }}{%- endgeneration -%}"
    "{%- elif message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- elif block['type'] == 'text' -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ block['text'] }}{%- endgeneration -%}"
    "{%- else -%}{{ block['text'] }}{%- endif -%}"
    "{%- else -%}{{ raise_exception('A content block must have the type image or text, got ' + block['type']) }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ eos_token }}{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{ '{CHATML_START}assistant\\n' }}}}{{%- endif -%}}"
)

# The plain format of DeepSeek-OCR, which has no marks of roles: one beginning token, then the contents of all turns.
DEEPSEEK_OCR_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- set content = [{'type': 'text', 'text': content}] if content is string else content -%}"
    "{%- for block in content -%}"
    "{%- if block['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif block['type'] == 'text' and message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ block['text'] }}{%- endgeneration -%}"
    "{%- elif block['type'] == 'text' -%}{{ block['text'] }}"
    "{%- else -%}{{ raise_exception('A content block must have the type image or text, got ' + block['type']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ eos_token }}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
)

# Arguments of `VisionLanguageProcessor` for the template of POINTS1.5.
POINTS_VISION_TOKENS = {
    "image_token": "<|image_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}

# ChatML of POINTS1.5 (arXiv 2412.08443): turns of the user and the assistant alone, a line per image. The published
# code reads `max_pixels` of an image; here it would be without effect, which is an error.
POINTS_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['user', 'assistant'] -%}"
    "{{ raise_exception('A role must be user or assistant, got ' + message['role']) }}"
    "{%- endif -%}"
    f"{{{{ '{CHATML_START}' + message['role'] + '\n' }}}}"
    "{%- set content = message['content'] -%}"
    "{%- set content = [{'type': 'text', 'text': content}] if content is string else content -%}"
    "{%- for block in content -%}"
    "{%- if block['type'] == 'image' and block['max_pixels'] is defined -%}"
    "{{ raise_exception('An image must not have max_pixels; pass the image through shrink_image') }}"
    "{%- elif block['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>\n' }}"
    "{%- elif block['type'] == 'text' and message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ block['text'] }}{%- endgeneration -%}"
    "{%- elif block['type'] == 'text' -%}{{ block['text'] }}"
    "{%- else -%}{{ raise_exception('A content block must have the type image or text, got ' + block['type']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ '<|im_end|>' }}{%- endif -%}"
    "{{ '\n' }}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{ '{CHATML_START}assistant\n' }}}}{{%- endif -%}}"
)

# Arguments of `VisionLanguageProcessor` for openPangu's template.
OPENPANGU_VISION_TOKENS = {
    "image_token": "[unused19]",
    "video_token": "[unused32]",
    "vision_start_token": "[unused18]",
    "vision_end_token": "[unused20]",
}

# Turns of openPangu-VL-7B: `[unused9]` role `：` content `[unused10]`, after one `<s>` and a system turn, which may be
# empty. Options: `add_vision_id` numbers the images and videos of the conversation; `thinking_mode`, not in the
# published template, has the effect of `with_thinking_mode` on the messages.
OPENPANGU_CHAT_TEMPLATE = (
    "{%- set names = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'} -%}"
    f"{{%- set switches = {THINKING_SWITCHES} -%}}"
    "{%- set mode = thinking_mode if thinking_mode is defined else none -%}"
    "{%- if mode is not none and mode not in switches -%}"
    "{{ raise_exception('thinking_mode must be one of ' + switches | join(', ') + ', got ' + mode | string) }}"
    "{%- endif -%}"
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- if mode is not none and not users -%}"
    "{{ raise_exception('thinking_mode needs a message with the role user, got none') }}"
    "{%- endif -%}"
    "{%- set count = namespace(image=0, video=0, user=0) -%}"
    # One block of a turn.
    "{%- macro piece(block) -%}"
    "{%- if block['type'] == 'text' -%}{{ block['text'] }}"
    "{%- elif block['type'] == 'image' -%}{%- set count.image = count.image + 1 -%}"
    "{{ ('图片 ' ~ count.image ~ ': ' if add_vision_id else '') + '[unused18][unused19][unused20]' }}"
    "{%- elif block['type'] == 'video' -%}{%- set count.video = count.video + 1 -%}"
    "{{ ('视频 ' ~ count.video ~ ': ' if add_vision_id else '') + '[unused18][unused32][unused20]' }}"
    "{%- else -%}"
    "{{ raise_exception('A content block must have the type image, video or text, got ' + block['type']) }}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    # A turn's content.
    "{%- macro body(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- elif message['content'] is defined -%}"
    "{%- for block in message['content'] -%}{{ piece(block) }}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('A message must have a content, got none from ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{{ '<s>' }}"
    "{%- if not messages or messages[0]['role'] != 'system' -%}{{ '[unused9]系统：[unused10]' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in names -%}"
    "{{ raise_exception('A role must be one of ' + names | join(', ') + ', got ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '[unused9]' + names[message['role']] + '：' }}"
    "{%- if message['role'] == 'assistant' and message['content'] is defined -%}"
    "{%- set blocks = message['content'] -%}"
    "{%- for block in ([{'type': 'text', 'text': blocks}] if blocks is string else blocks) -%}"
    "{%- if block['type'] == 'text' -%}{%- generation -%}{{ block['text'] }}{%- endgeneration -%}"
    "{%- else -%}{{ piece(block) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- generation -%}{{ '[unused10]' }}{%- endgeneration -%}"
    "{%- else -%}"
    "{%- set text = body(message) -%}"
    "{{ text }}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set count.user = count.user + 1 -%}"
    "{%- if mode is not none and count.user == users | length -%}"
    "{%- for switch in switches.values() if switch and switch != switches[mode] and (text | trim).endswith(switch) -%}"
    "{{ raise_exception('thinking_mode is ' + mode + ', but the last user turn ends with ' + switch) }}"
    "{%- endfor -%}"
    "{%- if not (text | trim).endswith(switches[mode]) -%}"
    "{{ (' ' if text[-1:] | trim and switches[mode] else '') + switches[mode] }}{%- endif -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{{ '[unused10]' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[unused9]助手：' }}{%- endif -%}"
)


def default_chat_template(
    image_token: str, video_token: str | None = None, vision_start_token: str = "", vision_end_token: str = ""
) -> str:
    """Return `DEFAULT_CHAT_TEMPLATE` with the placeholders of a processor.

    Args:
        image_token: Placeholder of an image.
        video_token: Placeholder of a video; None to refuse videos.
        vision_start_token: Token before each placeholder.
        vision_end_token: Token after each placeholder.

    Returns:
        The Jinja template.
    """
    image = vision_start_token + image_token + vision_end_token
    template = DEFAULT_CHAT_TEMPLATE.replace("<image>", image)
    if video_token is None:
        return template
    video = vision_start_token + video_token + vision_end_token
    branch = f"{{%- elif block['type'] == 'video' -%}}{{{{ '{video}\\n' }}}}"
    text_branch = "{%- elif block['type'] == 'text' -%}"
    template = template.replace(text_branch, branch + text_branch)
    return template.replace("the type image or text", "the type image, video or text")
