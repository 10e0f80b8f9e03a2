"""LLaVE's input format, as data that a saved folder carries.

* The chat template (``chat_template.jinja``): system and user turns, images before the text. A text
  is text: where it has the name of one of the tokenizer's tokens, such as ``<image>``, the template
  breaks the name by a mark. The tokenizer takes the mark out again after its search for such names.
* The tokenizer's post-processor: the closing turn. A tokenizer makes room for what its
  post-processor adds before it truncates, so an over-long text is cut inside the user turn and
  the pooled token, the last one, is always there. A template's end would be cut off.

(transformers' own ``sanitize_control_tokens`` refuses a tokenizer with such a post-processor.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tokenizers.normalizers import Replace, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llave.backbones import Backbone
from llave.files import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING_TURNS = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CLOSING_TURN = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"

# A code point that Unicode keeps for such use inside programs. A text may have it all the same.
_MARK = "\ufdd0"
_BREAK, _LITERAL = _MARK + "0", _MARK + "1"


def chat_template(backbone: Backbone, tokens: Iterable[str] = ()) -> str:
    """The Jinja template of an input, up to the closing turn, which the tokenizer adds.

    It is ``chat_template.jinja`` with the backbone's values put in. A system message is what
    sentence-transformers makes of a ``prompt``: it goes in front of the user's text, because the
    system turn of the format is fixed.

    Args:
        backbone: the row of the model's type.
        tokens: names that the tokenizer would take for a token of their own, to be kept as text
            where the user's text has them. The tokenizer must be one of :func:`formatted`.
    """
    template = (files("llave") / "chat_template.jinja").read_text(encoding="utf-8")
    template = re.sub(r"^\{#.*?#\}\n", "", template, flags=re.DOTALL | re.MULTILINE)  # comments
    template = re.sub(r"^\s+(?=[{-])", "", template, flags=re.MULTILINE).rstrip()  # indentation
    for name, value in {
        "'IMAGE'": backbone.around.format(backbone.image),
        "'VIDEO'": backbone.around.format(backbone.video),
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
