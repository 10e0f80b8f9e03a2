"""One module per training library; each imports its host only when it is imported itself."""
