"""Tests run without the network and without a tracker unless one asks for it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RANKWISE_TRACKING", "off")
