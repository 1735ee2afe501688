"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, measure, update
from .adams import AdamS
from .adamw import AdamW
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .lion import Lion
from .sgd import SGD
from .spam import SPAM
from .stabilizers import AdaClip, AdaGN, GlobalClip, GradientStabilizer, MomentumReset, SpikeClip
from .stable_spam import StableSPAM

__all__ = [
    "SGD",
    "SPAM",
    "AdaClip",
    "AdaGN",
    "AdamS",
    "AdamW",
    "GlobalClip",
    "GradientStabilizer",
    "Lion",
    "Moment",
    "MomentumReset",
    "Part",
    "Rule",
    "SpikeClip",
    "Stabilizer",
    "StableSPAM",
    "fold",
    "load_optimizer",
    "measure",
    "save_optimizer",
    "update",
]
