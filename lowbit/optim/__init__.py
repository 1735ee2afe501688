"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, matrix, measure, update
from .adamw import AdamW
from .adapm import AdaPM
from .apollo import APOLLO, APOLLOMini
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .fira import Fira
from .galore import GaLore
from .muon import Muon
from .stabilizers import AdaClip, AdaGN, GlobalClip, MomentumReset, SpikeClip
from .stable_spam import StableSPAM
from .swan import SWAN

__all__ = [
    "APOLLO",
    "SWAN",
    "APOLLOMini",
    "AdaClip",
    "AdaGN",
    "AdaPM",
    "AdamW",
    "Fira",
    "GaLore",
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
