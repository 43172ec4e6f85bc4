"""What the benchmarks' options are read as; what cannot be read is refused by argparse, which names the option."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import settings
from rankwise.types import UserError


def our_setting(text: str) -> settings.OurSetting:
    return _as_argument(settings.our_setting, text)


def trl_setting(text: str) -> settings.TrlSetting:
    return _as_argument(settings.trl_setting, text)


def _as_argument(read: Callable, text: str) -> Any:
    try:
        return read(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def place(text: str) -> str:
    """A place for the record, looked at before hours of measurement are lost for want of one."""
    path = Path(text)
    if text != "-" and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name a file in a folder that is there")
    return text
