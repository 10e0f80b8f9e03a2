"""One module per training library; each imports its host only when it is imported itself.

``clip_gather`` and ``target_blocks`` hold what several hosts share, ``scores`` what serves hosts
that compute similarities themselves.
"""
