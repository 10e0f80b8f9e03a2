"""Build a small, real image-text dataset in MMEB's format from the emoji of several vendors.

    python examples/emoji/build.py OUT

Each npm package ``emoji-datasource-<vendor>`` holds one vendor's drawings of the same emoji, with
names and categories. Skin-tone and gender variants are natural hard negatives. A concept is a base
emoji with all its variants. A fifth of the concepts is kept for evaluation. The last vendor's
drawings are never trained on, and the ``*_held_out`` sets ask for them. The drawings belong to the
vendors: read their licences before you pass the result on.

    OUT/images/<vendor>/<code>.png
    OUT/train/<task>.parquet    qry, pos_text, neg_text, each with its ..._image_path
    OUT/eval/<task>.parquet     qry_text, qry_img_path, tgt_text[], tgt_img_path[]; first is right
    OUT/manifest.json           counts, seed, versions
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "16.0.0"
VENDORS = ("google", "twitter", "apple", "facebook")
CANDIDATES = 50  # in an evaluation row; about half of them are hard
EVALUATION_SHARE = 0.2
IMAGE = "<|image_1|>\n"
REPRESENT = IMAGE + "Represent the given image."

TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # fmt: skip
# Variants of one concept differ in these joiners, gender signs and direction signs.
SIGNS = {"FE0F", "200D", "2640", "2642", "27A1"}
# They also differ in gendered characters. Here each has the neutral one of the same concept.
NEUTRAL = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2",  # man, woman, boy, girl
    "1F474": "1F9D3", "1F475": "1F9D3", "1F934": "1FAC5", "1F478": "1FAC5",  # old people, royalty
    "1F930": "1FAC4", "1FAC3": "1FAC4", "1F57A": "1F483",  # pregnant people, dancers
    "1F385": "1F9D1-1F384", "1F936": "1F9D1-1F384",  # Father, Mother and Mx Christmas
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F9D1-1F91D-1F9D1"),  # holding hands
    "1F48F": "1F9D1-2764-1F48B-1F9D1", "1F491": "1F9D1-2764-1F9D1",  # kiss, couple with heart
}  # fmt: skip

TEXT, TEXTS = pa.string(), pa.list_(pa.string())
SIDES = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
TRAIN = pa.schema(dict.fromkeys(SIDES, TEXT))
EVAL = pa.schema({"qry_text": TEXT, "qry_img_path": TEXT, "tgt_text": TEXTS, "tgt_img_path": TEXTS})

Pair = tuple[str, str]
Record = dict[str, Any]
Group = list["Emoji"]


class BuildError(Exception):
    """A mistake that the caller can correct. The message says how."""


@dataclass(frozen=True)
class Emoji:
    code: str
    name: str
    category: str
    label: str  # category and subcategory
    concept: str  # shared by the variants of one base emoji
    meaning: str  # shared by emoji that have the same name or, with some vendor, the same image
    base: bool  # no skin tone
    vendors: frozenset[str]

    def path(self, vendor: str) -> str:
        return f"{vendor}/{self.code}.png"

    def side(self, template: str, vendor: str) -> Pair:
        """The text and the image path of a query or target."""
        return template.format(emoji=self), self.path(vendor) if IMAGE in template else ""


@dataclass(frozen=True)
class Task:
    query: str
    target: str
    identity: str = "meaning"  # emoji that share it have the same right answer
    near: tuple[str, ...] = ("concept", "label")  # hard negatives share one of these, hardest first
    across: bool = False  # query and target come from different vendors


TASKS = {
    "text_to_image": Task(
        "Find me an emoji that matches the given caption: {emoji.name}", REPRESENT
    ),
    "image_to_text": Task(IMAGE + "Represent the given image with a caption.", "{emoji.name}"),
    "image_to_image": Task(IMAGE + "Find the same emoji in another style.", REPRESENT, across=True),
    "category": Task(
        IMAGE + "Represent the given image for classification.",
        "{emoji.label}",
        identity="label",
        near=("category",),
    ),
}


def fetch(vendor: str, folder: Path) -> Path:
    """The vendor's package in ``folder``. It is downloaded where it is not there."""
    package = f"emoji-datasource-{vendor}"
    path = folder / f"{package}-{VERSION}.tgz"
    if path.exists():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise BuildError(
            f"npm not found: install Node.js, or download {package} {VERSION} from the npm registry"
            f" as {path.name} and pass its folder with --packages"
        )
    print(f"downloading {package} {VERSION}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:  # an interrupted one leaves nothing
        command = [npm, "pack", f"{package}@{VERSION}", "--pack-destination", partial]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(command[:3])} failed: {done.stderr.strip()}")
        (Path(partial) / path.name).rename(path)
    return path


def read_package(path: Path, vendor: str) -> tuple[list[Record], dict[str, bytes]]:
    """The entries of ``emoji.json`` and the 64-pixel images by code."""
    images = {}
    wanted = re.compile(rf"package/(?:emoji\.json|img/{vendor}/64/([0-9a-f-]+)\.png)")
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if match := wanted.fullmatch(member.name):
                    images[match[1] or "emoji.json"] = archive.extractfile(member).read()
            stream.seek(0, os.SEEK_END)  # only there is the checksum checked
        entries = json.loads(images.get("emoji.json", b"[]"))
        forms = [form for e in entries for form in (e, *e.get("skin_variations", {}).values())]
        listed = {form["image"].removesuffix(".png") for form in forms if form[f"has_img_{vendor}"]}
        if missing := len((listed or {"all"}) - images.keys()):
            raise ValueError(f"{missing} images that its emoji.json should list are missing")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise BuildError(f"{path} cannot be read ({error}): delete it and run again") from error
    return entries, {code: images[code] for code in listed}


def joined(codes: Iterable[str], groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """The codes joined by ``groups`` into components: each code with its component's least code."""
    parent = {code: code for code in codes}

    def root(code: str) -> str:
        while parent[code] != code:
            parent[code] = code = parent[parent[code]]
        return code

    for group in groups:
        for code in group[1:]:
            low, high = sorted((root(group[0]), root(code)))
            parent[high] = low
    return {code: root(code) for code in parent}


def base_key(unified: str) -> str:
    """A code sequence without the parts in which variants of a concept differ."""
    kept = [NEUTRAL.get(part, part) for part in unified.split("-") if part not in SIGNS]
    return "-".join(kept) or unified  # the gender signs and the arrow are also emoji of their own


def catalogue(entries: list[Record], images: dict[str, dict[str, bytes]]) -> dict[str, Group]:
    """The emoji that at least one vendor draws, by concept."""
    forms: dict[str, tuple[str, Record, bool]] = {}
    groups: dict[Hashable, list[str]] = defaultdict(list)  # variants of one concept
    for entry in entries:
        key = base_key(entry.get("obsoleted_by") or entry["unified"])
        for tones, form in {"": entry, **entry.get("skin_variations", {})}.items():
            code = form["image"].removesuffix(".png")
            name = entry["name"].lower()
            if tones:  # a tone that both of a couple have is named once
                tone = " and ".join(TONES[tone] for tone in dict.fromkeys(tones.split("-")))
                name += f", {tone} skin tone"
            if any(code in drawn for drawn in images.values()):
                forms[code] = name, entry, not tones
                groups[key].append(code)
    alike: dict[Hashable, list[str]] = defaultdict(list)
    for code, (name, _, _) in forms.items():
        plain = unicodedata.normalize("NFKC", name).casefold()
        alike[re.sub(r"[\W_]+", " ", plain).strip()].append(code)
    for vendor, drawn in images.items():
        for code, content in drawn.items():
            alike[vendor, content].append(code)
    meanings = joined(forms, map(sorted, alike.values()))
    concepts = joined(forms, [*groups.values(), *([code, meanings[code]] for code in forms)])

    found = defaultdict(list)
    for code, (name, entry, base) in sorted(forms.items()):
        label = f"{entry['category']}: {entry['subcategory']}"
        vendors = frozenset(vendor for vendor, drawn in images.items() if code in drawn)
        known = concepts[code], meanings[code], base, vendors
        found[concepts[code]].append(Emoji(code, name, entry["category"], label, *known))
    return found


def pose(
    task: Task, emoji: Group, pool: Group, pairs: list[Pair], training: bool, rng: random.Random
) -> list[Record]:
    """The rows of one table.

    For training there is one row per emoji and query vendor, with a hard negative. For evaluation
    there is one row per emoji, with candidates.

    Args:
        emoji: what the rows ask for.
        pool: where wrong answers come from.
        pairs: (query vendor, target vendor).
    """
    groups: dict[tuple[str, str], Group] = defaultdict(list)
    for one in pool:
        for shared in task.near:
            groups[shared, getattr(one, shared)].append(one)
    # The most wrong answers that there may be after each pool.
    limits = [CANDIDATES // 2 * n // len(task.near) for n in range(1, len(task.near) + 1)]
    limits = [1 for _ in limits] if training else [*limits, CANDIDATES - 1]

    def wrong(right: Emoji, vendor: str) -> Group:
        """Distinct wrong answers, hard ones first. For evaluation, more from the whole pool."""
        pools = [groups[shared, getattr(right, shared)] for shared in task.near] + [pool]
        seen = {getattr(right, task.identity)}
        found: Group = []
        for near, limit in zip(pools, limits, strict=False):
            for other in rng.sample(near, len(near)) if len(found) < limit else ():
                identity = getattr(other, task.identity)
                if len(found) < limit and vendor in other.vendors and identity not in seen:
                    seen.add(identity)
                    found.append(other)
        return found

    rows: list[Record] = []
    for one in emoji:
        drawn = [pair for pair in pairs if one.vendors.issuperset(pair)]
        rng.shuffle(drawn)
        for query, target in dict(drawn).items() if training else drawn[:1]:
            asked = one.side(task.query, query)
            answers = [other.side(task.target, target) for other in (one, *wrong(one, target))]
            if training:
                columns = *asked, *answers[0], *(answers[1] if len(answers) > 1 else ("", ""))
                rows.append(dict(zip(TRAIN.names, columns, strict=True)))
            elif len(answers) > 1:  # with one candidate every answer would be right
                texts, paths = map(list, zip(*answers, strict=True))
                rows.append(dict(zip(EVAL.names, (*asked, texts, paths), strict=True)))
    return rng.sample(rows, len(rows)) if training else rows


def build(
    out: Path, vendors: Sequence[str], concepts: int | None, seed: int, packages: Path
) -> Record:
    """Write the data set to ``out``. Returns its manifest."""
    images = {}
    for vendor in vendors:
        entries, images[vendor] = read_package(fetch(vendor, packages), vendor)
    found = catalogue(entries, images)  # emoji.json is the same in every package of a version
    chosen = random.Random(seed).sample(list(found), min(concepts or len(found), len(found)))
    count = max(1, round(EVALUATION_SHARE * len(chosen)))
    split = {"eval": sorted(chosen[:count]), "train": sorted(chosen[count:])}
    emoji = {name: [one for concept in split[name] for one in found[concept]] for name in split}

    held_out = vendors[-1]
    tables: dict[str, list[Record]] = {}
    for name, task in TASKS.items():
        pairs = [(a, b) for a in vendors for b in vendors if (a != b) == task.across]
        seen = [pair for pair in pairs if held_out not in pair]
        sets = {f"train/{name}": seen, f"eval/{name}": seen}
        if task.target == REPRESENT:
            sets[f"eval/{name}_held_out"] = [pair for pair in pairs if pair[1] == held_out]
        for table, pairs in sets.items():
            training = table.startswith("train/")
            asked = pool = emoji["train" if training else "eval"]
            if task.identity == "label":
                # Skin tones would only add weight to people. Concepts share labels.
                asked = [one for one in asked if one.base]
                pool = asked if training else [one for ones in emoji.values() for one in ones]
            rng = random.Random(f"{seed}/{table}")  # no table depends on the others
            tables[table] = pose(task, asked, pool, pairs, training, rng)
    if empty := sorted(table for table, rows in tables.items() if not rows):
        raise BuildError(f"no rows for {', '.join(empty)}: raise --concepts")
    manifest = {
        "packages": [f"emoji-datasource-{vendor}@{VERSION}" for vendor in vendors],
        "held_out_vendor": held_out,
        "seed": seed,
        "concepts": {name: len(names) for name, names in split.items()},
        "emoji": {name: len(ones) for name, ones in emoji.items()},
        "rows": {table: len(rows) for table, rows in sorted(tables.items())},
    }

    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    partial = beside / "whole"  # which is renamed
    try:
        for vendor in vendors:
            (partial / "images" / vendor).mkdir(parents=True)
            for one in emoji["train"] + emoji["eval"]:
                if vendor in one.vendors:
                    (partial / "images" / one.path(vendor)).write_bytes(images[vendor][one.code])
        for table, rows in tables.items():
            path = partial / f"{table}.parquet"
            path.parent.mkdir(exist_ok=True)
            schema = TRAIN if table.startswith("train/") else EVAL
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        partial.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("out", type=Path, help="folder to create")
    add("--vendors", nargs="+", choices=VENDORS, default=VENDORS, help="the last is held out")
    add("--concepts", type=int, help="take only so many of them")
    add("--seed", type=int, default=0)
    add("--packages", type=Path, help="folder to find the packages in, and to keep downloads in")
    args = parser.parse_args()
    if len(set(args.vendors)) < max(3, len(args.vendors)):
        parser.error("--vendors: three different ones or more: two to train on, one held out")
    if args.concepts is not None and args.concepts < 2:
        parser.error("--concepts: two or more")
    if args.out.exists():
        parser.error(f"{args.out} exists: remove it or name another folder")
    with tempfile.TemporaryDirectory() as downloads:
        packages = args.packages or Path(downloads)
        try:
            packages.mkdir(parents=True, exist_ok=True)
            manifest = build(args.out, args.vendors, args.concepts, args.seed, packages)
        except BuildError as error:
            sys.exit(f"build.py: {error}")
    print(json.dumps(manifest, indent=2))


if __name__ == "__main__":
    main()
