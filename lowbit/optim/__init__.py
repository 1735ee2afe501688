"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, measure, update
from .adams import AdamS
from .adamw import AdamW
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .lion import Lion
from .sgd import SGD
from .stabilizers import AdaClip, AdaGN, GlobalClip, MomentumReset, SpikeClip
from .stable_spam import StableSPAM

__all__ = [
    "SGD",
    "AdaClip",
    "AdaGN",
    "AdamS",
    "AdamW",
    "GlobalClip",
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
