"""Where and whom a kill -9 hits: moments at random, but so that every stage and every phase has some."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from benchmarks.ledger import Phase

DRIVERS = ("flow", "dvc", "stage")
# What a kill -9 hits, and in how many of a hundred: every process at once, as a container or a machine that goes away;
# the process group of the driver, as a terminal does; one process of them.
TARGETS = {"everything": 25, "group": 20, "driver": 25, "stage": 20, "tracker": 10}


@dataclass(kw_only=True)
class Kill:
    """One kill -9: planned so long after a phase began, or after a share of the work, and what came of it."""

    stage: str
    phase: str
    delay_s: float  # after the phase began; work is counted, since it takes longer on a busy machine
    share: float = 0.0
    target: str
    at_once: bool  # the command again without waiting for what the kill has left
    hit_stage: str = ""  # the stage whose process ran, or had run last
    hit_phase: str = ""
    lost_s: float = 0.0  # of computing
    orphans_s: float = 0.0  # from the end of the command until its last process was gone
    victim: int = 0  # the stage's process
    at: float = 0.0  # seconds of the monotonic clock


def plan(found: list[Phase], kills: int, driver: str, rng: random.Random) -> dict[str, list[Kill]]:
    """Kills by stage: each stage gets as many as the others, the rest goes to the longest; moments at random in phases
    at random, so that neither start-up nor training has all of them."""
    length: dict[str, float] = defaultdict(float)
    for phase in found:
        length[phase.stage] += phase.seconds
    each, rest = divmod(kills, len(length))
    longest = sorted(length, key=length.__getitem__, reverse=True)
    planned = {}
    for stage in length:
        choices = [one for one in found if one.stage == stage and (one.name != "between" or driver != "stage")]
        rng.shuffle(choices)
        number = each + (stage in longest[:rest])
        drawn = [choices[turn % len(choices)] for turn in range(number)]
        order = ["start-up", "whole", "work", "writing", "between"]
        drawn.sort(key=lambda one: order.index(one.name))
        planned[stage] = [_drawn(stage, phase, driver, rng) for phase in drawn]
    return planned


def _drawn(stage: str, phase: Phase, driver: str, rng: random.Random) -> Kill:
    targets = [name for name in TARGETS if driver != "stage" or name != "driver"]  # the stage is its own driver
    target = rng.choices(targets, [TARGETS[name] for name in targets])[0]
    share = rng.random()
    delay_s = 0.0 if phase.name == "work" else share * phase.seconds
    at_once = rng.random() < 0.5
    return Kill(stage=stage, phase=phase.name, delay_s=delay_s, share=share, target=target, at_once=at_once)
