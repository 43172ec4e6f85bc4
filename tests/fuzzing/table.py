"""All readers, by name: importing this enters every one of them."""

from __future__ import annotations

from . import data_files, models, notes, params_files, replies, stored, tables  # noqa: F401
from .law import READERS

__all__ = ["READERS"]
