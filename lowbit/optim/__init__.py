"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, measure, update
from .adafactor import Adafactor
from .adam_mini import AdamMini
from .adamw import AdamW
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .groups import param_groups
from .scale import SCALE
from .slim_adam import SlimAdam
from .stabilizers import AdaClip, AdaGN, GlobalClip, MomentumReset, SpikeClip
from .stable_spam import StableSPAM

__all__ = [
    "SCALE",
    "AdaClip",
    "AdaGN",
    "Adafactor",
    "AdamMini",
    "AdamW",
    "GlobalClip",
    "Moment",
    "MomentumReset",
    "Part",
    "Rule",
    "SlimAdam",
    "SpikeClip",
    "Stabilizer",
    "StableSPAM",
    "fold",
    "load_optimizer",
    "measure",
    "param_groups",
    "save_optimizer",
    "update",
]
