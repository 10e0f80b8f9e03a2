"""From subsets to the batches of an epoch: what is held out, mixed, and left over."""

from __future__ import annotations

from datasets import Dataset, concatenate_datasets

from llave.subsets import aligned


def hold_out(
    subsets: dict[str, Dataset], size: int, *, seed: int
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Split each subset into training rows and ``size`` held-out pairs. With 0, none is held out.

    Raises:
        ValueError: a subset has no more than ``size`` rows.
    """
    if not size:
        return subsets, {}
    parts = {}
    for name, subset in subsets.items():
        if len(subset) <= size:
            raise ValueError(
                f"data.held_out={size} leaves nothing of subset {name}, which has "
                f"{len(subset)} rows; lower it"
            )
        parts[name] = subset.train_test_split(test_size=size, seed=seed)
    train, test = ({name: part[kind] for name, part in parts.items()} for kind in ("train", "test"))
    return train, test


def unused_rows(
    rows: dict[str, int], batch_size: int, *, homogeneous: bool, round_robin: bool = False
) -> list[str]:
    """Return a line for each subset that has rows in no batch of an epoch.

    Args:
        rows: rows of each subset.
        batch_size: rows per batch. Partial batches are dropped.
        homogeneous: whether each batch comes from one subset.
        round_robin: whether every subset gives as many batches as the smallest.

    Raises:
        ValueError: there is no whole batch.
    """
    rows, batches = (
        _by_batch(rows, homogeneous),
        whole_batches(rows, batch_size, homogeneous=homogeneous, round_robin=round_robin),
    )
    if not any(batches.values()):
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ValueError(
            f"data.batch_size={batch_size}: nothing would be trained, there is no whole batch "
            f"(rows: {counts}); lower it"
        )
    lines = []
    for name, count in rows.items():
        why = f"they make no whole batch of {batch_size}"
        if batches[name]:
            why = f"an epoch, which draws anew, has {batches[name]} whole batches of {batch_size}"
        if left := count - batches[name] * batch_size:
            lines.append(f"{name}: {left} of {count} rows never appear; {why}")
    return lines


def whole_batches(
    rows: dict[str, int], batch_size: int, *, homogeneous: bool, round_robin: bool = False
) -> dict[str, int]:
    """Return the number of whole batches in an epoch, by subset. The arguments are as above.

    Where batches mix the subsets, the only entry is ``all subsets``.
    """
    batches = {name: count // batch_size for name, count in _by_batch(rows, homogeneous).items()}
    if round_robin and homogeneous:
        batches = dict.fromkeys(batches, min(batches.values()))
    return batches


def _by_batch(rows: dict[str, int], homogeneous: bool) -> dict[str, int]:
    return rows if homogeneous else {"all subsets": sum(rows.values())}


def joined(subsets: dict[str, Dataset]) -> Dataset:
    """Join all subsets into one dataset, for batches that mix them.

    Raises:
        ValueError: the subsets have different columns.
    """
    columns = {name: sorted(subset[0]) for name, subset in subsets.items()}
    if len({tuple(names) for names in columns.values()}) > 1:
        raise ValueError(
            "subsets mixed in a batch must give the same columns; load them without negatives. "
            f"They give {columns}"
        )
    first, *_ = subsets.values()
    whole = concatenate_datasets(aligned(list(subsets.values())))
    if first.format["type"] == "custom":
        whole.set_transform(first.format["format_kwargs"]["transform"])
    return whole
