"""Measurements: ``loss_bench.py`` is the command, ``report.py`` reads what it leaves."""
