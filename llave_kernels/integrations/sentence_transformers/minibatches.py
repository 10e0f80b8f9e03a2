"""Cutting a batch's images and videos into mini-batches of samples."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.losses import gradcache
from torch import Tensor

# The host's slicing cuts the first by images per sample, and the others by the cells of a grid.
IMAGE_KEYS = ("pixel_values", "image_position_ids", "image_sizes")
GRIDS = {
    "image_grid_thw": ("image_grid_thw", "num_images_per_sample"),
    "pixel_values": ("image_grid_thw", "num_images_per_sample"),
    "video_grid_thw": ("video_grid_thw", "num_videos_per_sample"),
    "pixel_values_videos": ("video_grid_thw", "num_videos_per_sample"),
}


def sliceable(features: dict[str, Any]) -> dict[str, Any]:
    """``features`` with what the host's slicing needs to cut them by sample.

    The host cuts images by ``num_images_per_sample``. Where that is missing it cuts by row.
    transformers' ``batch_num_images`` counts only the samples that have images, so it stands in
    only where it has one count for each sample.

    Args:
        features: a column of the batch, as the processor makes it. It is not changed.

    Raises:
        ValueError: the host would cut a tensor by row, and its rows are not samples.
    """
    if "cu_seq_lens_q" in features:  # flattened tokens, cut by their own lengths
        return features
    samples = gradcache._get_batch_size(features)
    counts = features.get("num_images_per_sample", features.get("batch_num_images"))
    images = None
    if isinstance(counts, Tensor) and len(counts) == samples:
        features = features | {"num_images_per_sample": counts}
        if "batch_num_images" in features:
            features["batch_num_images"] = counts
        images = int(counts.sum())
    for key, value in features.items():
        if not isinstance(value, Tensor) or (value.ndim < 2 and key != "batch_num_images"):
            continue
        if len(value) == samples or (key in IMAGE_KEYS and len(value) == images):
            continue
        grid, count = GRIDS.get(key, (None, None))
        if grid in features and (count in features or len(features[grid]) == samples):
            continue
        raise ValueError(
            f"{key} of shape {tuple(value.shape)} cannot be cut into mini-batches of {samples} "
            "samples: its rows are not samples, and the features do not tell how many belong to "
            "each. Add num_images_per_sample, a tensor of one count per sample, to the features, "
            "or use MultipleNegativesRankingLoss"
        )
    return features
