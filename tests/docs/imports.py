"""What most snippets of the pages import. Those that are not installed are left out."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    import sentence_transformers  # noqa: F401
with contextlib.suppress(ImportError):
    import transformers  # noqa: F401
