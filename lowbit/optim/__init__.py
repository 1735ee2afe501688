"""Optimizers whose state can be stored in any format. One file, one paper."""

from ..stages import Moment, fold, matrix, measure, update
from .adafactor import Adafactor
from .adam_mini import AdamMini
from .adams import AdamS
from .adamw import AdamW
from .adapm import AdaPM
from .apollo import APOLLO, APOLLOMini
from .base import Part, Rule, Stabilizer
from .checkpoint import load_optimizer, save_optimizer
from .fira import Fira
from .galore import GaLore
from .groups import param_groups
from .in_backward import step_in_backward
from .lion import Lion
from .muon import Muon
from .scale import SCALE
from .sgd import SGD
from .slim_adam import SlimAdam
from .spam import SPAM
from .stabilizers import AdaClip, AdaGN, GlobalClip, GradientStabilizer, MomentumReset, SpikeClip
from .stable_spam import StableSPAM
from .swan import SWAN

__all__ = [
    "APOLLO",
    "SCALE",
    "SGD",
    "SPAM",
    "SWAN",
    "APOLLOMini",
    "AdaClip",
    "AdaGN",
    "AdaPM",
    "Adafactor",
    "AdamMini",
    "AdamS",
    "AdamW",
    "Fira",
    "GaLore",
    "GlobalClip",
    "GradientStabilizer",
    "Lion",
    "Moment",
    "MomentumReset",
    "Muon",
    "Part",
    "Rule",
    "SlimAdam",
    "SpikeClip",
    "Stabilizer",
    "StableSPAM",
    "fold",
    "load_optimizer",
    "matrix",
    "measure",
    "param_groups",
    "save_optimizer",
    "step_in_backward",
    "update",
]
