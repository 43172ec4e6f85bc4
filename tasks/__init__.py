"""Stages, one module each: which bytes go in, which come out. `python -m tasks.NAME --help` shows one.

A stage is a plain function of typed params and explicit paths; dvc.yaml says how they are chained.
"""
