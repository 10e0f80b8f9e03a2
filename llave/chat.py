"""LLaVE's input format, as data that a saved folder carries.

* The chat template: system and user turns, images before the text. A text is text: where it has
  the name of one of the tokenizer's tokens, such as ``<image>``, the template breaks the name by
  a mark. The tokenizer takes the mark out again after its search for such names.
* The tokenizer's post-processor: the closing turn. A tokenizer makes room for what its
  post-processor adds before it truncates, so an over-long text is cut inside the user turn and
  the pooled token, the last one, is always there. A template's end would be cut off.

(transformers' own ``sanitize_control_tokens`` refuses a tokenizer with such a post-processor.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tokenizers.normalizers import Replace, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llave.files import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING_TURNS = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CLOSING_TURN = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"

# Per model type: the image and the video token, and how each stands in the text.
_MARKERS = {
    "llava_onevision": ("<image>", "<video>", "{}"),
    "qwen2_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>{}<|vision_end|>"),
}
_MARKERS["qwen2_5_vl"] = _MARKERS["qwen2_vl"]

# A code point that Unicode keeps for such use inside programs. A text may have it all the same.
_MARK = "\ufdd0"
_BREAK, _LITERAL = _MARK + "0", _MARK + "1"

_TEMPLATE = """
{%- set ns = namespace(prompt='', text='', images=0, videos=0, separator='\\n') -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user'] -%}
{{- raise_exception('an input is one user turn; it has a message of role ' ~ message.role) -}}
{%- endif -%}
{%- set content = message.content -%}
{%- for item in ([{'type': 'text', 'text': content}] if content is string else content) -%}
{%- if item.type == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- elif item.type == 'video' -%}
{%- set ns.videos = ns.videos + 1 -%}
{%- elif item.text is not string -%}
{{- raise_exception('a text must be a string, got ' ~ item.text) -}}
{%- elif message.role == 'system' -%}
{%- set ns.prompt = ns.prompt ~ item.text -%}
{%- else -%}
{%- set ns.text = ns.text ~ ('\\n' if ns.text else '') ~ item.text -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- set media = ns.images + ns.videos -%}
{%- set first = '<|image_1|>' -%}
{%- if media == 1 and not ns.prompt and ns.text.startswith(first) and ns.text[11:] | trim -%}
{%- set ns.text = ns.text[11:] -%}
{%- set ns.separator = '' -%}
{%- endif -%}
{%- for i in range(1, media + 1) -%}
{%- set parts = ns.text.split('<|image_' ~ i ~ '|>') -%}
{%- if parts | length > 1 -%}
{%- set ns.text = parts | join -%}
{%- if not parts[0] | trim -%}{%- set ns.text = ns.text.lstrip() -%}{%- endif -%}
{%- if not parts[-1] | trim -%}{%- set ns.text = ns.text.rstrip() -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set text = ns.prompt ~ ns.text -%}
{%- set _ = text.encode() -%}{#- UnicodeEncodeError: it has half of a surrogate pair -#}
{%- for part in text.split('<|image_')[1:] -%}
{%- if '|>' in part and part.split('|>')[0].isdecimal() -%}
{{- raise_exception('the text has an image placeholder <|image_N|> but the input has '
    ~ ns.images ~ ' image(s) and ' ~ ns.videos ~ ' video(s): pass them or take the placeholder out')
-}}
{%- endif -%}
{%- endfor -%}
{%- set ns.text = text.replace('MARK', 'LITERAL') -%}
{%- for token in TOKENS -%}
{%- set ns.text = ns.text.replace(token, token[0] ~ 'BREAK' ~ token[1:]) -%}
{%- endfor -%}
{%- if media and not text | trim -%}
{%- set ns.text = 'Represent the given ' ~ ('video.' if ns.videos else 'image.') -%}
{%- endif -%}
{{- 'OPENING' -}}
{%- for i in range(ns.images) -%}{{- 'IMAGE' ~ ns.separator -}}{%- endfor -%}
{%- for i in range(ns.videos) -%}{{- 'VIDEO' ~ ns.separator -}}{%- endfor -%}
{{- ns.text -}}
"""


def chat_template(model_type: str = "llava_onevision", tokens: Iterable[str] = ()) -> str:
    """The Jinja template of an input, up to the closing turn, which the tokenizer adds.

    A system message is what sentence-transformers makes of a ``prompt``: it goes in front of the
    user's text, because the system turn of the format is fixed.

    Args:
        model_type: the backbone's, one of ``llava_onevision``, ``qwen2_vl``, ``qwen2_5_vl``.
        tokens: names that the tokenizer would take for a token of their own, to be kept as text
            where the user's text has them. The tokenizer must be one of :func:`formatted`.

    Raises:
        ValueError: ``model_type`` is another.
    """
    if model_type not in _MARKERS:
        raise ValueError(
            f"model_type={model_type!r} is not one of {sorted(_MARKERS)}; an authors' checkpoint "
            "(llava_qwen) goes through llave.convert first"
        )
    image, video, around = _MARKERS[model_type]
    template = _TEMPLATE.strip()
    for name, value in {
        "'IMAGE'": around.format(image),
        "'VIDEO'": around.format(video),
        "'OPENING'": OPENING_TURNS,
        "'MARK'": _MARK,
        "'LITERAL'": _LITERAL,
        "'BREAK'": _BREAK,
        "TOKENS": sorted(tokens),
    }.items():
        literal = json.dumps(value, ensure_ascii=False).replace(_MARK, f"\\u{ord(_MARK):x}")
        template = template.replace(name, literal)
    return template


def formatted(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> PreTrainedTokenizerFast:
    """A copy that takes the template's marks out of the text and adds the closing turn.

    Its class is the one that is loaded as it was saved. Qwen2's makes its normaliser anew.

    Raises:
        ValueError: it lacks the ChatML tokens, or ``max_seq_length`` has no room for the format.
    """
    missing = {"<|im_start|>", "<|im_end|>"} - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"the backbone's tokenizer lacks {sorted(missing)}; ChatML needs them")
    opening, closing = (
        tokenizer.tokenize(turns, add_special_tokens=False)
        for turns in (OPENING_TURNS, CLOSING_TURN)
    )
    if max_seq_length <= len(opening) + len(closing):
        raise ValueError(
            f"max_seq_length={max_seq_length} leaves no room: the format alone takes "
            f"{len(opening) + len(closing)} tokens"
        )
    with TemporaryDirectory() as folder:
        with writing(Path(folder)):
            tokenizer.save_pretrained(folder)
        made = PreTrainedTokenizerFast.from_pretrained(
            folder, model_input_names=tokenizer.model_input_names
        )
    backend = made.backend_tokenizer
    special = {"id": "closing", "ids": tokenizer.convert_tokens_to_ids(closing), "tokens": closing}
    backend.post_processor = TemplateProcessing(single="$A closing", special_tokens=[special])
    there = backend.normalizer
    if there is None or there.normalize_str(_BREAK):  # not so where a built folder is built on
        steps = [Replace(_BREAK, ""), Replace(_LITERAL, _MARK)]
        backend.normalizer = Sequence(steps if there is None else [*steps, there])
    return made


def placeholder_problem(text: str, media: int) -> str | None:
    """What is wrong with a text's placeholders ``<|image_1|>``, ..., as the template judges them.

    Args:
        text: an input's text.
        media: how many images and videos the input has.
    """
    known = {str(number) for number in range(1, media + 1)}
    for number in re.findall(r"<\|image_(\d+)\|>", text):
        if number not in known:
            return (
                f"the text has the placeholder <|image_{number}|> but the input has {media} "
                f"image(s) and video(s): {text!r:.80}"
            )
    return None
