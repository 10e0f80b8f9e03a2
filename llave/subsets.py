"""Find the subsets in a folder, and read their files with one type per column.

A user's own folder has a file or a folder of files per subset. The hub's tools make other folders:

* a download or a clone, with or without the dataset card that lists its configurations;
* the hub's cache, with links as files;
* the hub's parquet conversion, with a folder per split;
* what ``save_to_disk`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import DatasetCard
from yaml import YAMLError

from llave import limits
from llave.files import LFS_POINTER, left_behind, reading, snapshot
from llave.jsonl import lines, parsed, whole
from llave.opening import Root, opened
from llave.printable import shown

SUFFIXES = (".parquet", ".jsonl", ".json")
PROBLEM = "problem"  # column that says why a row cannot be used, in subsets with such rows
# Data files of other formats. A message says that they are not read.
_UNREAD = (".arrow", ".csv", ".feather", ".gz", ".tar", ".tsv", ".xlsx", ".xz", ".zst")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "dev", "eval")
# Metadata files of the hub and of ``save_to_disk``.
_OTHERS = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")


def subset_files(source: Path, names: list[str] | None, split: str) -> dict[str, list[Path]]:
    """Return each subset's files, or its folder where ``save_to_disk`` wrote it.

    Hidden entries, files that systems make and folders without data files are passed over.

    Args:
        source: the folder.
        names: the subsets to return, or None for all.
        split: the split to take where files state theirs. They do so by their names
            (``SPLIT-00000-of-00001.parquet``, ``SPLIT/0000.parquet``) or in the folder's dataset
            card.

    Raises:
        ValueError: no subsets, an unknown name, two of the same name, or other splits only.
    """
    folder = snapshot(source)
    found = _of_card(folder)
    if not found or set(names or ()) - set(found):
        found = _of_names(folder, split) | found
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{source} holds no {', '.join(SUFFIXES)} files; there is {shown(there)}")
    for name in names or ():
        if name not in found:
            raise ValueError(f"{name} is not in {source}; there are {shown(', '.join(found))}")
    if names is None:
        _say_unread(folder)
    chosen = {name: found[name] for name in (names if names is not None else found)}
    return {name: _of_split(name, parts, split) for name, parts in chosen.items()}


def has_splits(source: Path) -> bool:
    """Whether any file of a folder states its split."""
    folder = snapshot(source)
    return any(
        label or _SHARD.fullmatch(file.stem) or (file / "dataset_dict.json").is_file()
        for parts in (_of_card(folder) | _of_names(folder, "")).values()
        for label, files in parts.items()
        for file in files
    )


def read_files(files: list[Path], columns: Features, split: str) -> Dataset:
    """Read a subset's files into one dataset with those of ``columns`` that the files have.

    Text columns accept numbers too. A JSON row may have other values, or text that is not valid
    Unicode. The dataset then has a column ``problem`` that says so for the row. A file may have
    none of the columns. The dataset then has an empty ``problem`` column.

    Raises:
        ValueError: a file cannot be read, a column has another type, or there are no rows.
    """
    parts = [_read(file, columns, split) for file in files]
    there = [name for name in (*columns, PROBLEM) if any(name in p.column_names for p in parts)]
    if not sum(map(len, parts)):
        raise ValueError(f"{', '.join(map(str, files))}: there are no rows")
    return concatenate_datasets([_completed(part, there, columns) for part in parts if len(part)])


def typed(rows: Dataset, columns: Features, where: object) -> Dataset:
    """Return a dataset with those of ``columns`` that it has, cast to their types.

    Raises:
        ValueError: a column has a type that is not accepted. The message names it.
    """
    if not set(columns) & set(rows.column_names):
        return _without_columns(len(rows))
    rows = rows.select_columns([name for name in columns if name in rows.column_names])
    features = Features({name: columns[name] for name in rows.column_names})
    _check_types(rows.features.arrow_schema, columns, where)
    return rows if rows.features == features else rows.cast(features)


def aligned(parts: list[Dataset]) -> list[Dataset]:
    """Cast datasets so that columns of the same name have the same type.

    A null column takes the type of the others. Large strings become strings.
    """
    kinds: dict[str, Any] = {}
    for part in parts:
        for name, kind in part.features.items():
            if kinds.get(name, Value("null")) == Value("null"):
                kinds[name] = Value("string") if kind == Value("large_string") else kind
    wanted = [Features({name: kinds[name] for name in part.column_names}) for part in parts]
    return [
        part if part.features == features else part.cast(features)
        for part, features in zip(parts, wanted, strict=True)
    ]


def _of_card(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the existing files that a dataset card lists, by configuration and split."""
    card = folder / "README.md"
    try:
        known = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
    except (ValueError, OSError, RecursionError, YAMLError):  # it is no dataset card
        return {}
    try:
        found = {
            str(configuration.get("config_name", "default")): _listed(folder, configuration)
            for configuration in known.get("configs") or []
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{card}: its configs are not as the hub has them ({error!r}); mend or remove them"
        ) from error
    return {name: parts for name, parts in found.items() if parts}


def _listed(folder: Path, configuration: dict[str, Any]) -> dict[str, list[Path]]:
    """Return the existing files of a configuration, by split."""
    listed = configuration.get("data_files") or []
    if not listed and "data_dir" in configuration:
        return _of_folder(_inside(folder, configuration["data_dir"]))
    if isinstance(listed, dict):
        listed = [{"split": part, "path": path} for part, path in listed.items()]
    parts: dict[str, list[Path]] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        local = [path for path in paths if "://" not in path and not Path(path).is_absolute()]
        # On the hub a final ** matches files. In pathlib it matches folders.
        patterns = [f"{path}/*" if path.endswith("**") else path for path in local]
        for pattern in patterns:
            _inside(folder, pattern)
        found = (file for pattern in patterns for file in folder.glob(pattern))
        files = {_inside(folder, file) for file in found if _is_data(file)}
        if files:
            parts.setdefault(entry["split"], []).extend(sorted(files))
    return parts


def _inside(folder: Path, path: str | Path) -> Path:
    """Return a path that a file in a folder names. Raise ValueError where it leads out of it."""
    if not Root(folder, "source").holds(path):
        raise ValueError(f"{folder} names {str(path)!r}, which is outside of it; remove the entry")
    return folder / path


def _of_names(folder: Path, split: str) -> dict[str, dict[str, list[Path]]]:
    """Return a folder's files by subset and split. The split is "" where no name states it."""
    if _is_saved(folder):
        return {folder.name: {"": [folder]}}
    found: dict[str, dict[str, list[Path]]] = {}
    shards: set[str] = set()
    for path in sorted(folder.iterdir()):
        if left_behind(path.name):
            continue
        if path.is_dir():
            if path.name.startswith("datasets--") and (path / "snapshots").is_dir():
                raise ValueError(f"{folder} is the hub's cache; pass a folder in it, e.g. {path}")
            name, parts = path.name, _of_folder(path)
        elif _is_data(path):
            shard = _SHARD.fullmatch(path.stem)
            name, parts = shard[1] if shard else path.stem, {"": [path]}
            if shard and name in shards and found[name][""][0].suffix == path.suffix:
                found[name][""].append(path)
                continue
            shards |= {name} if shard else set()
        else:
            continue
        if not parts:
            continue
        if name in found:
            first, *_ = next(iter(found[name].values()))
            raise ValueError(
                f"{shown(first)} and {shown(path)} would both be the subset {shown(name)}; rename "
                "or move one"
            )
        found[name] = parts
    # Shard files directly in the folder are the splits of one dataset, so only one is taken.
    others = shards - {split} if split in shards else set()
    return {name: parts for name, parts in found.items() if name not in others}


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name not in _OTHERS and path.is_file()


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def _say_unread(folder: Path) -> None:
    unread = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _UNREAD
        and not any(map(left_behind, path.relative_to(folder).parts))
        and not _is_saved(path.parent)
    ]
    if unread:
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        names = ", ".join(unread[:8])
        print(shown(f"{folder}: not read: {names}{more}; only {', '.join(SUFFIXES)} are"))


def _of_folder(folder: Path) -> dict[str, list[Path]]:
    if _is_saved(folder):
        return {"": [folder]}
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        if _is_data(file) and not any(map(left_behind, inside)):
            shard = _SHARD.fullmatch(file.stem)
            label = inside[0] if len(inside) > 1 else shard[1] if shard else ""
            found.setdefault(label, []).append(file)
    return found


def _of_split(name: str, parts: dict[str, list[Path]], split: str) -> list[Path]:
    if split in parts and "" not in parts:
        return _whole(name, parts[split])
    (label, files), *more = parts.items()
    if not more and label not in _SPLITS:
        return _whole(name, files)
    splits = ", ".join(label or parts[""][0].name for label in parts)
    raise ValueError(
        f"subset {shown(name)} has files of {shown(splits)}; split={split!r} must be one of them: "
        "choose it (data.split of a recipe), or keep only the files to read"
    )


def _whole(name: str, files: list[Path]) -> list[Path]:
    """Return the files. Print a line where the shard names say that some are missing."""
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.stem))]
    number = sum({shard[1]: int(shard[2]) for shard in shards}.values())
    if len(shards) < number:
        print(shown(f"{name}: {len(shards)} of {number} files are there, the first {files[0]}"))
    return files


def _read(file: Path, columns: Features, split: str) -> Dataset:
    if file.is_dir():
        return _read_saved(file, columns, split)
    with opened(file) as source:
        head = source.read(64)
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{file} is a pointer of git-lfs, not yet the file: git lfs pull")
    if file.suffix.lower() != ".parquet":
        return _read_json(file, columns)
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no whole parquet file ({error}); get it again") from error
    limits.check_parquet(metadata, columns, file)
    schema = metadata.schema.to_arrow_schema()
    _check_types(schema, columns, file)
    there = Features({name: columns[name] for name in columns if name in schema.names})
    if not there or not metadata.num_rows:
        return _without_columns(metadata.num_rows)
    with reading(file):
        return load_dataset(
            "parquet",
            data_files=[str(file)],
            columns=list(there),
            features=there,
            split="train",
            batch_size=1000,  # not all rows of a group at once
        )


def _read_saved(folder: Path, columns: Features, split: str) -> Dataset:
    """Read what ``save_to_disk`` wrote. All its files must be inside the folder."""
    with reading(folder):
        if (folder / "dataset_dict.json").is_file():
            there = _json_file(folder / "dataset_dict.json")["splits"]
            if split not in there:
                raise ValueError(
                    f"{folder} has the splits {shown(', '.join(there))}, not {split!r}"
                )
            folder = _inside(folder, split)
        for entry in _json_file(folder / "state.json")["_data_files"]:
            _inside(folder, entry["filename"])
        rows = typed(load_from_disk(folder), columns, folder)
        # Arrow files are mapped without checks. A bad offset would read memory outside of them.
        rows.data.table.validate(full=True)
    return rows


def _json_file(file: Path) -> Any:
    with opened(file) as source:
        return whole(source)


def _without_columns(count: int) -> Dataset:
    return Dataset(pa.table({PROBLEM: pa.nulls(count, pa.string())}))


def _check_types(schema: pa.Schema, columns: Features, where: object) -> None:
    for name in set(schema.names) & set(columns):
        found, wanted = schema.field(name).type, columns[name]
        kind = "text"
        if not isinstance(wanted, Value):
            kind = "lists of texts"
            if not pa.types.is_null(found):
                found = getattr(found, "value_type", pa.struct([]))
        if pa.types.is_dictionary(found):
            found = found.value_type
        plain = (pa.types.is_null, pa.types.is_string, pa.types.is_large_string)
        numbers = (pa.types.is_integer, pa.types.is_floating)
        if str(found) != "string_view" and not any(is_it(found) for is_it in plain + numbers):
            raise ValueError(
                f"{where}: column {name} is of type {schema.field(name).type}; it must hold {kind}"
            )


def _completed(part: Dataset, names: list[str], columns: Features) -> Dataset:
    for name in names:
        if name not in part.column_names:
            kind = columns.get(name, Value("string"))
            part = part.add_column(name, [None] * len(part), feature=kind)
    return part.select_columns(names)


def _read_json(file: Path, columns: Features) -> Dataset:
    """Read a JSON file into memory, in chunks. Large data sets are parquet."""
    features = Features({**columns, PROBLEM: Value("string")})
    seen: set[str] = set()
    batches = []
    rows = (_json_row(value, columns, seen) for value in _json_values(file))
    while chunk := list(islice(rows, 10_000)):
        batches.append(pa.RecordBatch.from_pylist(chunk, features.arrow_schema))
    table = pa.Table.from_batches(batches, features.arrow_schema)
    return Dataset(table).select_columns([n for n in features if n in seen] or [PROBLEM])


def _json_values(file: Path) -> Iterator[Any]:
    """Yield the rows of a JSONL file or a JSON list, with an error for a line that is not JSON."""
    with opened(file) as source:
        head = source.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        source.seek(3 if source.seek(0) == 0 and source.read(3) == b"\xef\xbb\xbf" else 0)
        pretty = file.suffix.lower() == ".json" and head[:2] in (b"{\n", b"{\r")
        if pretty or head[:1] == b"[":
            try:
                found = whole(source)
            except ValueError as error:
                raise ValueError(f"{file} is not JSON ({error}); get it again") from error
            yield from found if isinstance(found, list) else [found]
            return
        for line in lines(source):
            if line.strip():
                try:
                    yield parsed(line)
                except ValueError as error:
                    yield error


def _json_row(value: Any, columns: Features, seen: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        seen.add(PROBLEM)
        said = f"{value}" if isinstance(value, Exception) else f"{value!r}"
        return {PROBLEM: f"it is no JSON object: {said:.80}"}
    there = [name for name in columns if name in value]
    seen.update(there)
    row = {}
    try:
        for name in there:
            row[name] = _text(value[name], name, isinstance(columns[name], Value))
    except ValueError as error:
        seen.add(PROBLEM)
        return {PROBLEM: str(error)}
    return row


def _text(value: Any, name: str, single: bool) -> Any:
    if value is None or value != value:  # NaN: some tools write it for a missing value
        return None
    if not single:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list of texts, got {value!r:.80}")
        return [_text(item, name, True) for item in value]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{name} must be a text, got {value!r:.80}")
    value = str(value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {value!r:.80}") from error
    return value
