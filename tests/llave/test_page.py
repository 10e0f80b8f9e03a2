"""Pages of answers and of an evaluation's worst rows, opened in a browser where there is one."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for needed in ("sentence_transformers", "datasets", "torchvision"):
    pytest.importorskip(needed)

from llave import evaluation  # noqa: E402
from llave.answers import answer, read_queries, write_answers  # noqa: E402
from llave.evaluation import evaluate  # noqa: E402
from llave.misses import write_misses  # noqa: E402
from llave.page import SIDE, Answer, Section, make_item, write_page  # noqa: E402
from tests.browser import BROWSER, opened  # noqa: E402
from tests.llave.test_embedding import model, quick, write_jsonl  # noqa: E402
from tests.llave.test_evaluation import ByColour, write  # noqa: E402

HOSTILE = (
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    '"><b onclick=x>&amp;&lt;{{ 7 * 7 }}{% raw %}',
    "</p></article><h1>mine</h1><!-- ",
    "\u202eright to left\u202c, עברית, 中文, é, \x00\x07",
)


class Elements(HTMLParser):
    """The elements of a page, and the texts of its paragraphs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attributes))
        if tag == "p":
            self.texts.append("")
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[-1] += data


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Answers with pictures and hostile texts, from a corpus with hostile names."""
    for number in range(3):
        Image.new("RGB", (700, 300 + number), (80 * number, 90, 90)).save(
            tmp_path / f"{number}.png"
        )
    rows: list[dict[str, str]] = [{"id": f"<i>{n}", "image": f"{n}.png"} for n in range(3)]
    rows += [{"id": f"text {n}", "text": text} for n, text in enumerate(HOSTILE)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    quick(corpus, tmp_path / "out", shard_rows=3)
    asked = [*({"text": text} for text in HOSTILE), {"text": HOSTILE[0], "image": "1.png"}]
    queries = write_jsonl(tmp_path / "queries.jsonl", asked)
    found = answer(tmp_path / "out", read_queries(queries, model()), model(), k=len(rows))
    write_answers(tmp_path / "page.html", tmp_path / "out", corpus, found)
    return tmp_path / "page.html"


def check(dom: str) -> None:
    found = Elements(dom)
    assert not {"script", "b", "i"} & set(found.tags)
    assert found.tags.count("h1") == 1
    assert found.tags.count("article") == len(HOSTILE) + 1
    # Each query's picture and those of three rows below each query, in a small copy.
    assert len(found.pictures) == 3 * (len(HOSTILE) + 1) + 1
    for picture in found.pictures:
        assert picture["src"].startswith("data:image/jpeg;base64,")
        assert picture["alt"].startswith("picture ")
    plain = [text.replace("\0", "") for text in HOSTILE]  # a browser drops such characters
    for text in plain:  # as a query, and below each query
        assert found.texts.count(text) >= len(HOSTILE) + 2 - (text == plain[0])


def test_what_data_say_is_text_on_the_page(page: Path) -> None:
    check(page.read_text(encoding="utf-8").replace("\0", ""))


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_the_page(page: Path, tmp_path: Path) -> None:
    screenshot = tmp_path / "page.png"
    dom = opened(page, tmp_path, f"--screenshot={screenshot}", "--window-size=1200,900")
    check(dom)
    assert "<title>search in " in dom  # no script changed it
    if screenshot.exists():  # some versions write either the page or the picture
        with Image.open(screenshot) as picture:
            shades = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert (80, 90, 90) in {tuple(10 * round(c / 10) for c in shade) for shade in shades}


def test_pictures_are_small_copies() -> None:
    for value in (Image.new("RGBA", (2000, 10)), {"video": [Image.new("L", (9, 999))] * 3}):
        assert len(make_item("", "", value).picture) < 4000
    large = make_item("", "", {"text": "t", "image": Image.new("RGB", (SIDE * 3, SIDE))})
    assert (large.text, large.picture[:5]) == ("t", "data:")
    assert make_item("", "", "text").picture == ""


def test_a_page_replaces_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    write_page(file, "title", [])
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"html=.*page\.html exists; choose another file"):
        write_page(file, "another", [])

    def broken() -> Any:
        yield Section("first", "", [Answer(make_item("query", "", "a"), [])])
        raise ValueError("it broke")

    with pytest.raises(ValueError, match="it broke"):
        write_page(tmp_path / "half.html", "title", broken())
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_another_corpus_is_refused(page: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a text\n")
    found = answer(tmp_path / "out", read_queries(tmp_path / "one.txt", model()), model(), k=2)
    for other in ([{"id": "x", "text": "a"}] * 9, [{"id": "<i>0", "text": "a"}]):
        corpus = write_jsonl(tmp_path / "other.jsonl", other)
        with pytest.raises(ValueError, match=r"other\.jsonl is not what .* was embedded from: its"):
            write_answers(tmp_path / "new.html", tmp_path / "out", corpus, found)
    assert not (tmp_path / "new.html").exists()


def test_queries_from_a_file_are_those_of_calls(page: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes("\ufeffone é\r\n\n two\n".encode())
    (tmp_path / "empty.txt").write_bytes(b"\n")
    asked = list(read_queries(tmp_path / "q.txt", model()))
    assert asked == [("0", "one é"), ("1", " two")]
    together = answer(tmp_path / "out", asked, model(), k=3)
    for one, alone in zip(asked, together, strict=True):
        assert answer(tmp_path / "out", [one], model(), k=3) == [alone]
    assert answer(tmp_path / "out", read_queries(tmp_path / "empty.txt", model()), model()) == []
    (tmp_path / "q.txt").write_bytes(b"good\n\xff\n")
    with pytest.raises(ValueError, match=r"q\.txt, row 1: .*is not text in UTF-8"):
        list(read_queries(tmp_path / "q.txt", model()))
    with pytest.raises(ValueError, match=r"queries\.jsonl, row 0: path 'none\.png' is not in"):
        list(
            read_queries(write_jsonl(tmp_path / "queries.jsonl", [{"image": "none.png"}]), model())
        )


def test_a_picture_that_is_gone_is_said(page: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").unlink()
    hits = answer(tmp_path / "out", [("", {"text": "a"})], model(), k=8)
    write_answers(tmp_path / "new.html", tmp_path / "out", tmp_path / "corpus.jsonl", hits)
    found = Elements((tmp_path / "new.html").read_text())
    assert len(found.pictures) == 2
    assert sum("the picture cannot be read" in text for text in found.texts) == 1


@pytest.fixture
def worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluation, "model_fingerprint", lambda model: type(model).__name__)
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    images.mkdir()
    for name, colour in {"red": (255, 0, 0), "pink": (255, 0, 90), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (40, 40), colour).save(images / f"{name}.png")
    write(
        data,
        "colours",
        ("red <b>thing", "", ["", ""], ["red.png", "blue.png"]),  # right
        ("red thing", "", ["", "", "green"], ["blue.png", "pink.png", ""]),  # wrong, by 0.9
        ("blue thing", "", ["green <b>", ""], ["", "blue.png"]),  # wrong, by 1
        ("red thing", "", ["", "red"], ["red.png", ""]),  # a tie: wrong
    )
    write(data, "easy", ("red", "", ["red", "blue"], ["", ""]))
    return tmp_path


def test_the_worst_rows_of_an_evaluation(worst: Path) -> None:
    where = {"data": worst / "data", "images": worst / "images"}
    results = evaluate(ByColour(), ["colours", "easy"], **where, out=worst / "out")
    assert [miss.row for miss in results[0].worst] == [2, 1, 3]
    assert [(miss.first, miss.rank) for miss in results[0].worst] == [(1, 2), (1, 3), (1, 2)]
    cosine = 255 / np.hypot(255, 90)
    assert results[0].worst[1][2:4] == (pytest.approx(cosine, abs=1e-6), 0.0)
    assert results[1].worst == []
    again = evaluate(ByColour(), ["colours", "easy"], **where, out=worst / "out")
    assert again == results
    write_misses(worst / "page.html", again, **where)
    found = Elements((worst / "page.html").read_text())
    assert "b" not in found.tags
    assert len(found.pictures) == 1 + 2 + 1
    assert "green <b>" in found.texts
    assert "precision@1 is 25.0 % of 4 rows. These 3 rows fail by the most." in found.texts
    # A result of an earlier version has no such rows.
    write_misses(worst / "old.html", [results[0]._replace(worst=())], **where)
    assert "of an earlier version" in (worst / "old.html").read_text()


def test_a_result_holds_few_rows(worst: Path) -> None:
    rows = [("red thing", "", ["blue", "red", f"green {n}"], ["", "", ""]) for n in range(31)]
    write(worst / "data", "many", *rows)
    (result,) = evaluate(ByColour(), ["many"], data=worst / "data", out=worst / "out")
    assert [miss.row for miss in result.worst] == list(range(20))
    stored = json.loads((worst / "out" / "many.json").read_text())
    assert len(stored["worst"]) == 20
