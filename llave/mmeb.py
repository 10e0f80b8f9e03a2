"""The 36 evaluation sets of MMEB (arXiv 2410.05160) and the scores that LLaVE's paper prints."""

from __future__ import annotations

from typing import NamedTuple

from llave.images import Pixels


class Task(NamedTuple):
    """A set's meta-task, and whether the mix of 20 training sets contains its training set."""

    meta: str
    in_distribution: bool


_SETS = {
    "Classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": (
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA GQA TextVQA VizWiz",
    ),
    "Retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "Grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
TASKS: dict[str, Task] = {
    name: Task(meta, inside)
    for meta, (known, unknown) in _SETS.items()
    for names, inside in ((known, True), (unknown, False))
    for name in names.split()
}
METAS = tuple(_SETS)
# Groups of tasks that a user may name.
GROUPS: dict[str, list[str]] = {
    "all": list(TASKS),
    **{meta.lower(): [name for name in TASKS if TASKS[name].meta == meta] for meta in METAS},
    "ind": [name for name in TASKS if TASKS[name].in_distribution],
    "ood": [name for name in TASKS if not TASKS[name].in_distribution],
}
# The training subsets have the same names, except for one.
_NAMES = {*TASKS, "ImageNet_1K"}
# Precision@1 per meta-task (in the order of METAS), in distribution, out of distribution, overall.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "VLM2Vec 0.5B": (54.6, 44.7, 56.8, 76.5, 59.8, 49.1, 55.0),
    "VLM2Vec 2B": (61.1, 57.3, 62.1, 85.5, 67.2, 58.1, 63.1),
    "VLM2Vec 7B": (63.5, 61.1, 64.5, 87.3, 69.7, 61.0, 65.8),
    "LLaVE-0.5B": (57.4, 50.3, 59.8, 82.9, 64.7, 52.0, 59.1),
    "LLaVE-2B": (62.1, 60.2, 65.2, 84.9, 69.4, 59.8, 65.2),
    "LLaVE-7B": (65.7, 65.4, 70.9, 91.9, 75.0, 64.4, 70.3),
}
# Zero-shot text-video retrieval R@1, R@5, R@10 of LLaVE-7B.
PUBLISHED_VIDEO: dict[str, tuple[float, ...]] = {
    "MSR-VTT": (46.8, 71.1, 80.0),
    "MSVD": (52.9, 80.1, 87.0),
}


def pixels(name: str) -> Pixels:
    """Say how to read the images of a subset or task.

    MMEB's own are read as they are stored. MMEB's authors read them so, and the published scores
    depend on it. A user's own are read as a person sees them.
    """
    return "stored" if name in _NAMES else "seen"
