"""LLaVE's input format, as data that a saved folder carries.

* The chat template (``chat_template.jinja``) writes the system and user turns. It puts images
  before the text. The user's text may contain the name of a special token, such as ``<image>``. The
  template breaks such a name with a mark. The tokenizer removes the mark after it has searched for
  special tokens, so the name stays text.
* The tokenizer's post-processor adds the closing turn. A tokenizer reserves room for its
  post-processor's tokens before it truncates. An over-long text is therefore cut inside the user
  turn, and the pooled token, the last one, is always there. If the template wrote the closing turn,
  truncation would cut it off.

transformers' own ``sanitize_control_tokens`` refuses a tokenizer with such a post-processor.
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

# Unicode reserves this code point for use inside programs. A text may contain it all the same.
_MARK = "\ufdd0"
_BREAK, _LITERAL = _MARK + "0", _MARK + "1"


def chat_template(backbone: Backbone, tokens: Iterable[str] = ()) -> str:
    """Return the Jinja template of an input, without the closing turn that the tokenizer adds.

    It is ``chat_template.jinja`` with the backbone's values put in. sentence-transformers passes a
    ``prompt`` as a system message. The template puts it in front of the user's text, because the
    format's system turn is fixed.

    Args:
        backbone: the row of the model's type.
        tokens: names of special tokens. They stay text where the user's text contains them. The
            tokenizer must come from :func:`formatted`.
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
    """Return a copy that takes the template's marks out of the text and adds the closing turn.

    The copy is a plain ``PreTrainedTokenizerFast``, which keeps its normaliser when it is loaded.
    Qwen2's class builds a new normaliser.

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
    if there is None or there.normalize_str(_BREAK):  # false for a folder that ``build`` made
        steps = [Replace(_BREAK, ""), Replace(_LITERAL, _MARK)]
        backend.normalizer = Sequence(steps if there is None else [*steps, there])
    return made


def placeholder_problem(text: str, media: int) -> str | None:
    """Return what the template would refuse in a text's placeholders ``<|image_1|>``, or None.

    Args:
        text: an input's text.
        media: the number of images and videos in the input.
    """
    known = {str(number) for number in range(1, media + 1)}
    for number in re.findall(r"<\|image_(\d+)\|>", text):
        if number not in known:
            return (
                f"the text has the placeholder <|image_{number}|> but the input has {media} "
                f"image(s) and video(s): {text!r:.80}"
            )
    return None
