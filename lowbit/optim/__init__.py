"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, matrix, measure, update
from .adamw import AdamW
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .muon import Muon
from .stabilizers import AdaClip, AdaGN, GlobalClip, MomentumReset, SpikeClip
from .stable_spam import StableSPAM

__all__ = [
    "AdaClip",
    "AdaGN",
    "AdamW",
    "GlobalClip",
    "Moment",
    "MomentumReset",
    "Muon",
    "Part",
    "Rule",
    "SpikeClip",
    "Stabilizer",
    "StableSPAM",
    "fold",
    "load_optimizer",
    "matrix",
    "measure",
    "save_optimizer",
    "update",
]
