"""The input format, compared with the authors' code and with the bare tokenizer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

from PIL import Image
from sentence_transformers import SentenceTransformer

import llave
from llave.chat import placeholder_problem
from llave.modeling import inputs
from tests.llave import tiny

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def any_model(request) -> SentenceTransformer:
    return llave.build(tiny.BACKBONES[request.param](), device="cpu")


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return llave.build(tiny.llava_onevision(), device="cpu")


def ids_of(model: SentenceTransformer, item, **kwargs) -> list[int]:
    """The token ids of an input. A run of image or video tokens counts as one."""
    ids = model.preprocess([item], **kwargs)["input_ids"][0].tolist()
    media = {model[0].processor.image_token_id, model[0].processor.video_token_id}
    return [ids[i] for i in range(len(ids)) if ids[i] not in media or ids[i] != ids[i - 1]]


def as_text(text: str) -> list[int]:
    """The ids that the bare tokenizer gives a text when special tokens are split."""
    plain = tiny.tokenizer()
    return plain(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def as_format(model: SentenceTransformer, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def shown(model: SentenceTransformer, item, **kwargs) -> str:
    """The user turn of an input."""
    text = model.tokenizer.decode(ids_of(model, item, **kwargs))
    assert text.startswith(OPENING)
    assert text.endswith(CLOSING)
    return text[len(OPENING) : -len(CLOSING)]


@pytest.mark.parametrize(
    ("item", "user"),
    [
        ("A cat and a dog", "A cat and a dog"),
        (" padded \n", " padded \n"),
        ("", ""),
        (picture(), "<image>\nRepresent the given image."),
        ({"image": picture(), "text": "What is in it"}, "<image>\nWhat is in it"),
        ({"image": picture(), "text": " What is in it \n"}, "<image>\n What is in it \n"),
        ({"image": picture(), "text": " \n"}, "<image>\nRepresent the given image."),
        # A marker at the start of a single image's text stays in place.
        ({"text": "<|image_1|>\nWhat is in it", "image": picture()}, "<image>\nWhat is in it"),
        ({"text": "<|image_1|>\nWhat\nis it\n", "image": picture()}, "<image>\nWhat\nis it\n"),
        ({"text": "<|image_1|> What \n\n", "image": picture()}, "<image> What \n\n"),
        ({"text": "<|image_1|>What", "image": picture()}, "<image>What"),
        ({"text": "<|image_1|>\n\n What", "image": picture()}, "<image>\n\n What"),
        ({"text": "<|image_1|>\nSee it\n", "video": [picture()] * 2}, "<video>\nSee it\n"),
        ({"text": "<|image_1|>", "image": picture()}, "<image>\nRepresent the given image."),
        ({"text": "<|image_1|>\n", "image": picture()}, "<image>\nRepresent the given image."),
        # Any other marker moves to the front. At an edge of the text the spaces there are dropped.
        ({"text": "See <|image_1|>.", "image": picture()}, "<image>\nSee ."),
        ({"text": "See <|image_1|>.\n", "image": picture()}, "<image>\nSee .\n"),
        ({"text": "See <|image_1|>\n", "image": picture()}, "<image>\nSee"),
        (
            {"text": "<|image_1|> and <|image_2|>", "image": [picture(), picture(seed=1)]},
            "<image>\n<image>\nand",
        ),
        (
            {"text": "<|image_1|>\n<|image_2|>\nSee\n", "image": [picture(), picture(seed=1)]},
            "<image>\n<image>\nSee\n",
        ),
        ({"video": [picture(), picture()]}, "<video>\nRepresent the given video."),
        (
            {"text": "<|image_1|> <|image_2|> See", "image": picture(), "video": [picture()]},
            "<image>\n<video>\nSee",
        ),
        (inputs("See it", video=np.zeros((2, 30, 40, 3), np.uint8)), "<video>\nSee it"),
        ([{"role": "user", "content": "A cat\n"}], "A cat\n"),
    ],
)
def test_token_ids_are_the_published_format(model, item, user):
    assert shown(model, item) == user
    assert ids_of(model, item) == as_format(model, OPENING + user + CLOSING)


def authors_ids(model: SentenceTransformer, text: str) -> list[int]:
    """The ids as the authors' training and evaluation code makes them, turn by turn."""
    text = text.replace("<|image_1|>", "<image>")
    if text.count("<image>") == 1 and not text.startswith("<image>"):
        text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
    turns = (
        ("system", "You are a helpful assistant."),
        ("user", text),
        ("assistant", "\n"),
    )
    return [
        token
        for role, content in turns
        for token in as_format(model, f"<|im_start|>{role}\n{content}<|im_end|>\n")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<|image_1|>\nRepresent the given image with the following question: What is it?\n",
        "<|image_1|>\nRepresent the given image.\n",
        "<|image_1|>\nRepresent the given news image with the following caption: A cat. \n",
        "<|image_1|> Select the portion of the image that follows the expression: a dog\n",
        "<|image_1|>\nGiven an image, find a similar everyday image with the described changes:  ",
        "Find the image <|image_1|> again",
        "Find the image again <|image_1|>",
        "Find me an everyday image that matches the given caption: A cat and a dog.\n",
        "brown_bear\n",
        "",
    ],
)
def test_token_ids_of_mmebs_texts_are_the_authors(model, text):
    item = {"text": text, "image": picture()} if "<|image_1|>" in text else text
    assert ids_of(model, item) == authors_ids(model, text)


def texts_of_names(model: SentenceTransformer) -> list[str]:
    names = [*model.tokenizer.get_added_vocab(), "<pad>", "<|image_pad|>", "<|image_x|>"]
    return [
        *names,
        "".join(names * 2),
        *(f"<p>a {name}b</p>\n" for name in names),
        *(f"<{name[1:-1]}</{name[1:]}" for name in names),
        "<rss><image><url>a.png</url></image></rss>",
        "\ufdd0",
        "\ufdd00\ufdd01\ufdd0",
        "\ufdd0<image>\ufdd0<\ufdd00image>",
        "<image>\u0338",
        "<imag\u0301e> e\u0301",
    ]


def test_names_of_tokens_are_text_in_a_text(any_model):
    for text in texts_of_names(any_model):
        expected = as_format(any_model, OPENING) + as_text(text)
        assert ids_of(any_model, text) == expected + as_format(any_model, CLOSING)


def test_names_of_tokens_are_text_beside_media_and_in_a_prompt(any_model):
    around = ids_of(any_model, {"text": "|", "image": picture()})
    place = len(around) - 1 - around[::-1].index(as_text("|")[0])
    for text in texts_of_names(any_model):
        text = f"|{text}|"
        expected = [*around[:place], *as_text(text), *around[place + 1 :]]
        assert ids_of(any_model, {"text": text, "image": picture()}) == expected
        assert ids_of(any_model, {"text": text[1:], "image": picture()}, prompt="|") == expected
        assert ids_of(any_model, {"image": picture()}, prompt=text) == expected
        video = ids_of(any_model, {"text": text, "video": [picture(), picture()]})
        assert video[-len(expected[place:]) :] == expected[place:]


@pytest.mark.parametrize(
    "text",
    ["\x00", "a\x00b", " ", "\r\n", "\ufeff", "\uffff", "\u202e", "x" * 30000, "<image>" * 3000],
)
@pytest.mark.parametrize("with_image", [False, True])
def test_odd_texts_are_embedded(model, text, with_image):
    found = model.encode([{"text": text, "image": picture()} if with_image else text])
    assert np.isfinite(found).all()
    assert len(ids_of(model, text)) <= model.max_seq_length


def test_a_saved_and_a_pickled_model_keep_texts_text(any_model, tmp_path):
    any_model.save(str(tmp_path / "model"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    twice = llave.build(tmp_path / "model", device="cpu")
    for text in texts_of_names(any_model):
        expected = ids_of(any_model, text)
        for other in (again, twice, pickle.loads(pickle.dumps(any_model))):
            assert ids_of(other, text) == expected


def test_any_name_of_a_token_can_stand_in_the_template():
    names = ["a'b", 'a"b', "c\\d", "{{ x }}", "{% y %}", "line\nbreak", "\U0001f642x", "<x>"]
    backbone, processor = tiny.llava_onevision()
    processor.tokenizer.add_tokens(names, special_tokens=True)
    backbone.resize_token_embeddings(len(processor.tokenizer))
    built = llave.build((backbone, processor), device="cpu")
    for name in names:
        expected = as_format(built, OPENING) + as_text(f"a {name}") + as_format(built, CLOSING)
        assert ids_of(built, f"a {name}") == expected


@pytest.mark.parametrize("text", ["a cat", "<|image_1|>\na cat", "a <image> cat"])
def test_a_prompt_goes_into_the_user_turn(model, text):
    image = picture()
    item = {"image": image, "text": text}
    plain = text.removeprefix("<|image_1|>\n")
    assert ids_of(model, item, prompt="Find: ") == ids_of(
        model, {"image": image, "text": f"Find: {plain}"}
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "<|image_1|> what", "image": []}, "0 image"),
        ("<|image_1|> what", "image placeholder"),
        ({"text": "<|image_2|>", "image": picture()}, "1 image"),
        ([{"role": "assistant", "content": "yes"}], "assistant"),
        ({"text": "<|image_2|>", "video": [picture()]}, r"0 image\(s\) and 1 video"),
        ((picture(), "a pair"), "pair"),
        ("\ud800", "surrogates not allowed"),
        ({"text": "a \udc80", "image": picture()}, "surrogates not allowed"),
        ({"text": 3}, "must be a string, got 3"),
        ({"text": None, "image": picture()}, "must be a string, got None"),
        ([{"role": "user", "content": [{"type": "text", "text": ["a"]}]}], "must be a string"),
    ],
)
def test_inputs_the_format_has_no_place_for(model, item, message):
    with pytest.raises(Exception, match=message):
        model.encode([item])


def test_placeholders_in_a_prompt_are_an_error(model):
    with pytest.raises(Exception, match="take the placeholder out"):
        model.encode([picture()], prompt="<|image_1|> Find ")


@pytest.mark.parametrize(
    ("text", "media", "number"),
    [
        ("see <|image_1|>", 0, "1"),
        ("<|image_1|> <|image_2|>", 1, "2"),
        ("<|image_0|>", 1, "0"),
        ("<|image_01|>", 1, "01"),
        ("<|image_1|>", 1, None),
        ("<|image_2|> <|image_1|> <|image_1|>", 2, None),
        ("<|image_|> <|image_x|> <|image_1 |image_pad|> <image_1>", 0, None),
    ],
)
def test_placeholders_are_judged_as_the_template_does(model, text, media, number):
    problem = placeholder_problem(text, media)
    item = {"text": text, "image": [picture(seed) for seed in range(media)]}
    if number is None:
        assert problem is None
        model.preprocess([item if media else text])
    else:
        assert f"placeholder <|image_{number}|> but the input has {media} image" in problem
        with pytest.raises(Exception, match="image placeholder"):
            model.preprocess([item])
