"""Which model made embeddings or results."""

from __future__ import annotations

import hashlib
import json

import torch
from sentence_transformers import SentenceTransformer

# Values sampled per weight. A training step changes some of them, and hashing them is fast.
SAMPLED_VALUES = 1024


def model_fingerprint(model: SentenceTransformer) -> str:
    """Return a hash of a model's configuration and of sampled weights. It is device-independent."""
    digest = hashlib.blake2b(digest_size=16)
    processor = getattr(model, "processor", None)
    settings = {
        "modules": [
            [type(module).__name__, getattr(module, "get_config_dict", dict)()] for module in model
        ],
        "processor": [
            getattr(processor, "to_dict", dict)(),
            getattr(processor, "chat_template", None),
        ],
        "prompts": [model.prompts, model.default_prompt_name],
        "lengths": [getattr(model, "max_seq_length", None), model.truncate_dim],
    }
    digest.update(json.dumps(settings, sort_keys=True, default=lambda x: type(x).__name__).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED_VALUES)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
