"""The emoji dataset: MMEB's format, splits without leaks, fair candidates, reproducible builds.

The tests make packages in the layout of the real ones. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).parents[2] / "examples" / "emoji" / "build.py"
VENDORS = ("google", "twitter", "facebook")
TASKS = ("text_to_image", "image_to_text", "image_to_image", "category")
HELD_OUT = ("text_to_image_held_out", "image_to_image_held_out")
IMAGE = "<|image_1|>\n"
TRAIN_NAMES = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
EVAL_NAMES = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]

# Each line is a concept: the code sequences and names of its variants. People also come in two skin
# tones.
PEOPLE = [
    {"1F9D1-200D-1F33E": "FARMER", "1F468-200D-1F33E": "MAN FARMER", "1F469-200D-1F33E": "HER"},
    {"1F9D1-200D-1F373": "COOK", "1F469-200D-1F373": "WOMAN COOK"},
    {"1F3C3": "RUNNER", "1F3C3-200D-2642-FE0F": "MAN RUNNING"},
    {"1F385": "FATHER CHRISTMAS", "1F9D1-200D-1F384": "MX CLAUS"},
]  # fmt: skip
THINGS = [
    {"1F408": "CAT"},
    {"1F415": "DOG"},
    {"1F1F3-1F1F4": "Norway Flag", "1F1E7-1F1FB": "Bouvet Island Flag"},  # drawn alike
    {"1F534": "RED CIRCLE", "2B55": "Red-Circle"},  # named alike
    {"2640-FE0F": "FEMALE SIGN"},
    {"2642-FE0F": "MALE SIGN"},
    {"1F427": "PENGUIN"},
    {"1F5FF": "MOYAI"},
    {"1F4A7": "DROPLET"},
    {"27A1-FE0F": "BLACK RIGHTWARDS ARROW"},
    {"1F980": "CRAB"},
]
ALIKE = {"1f1e7-1f1fb": "1f1f3-1f1f4"}
CONCEPTS = {
    code.lower(): number
    for number, variants in enumerate([*PEOPLE, *THINGS])
    for code in variants
}  # fmt: skip


def png(code: str, vendor: str) -> bytes:
    """A picture that is different for each emoji and vendor."""
    color = hashlib.sha256(f"{vendor} {ALIKE.get(code, code)}".encode()).digest()
    mode = "RGBA" if color[4] % 2 else "RGB"
    file = io.BytesIO()
    Image.new(mode, (4, 4), tuple(color[: len(mode)])).save(file, "png")
    return file.getvalue()


def listed(unified: str) -> dict[str, Any]:
    has = {f"has_img_{vendor}": (vendor, unified) != ("facebook", "1F408") for vendor in VENDORS}
    return {"unified": unified, "image": f"{unified.lower()}.png", **has}


def write_package(folder: Path, vendor: str, leave_out: str = "") -> None:
    entries, files = [], {f"package/img/{vendor}/sheets/32.png": b"not wanted"}
    for number, variants in enumerate([*PEOPLE, *THINGS]):
        kind = ("People & Body", "person") if number < len(PEOPLE) else ("Things", f"k{number % 2}")
        for unified, name in variants.items():
            entry = {"name": name, "category": kind[0], "subcategory": kind[1], **listed(unified)}
            if number < len(PEOPLE):
                first, *rest = unified.split("-")
                tones = ("1F3FB", "1F3FF")
                entry["skin_variations"] = {
                    tone: listed("-".join([first, tone, *rest])) for tone in tones
                }
            entries.append(entry)
            for form in (entry, *entry.get("skin_variations", {}).values()):
                code = form["image"].removesuffix(".png")
                if form[f"has_img_{vendor}"] and code != leave_out:
                    files[f"package/img/{vendor}/64/{code}.png"] = png(code, vendor)
    files["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(
        folder / f"emoji-datasource-{vendor}-16.0.0.tgz", "w:gz", compresslevel=0
    ) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def run(*arguments: object, path: object = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments), "--vendors", *VENDORS],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": str(path)},  # hides npm unless a test brings one
        timeout=120,
    )


def read(out: Path, table: str) -> list[dict[str, Any]]:
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def concept(path: str) -> int:
    """The concept of an image path or code."""
    parts = Path(path).stem.split("-")
    return CONCEPTS["-".join(part for part in parts if part not in ("1f3fb", "1f3ff"))]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for vendor in VENDORS:
        write_package(folder, vendor)
    return folder


@pytest.fixture(scope="module")
def dataset(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "emoji"
    done = run(out, "--packages", packages)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module", params=range(1, 4))
def any_seed(
    request: pytest.FixtureRequest, packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Datasets of several seeds, for checks that must hold with any seed."""
    out = tmp_path_factory.mktemp("data") / "emoji"
    done = run(out, "--packages", packages, "--seed", request.param)
    assert done.returncode == 0, done.stderr
    return out


def test_format(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert {path.stem for path in (dataset / "train").iterdir()} == set(TASKS)
    assert {path.stem for path in (dataset / "eval").iterdir()} == {*TASKS, *HELD_OUT}
    assert [path.name for path in dataset.parent.iterdir()] == ["emoji"]  # no leftovers beside it
    tables = [path.relative_to(dataset) for path in dataset.glob("*/*.parquet")]
    counts = {str(table.with_suffix("")): pq.read_metadata(dataset / table) for table in tables}
    assert manifest["rows"] == {name: found.num_rows for name, found in counts.items()}
    assert manifest["concepts"] == {"eval": 3, "train": 12}

    def check(text: str, path: str) -> None:
        assert text.startswith(IMAGE) == bool(path)
        assert text
        if path:
            assert (dataset / "images" / path).read_bytes() == png(*reversed(path[:-4].split("/")))

    for task in TASKS:
        rows = read(dataset, f"train/{task}")
        assert all(list(row) == TRAIN_NAMES for row in rows)
        for row in rows:
            check(row["qry"], row["qry_image_path"])
            check(row["pos_text"], row["pos_image_path"])
            if row["neg_text"] or row["neg_image_path"]:
                check(row["neg_text"], row["neg_image_path"])
        assert any(row["neg_text"] for row in rows)
    for task in (*TASKS, *HELD_OUT):
        for row in read(dataset, f"eval/{task}"):
            assert list(row) == EVAL_NAMES
            check(row["qry_text"], row["qry_img_path"])
            for side in zip(row["tgt_text"], row["tgt_img_path"], strict=True):
                check(*side)


def test_what_the_tasks_ask(dataset: Path) -> None:
    names = {
        code.lower(): name.lower()
        for variants in (*PEOPLE, *THINGS)
        for code, name in variants.items()
    }

    def name(path: str) -> str:
        parts = Path(path).stem.split("-")
        tones = {"1f3fb": "light", "1f3ff": "dark"}
        base = names["-".join(part for part in parts if part not in tones)]
        return base + "".join(f", {tones[part]} skin tone" for part in parts if part in tones)

    for row in read(dataset, "train/text_to_image"):
        assert row["qry"].endswith(f"given caption: {name(row['pos_image_path'])}")
    for row in read(dataset, "train/image_to_text"):
        assert row["pos_text"] == name(row["qry_image_path"])
    for row in read(dataset, "train/image_to_image"):
        query, target = Path(row["qry_image_path"]), Path(row["pos_image_path"])
        assert query.name == target.name
        assert query.parent != target.parent
    for row in read(dataset, "train/category"):
        person = concept(row["qry_image_path"]) < len(PEOPLE)
        assert row["pos_text"].startswith("People & Body: " if person else "Things: ")
        assert "1f3f" not in row["qry_image_path"]  # no skin tones


def test_hard_negatives_are_variants_where_there_are_any(dataset: Path) -> None:
    for row in read(dataset, "train/text_to_image"):
        right, wrong = row["pos_image_path"], row["neg_image_path"]
        if concept(right) < len(PEOPLE):
            assert concept(wrong) == concept(right)
            assert wrong != right
        elif wrong:
            assert (concept(wrong) - concept(right)) % 2 == 0  # the same subcategory
            assert concept(wrong) != concept(right)


def test_no_concept_and_no_held_out_vendor_leaks(any_seed: Path) -> None:
    trained, evaluated = set(), set()
    for task in TASKS:
        for row in read(any_seed, f"train/{task}"):
            trained |= {row[name] for name in TRAIN_NAMES if name.endswith("path") and row[name]}
    for task in (*TASKS, *HELD_OUT):
        for row in read(any_seed, f"eval/{task}"):
            targets = {path for path in row["tgt_img_path"] if path}
            queries = {row["qry_img_path"]} - {""}
            if task in HELD_OUT:
                assert {Path(path).parent.name for path in targets} == {"facebook"}
                assert not any("facebook" in path for path in queries)
            else:
                assert not any("facebook" in path for path in targets | queries)
            evaluated |= targets | queries
    assert {path.split("/")[0] for path in trained} == {"google", "twitter"}
    assert not {concept(path) for path in trained} & {concept(path) for path in evaluated}


def test_candidates_differ_from_the_right_one(any_seed: Path) -> None:
    def content(text: str, path: str) -> str:
        if path:
            return (any_seed / "images" / path).read_bytes().hex()
        return text.casefold().replace("-", " ")

    for task in (*TASKS, *HELD_OUT):
        for row in read(any_seed, f"eval/{task}"):
            found = [*map(content, row["tgt_text"], row["tgt_img_path"])]
            assert 2 <= len(found) == len(set(found)) <= 50
            if task.startswith("image_to_image"):
                assert Path(row["tgt_img_path"][0]).name == Path(row["qry_img_path"]).name


def test_the_same_arguments_give_the_same_rows(
    dataset: Path, packages: Path, tmp_path: Path
) -> None:  # fmt: skip
    for seed in (0, 1):
        assert run(tmp_path / f"{seed}", "--packages", packages, "--seed", seed).returncode == 0
    for path in dataset.glob("*/*.parquet"):
        table = str(path.relative_to(dataset).with_suffix(""))
        assert read(tmp_path / "0", table) == read(dataset, table)
    assert any(read(tmp_path / "1", f"train/{t}") != read(dataset, f"train/{t}") for t in TASKS)


def test_concepts_limits_the_dataset(packages: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--packages", packages, "--concepts", 10)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["concepts"] == {"eval": 2, "train": 8}
    drawn = {concept(path.name) for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert len(drawn) == 10

    done = run(tmp_path / "tiny", "--packages", packages, "--concepts", 2)
    assert done.returncode == 1
    assert "no rows for" in done.stderr
    assert not (tmp_path / "tiny").exists()


def test_npm_fetches_what_is_missing(packages: Path, tmp_path: Path) -> None:
    have, tools = tmp_path / "have", tmp_path / "bin"
    have.mkdir()
    tools.mkdir()
    write_package(have, "google")
    npm = tools / "npm"
    npm.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "command, package, flag, folder = sys.argv[1:]\n"
        "assert (command, flag) == ('pack', '--pack-destination')\n"
        f"shutil.copy({str(packages)!r} + '/' + package.replace('@', '-') + '.tgz', folder)\n"
    )
    npm.chmod(0o755)
    done = run(tmp_path / "out", "--packages", have, path=tools)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in have.iterdir()} == {path.name for path in packages.iterdir()}

    npm.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such host')\n")
    done = run(tmp_path / "again", path=tools)
    assert done.returncode == 1
    assert "emoji-datasource-google@16.0.0 failed: no such host" in done.stderr


def test_npm_missing(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--packages", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr.startswith("build.py: npm not found: install Node.js")
    assert "emoji-datasource-google-16.0.0.tgz" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "noise", "flipped", "image"])
def test_a_corrupt_package(tmp_path: Path, damage: str) -> None:
    for vendor in VENDORS:
        write_package(tmp_path, vendor)
    path = tmp_path / "emoji-datasource-twitter-16.0.0.tgz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "image":
        write_package(tmp_path, "twitter", leave_out="1f415")
    else:
        image = png("1f415", "twitter")
        flipped = whole.replace(image, bytes(255 - byte for byte in image))
        path.write_bytes({"cut": whole[:middle], "noise": b"noise", "flipped": flipped}[damage])
    done = run(tmp_path / "out", "--packages", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"build.py: {path} cannot be read (")
    assert "delete it and run again" in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".tgz"]


def test_arguments_that_cannot_work(dataset: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert "three different ones" in refused(tmp_path / "a", "--vendors", "google", "twitter")
    assert "three different ones" in refused(tmp_path / "a", "--vendors", *["google"] * 3)
    assert "two or more" in refused(tmp_path / "a", "--concepts", 1)
    assert "exists: remove it" in refused(dataset)
