"""Measurements. ``loss_bench.py`` is the command, ``report.py`` reads the files it writes."""
