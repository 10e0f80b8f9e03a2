"""The road from inputs to embeddings: ``embed``, ``evaluate`` and ``search`` take it.

Worker processes of torch's DataLoader read and preprocess the next batches while the device works
on one. Batches are planned before they are read, so the number of workers changes no embedding.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize as unit
from torch.utils.data import DataLoader

from llave import limits
from llave.batching import Lengths, planned
from llave.media import pixel_count

REFUSALS = (ValueError, TypeError, TemplateError)  # what a model raises for an input it refuses
MOST_WORKERS = 4  # by default. A worker holds up to two batches of preprocessed images
PR_SET_PDEATHSIG = 1  # Linux's number
_TOKENIZERS = "TOKENIZERS_PARALLELISM"


class Failure(NamedTuple):
    """Why an item has no embedding.

    Attributes:
        kind: the name of the error's type.
        reason: its message.
    """

    kind: str
    reason: str


class Encoded(NamedTuple):
    """An item with its embedding.

    Attributes:
        item: the item.
        id: what ``load`` called it, or None where ``load`` failed.
        found: (D,) float32 embedding, or the failure.
    """

    item: Any
    id: str | None
    found: np.ndarray | Failure


class _Prepared(NamedTuple):
    """A batch that has been read: ids, and parts of places with their features or one's failure."""

    ids: list[str | None]
    parts: list[tuple[list[int], dict[str, Any] | Failure]]


class Encoder:
    """Embeds batches of items with a model.

    A float32 model computes in bfloat16 on a GPU that has it, by autocast. Elsewhere it computes in
    the dtype of its weights. A batch that does not fit into memory is encoded by halves, and one
    line says so.

    Args:
        model: the model, on the device to use.
        load: returns an item's id and its input for ``model.encode``. It runs in a worker process,
            and may raise any error.
        prompt: as in ``model.encode``.
        normalize: whether embeddings are scaled to length 1. True by default.
        workers: number of processes that read ahead. 0 reads in this process. Default:
            ``default_workers``.

    Raises:
        ValueError: ``workers`` is negative.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        load: Callable[[Any], tuple[str, Any]],
        *,
        prompt: str | None = None,
        normalize: bool = True,
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self._model, self._normalize = model, normalize
        if prompt is None and model.default_prompt_name is not None:
            prompt = model.prompts.get(model.default_prompt_name)
        self._reader = _Reader(model, load, prompt)
        self._workers = default_workers() if workers is None else workers
        self._precision = _precision(model)
        self._said = False

    @property
    def dimension(self) -> int:
        """The number of values of an embedding."""
        return dimension_of(self._model)

    def run(self, batches: Iterable[list[Any]]) -> Iterator[list[Encoded]]:
        """Yield the batches, encoded, in their order. Batches are taken a few ahead.

        Raises:
            RuntimeError: a single item does not fit into the memory, or a worker was killed.
        """
        self._model.eval()
        taken: deque[list[Any]] = deque()
        before: tuple[list[Any], list[str | None], Any] | None = None
        for prepared in self._loaded(batches, taken):
            batch = taken.popleft()
            launched = batch, prepared.ids, self._outcomes(batch, range(len(batch)), prepared)
            # A GPU works on this batch while the one before is fetched.
            if before is not None:
                yield _fetched(*before)
            before = launched
        if before is not None:
            yield _fetched(*before)

    def _loaded(self, batches: Iterable[list[Any]], taken: deque[list[Any]]) -> Iterator[_Prepared]:
        def noted() -> Iterator[list[Any]]:
            for batch in batches:
                taken.append(batch)
                yield batch

        forked: dict[str, Any] = {}
        if self._workers:
            # A forked worker has the model without a copy. It uses only the processor.
            context = {"multiprocessing_context": "fork", "worker_init_fn": _follow}
            forked = {"prefetch_factor": 2, **context}
        loader: DataLoader[Any] = DataLoader(
            self._reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=noted(),
            num_workers=self._workers,
            pin_memory=self._model.device.type == "cuda",
            **forked,
        )
        said = os.environ.get(_TOKENIZERS)
        os.environ[_TOKENIZERS] = "false"  # else the tokenizers in forked workers print a warning
        try:
            reading = iter(loader)
        finally:
            del os.environ[_TOKENIZERS]
            if said is not None:
                os.environ[_TOKENIZERS] = said
        yield from reading

    def _outcomes(
        self, batch: list[Any], places: Sequence[int], prepared: _Prepared
    ) -> list[tuple[list[int], Tensor | Failure]]:
        """Run the model on a batch's parts, or on the halves of a part that fails.

        Args:
            batch: the whole batch.
            places: the places in it of what was prepared.
            prepared: the parts.
        """
        found: list[tuple[list[int], Tensor | Failure]] = []
        for part, features in prepared.parts:
            here = [places[i] for i in part]
            if isinstance(features, Failure):
                found.append((here, features))
                continue
            try:
                found.append((here, self._forward(features)))
                continue
            except Exception as error:
                full = out_of_memory(error)
                if not full and not isinstance(error, REFUSALS):
                    raise
                if len(here) == 1:
                    if full:
                        raise
                    found.append((here, _failure(error)))
                    continue
                said = " ".join(str(error).split())
            if full:
                self._say(len(here), said)
            for half in (here[: len(here) // 2], here[len(here) // 2 :]):
                again = self._reader[[batch[i] for i in half]]
                found += self._outcomes(batch, half, again)
        return found

    def _say(self, count: int, error: str) -> None:
        clear_device_cache()
        if not self._said:
            self._said = True
            print(
                f"a batch of {count} does not fit into memory ({error[:120]}); such batches are "
                "encoded by halves, and a smaller batch size would save that time",
                file=sys.stderr,
            )

    @torch.no_grad()  # weights that DeepSpeed gathers in inference mode could not be trained after
    def _forward(self, features: dict[str, Any]) -> Tensor:
        device = self._model.device
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }
        with self._precision:
            vectors: Tensor = self._model(moved)["sentence_embedding"]
        vectors = vectors[:, : self._model.truncate_dim]
        return (unit(vectors, dim=1) if self._normalize else vectors).float()


class _Reader:
    """Reads and preprocesses batches, for DataLoader. It is the part that workers run."""

    def __init__(
        self,
        model: SentenceTransformer,
        load: Callable[[Any], tuple[str, Any]],
        prompt: str | None,
    ) -> None:
        self._model, self._load, self._prompt = model, load, prompt

    def __getitem__(self, batch: list[Any]) -> _Prepared:
        """Prepare a batch.

        LLaVA-OneVision stacks the videos of a batch, so each part has videos of one length. A part
        ends once its images and frames have LLAVE_MAX_PIXELS or more.
        """
        most = limits.value("LLAVE_MAX_PIXELS")
        prepared = _Prepared([None] * len(batch), [])
        held: dict[int, list[tuple[int, Any]]] = {}  # by number of frames
        pixels = 0
        for place, item in enumerate(batch):
            try:
                prepared.ids[place], value = self._load(item)
            except Exception as error:  # decoders raise errors of many types
                prepared.parts.append(([place], _failure(error)))
                continue
            frames = value.get("video", ()) if isinstance(value, dict) else ()
            held.setdefault(len(frames), []).append((place, value))
            pixels += pixel_count(value)
            if pixels >= most:
                prepared.parts.extend(self._parts(held))
                held, pixels = {}, 0
        prepared.parts.extend(self._parts(held))
        return prepared

    def _parts(
        self, held: dict[int, list[tuple[int, Any]]]
    ) -> Iterator[tuple[list[int], dict[str, Any] | Failure]]:
        for group in held.values():
            yield from self._features(group)

    def _features(
        self, group: list[tuple[int, Any]]
    ) -> Iterator[tuple[list[int], dict[str, Any] | Failure]]:
        """Preprocess inputs together, or by halves where that fails, down to single ones."""
        places = [place for place, _ in group]
        try:
            features = self._model.preprocess([value for _, value in group], prompt=self._prompt)
        except Exception as error:
            refused = isinstance(error, REFUSALS)
            if not refused and not out_of_memory(error):
                raise
            if len(group) > 1:
                half = len(group) // 2
                yield from self._features(group[:half])
                yield from self._features(group[half:])
                return
            if not refused:
                raise
            features = _failure(error)
        yield places, features


def default_workers() -> int:
    """Return how many processes read ahead: this process's share of the cores less one, 1 to 4.

    There are none on systems other than Linux, where forking a process is not safe.
    """
    if sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, cores - 1))


def dimension_of(model: SentenceTransformer) -> int:
    """Return the number of values of a model's embeddings.

    Raises:
        ValueError: the model does not know it.
    """
    found: int | None = model.get_embedding_dimension()
    if found is None:
        raise ValueError(
            "model does not know its embedding dimension; set model.truncate_dim to it"
        )
    return found


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's or the host's memory ran out."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


class RefusedItemError(ValueError):
    """The model refuses an item.

    Attributes:
        place: the item's index.
        reason: the model's message.
    """

    def __init__(self, place: int, item: Any, reason: str) -> None:
        super().__init__(f"input {place}, {item!r:.80}: {reason}")
        self.place, self.reason = place, reason


def encode(
    model: SentenceTransformer,
    items: Sequence[Any],
    *,
    prompt: str | None = None,
    normalize: bool = True,
    batch_size: int = 32,
    workers: int | None = None,
) -> np.ndarray:
    """Embed a list of inputs as ``embed`` and ``evaluate`` do, also videos of different lengths.

    Args:
        model: from ``llave.build`` or ``llave.load``.
        items: as ``llave.modeling.inputs`` makes them, or what ``model.encode`` takes.
        prompt: as in ``model.encode``.
        normalize: whether embeddings are scaled to length 1. True by default.
        batch_size: inputs per forward pass, 32 by default.
        workers: as in ``Encoder``. A single batch needs none.

    Returns:
        (items, D) float32 embeddings.

    Raises:
        RefusedItemError: the model does not take an item.
    """
    length = Lengths(model)
    batches = planned(list(enumerate(items)), [length.of(item) for item in items], batch_size)
    encoder = Encoder(
        model,
        lambda one: ("", one[1]),
        prompt=prompt,
        normalize=normalize,
        workers=workers if len(batches) > 1 else 0,
    )
    vectors: list[Any] = [None] * len(items)
    refused: dict[int, str] = {}
    for batch in encoder.run(batches):
        for (place, _), _, found in batch:
            if isinstance(found, Failure):
                refused[place] = found.reason
            vectors[place] = found
    if refused:
        first = min(refused)
        raise RefusedItemError(first, items[first], refused[first])
    return np.stack(vectors) if vectors else np.empty((0, model.get_embedding_dimension() or 0))


def _follow(worker: int) -> None:
    """Let the system end this worker with its parent. A killed parent could not end it."""
    with suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, str(error))


def _fetched(
    batch: list[Any], ids: list[str | None], outcomes: list[tuple[list[int], Tensor | Failure]]
) -> list[Encoded]:
    found: dict[int, np.ndarray | Failure] = {}
    for places, outcome in outcomes:
        values = [outcome] if isinstance(outcome, Failure) else outcome.cpu().numpy()
        found.update(zip(places, values, strict=True))
    return [Encoded(item, ids[place], found[place]) for place, item in enumerate(batch)]


def _precision(model: SentenceTransformer) -> AbstractContextManager[Any]:
    """Return autocast to bfloat16 for a float32 model on a GPU that computes in it."""
    if model.device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return nullcontext()
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16)
