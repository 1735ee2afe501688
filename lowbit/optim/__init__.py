"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, measure, update
from .adafactor import Adafactor
from .adam_mini import AdamMini
from .adams import AdamS
from .adamw import AdamW
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .groups import param_groups
from .lion import Lion
from .scale import SCALE
from .sgd import SGD
from .slim_adam import SlimAdam
from .spam import SPAM
from .stabilizers import AdaClip, AdaGN, GlobalClip, GradientStabilizer, MomentumReset, SpikeClip
from .stable_spam import StableSPAM

__all__ = [
    "SCALE",
    "SGD",
    "SPAM",
    "AdaClip",
    "AdaGN",
    "Adafactor",
    "AdamMini",
    "AdamS",
    "AdamW",
    "GlobalClip",
    "GradientStabilizer",
    "Lion",
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
