"""Where released code and paper differ: `variant="paper"`, the default, or `"official"`, mistakes included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats import nearest
from .base import Rule

VARIANTS = ("paper", "official")


class Variants(Rule):
    """A rule with two variants. The official one lets non-finite values through, as released code does."""

    def choose(self, variant: str) -> bool:
        """Whether it is the official one; before `Rule.__init__`."""
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}{nearest(variant, VARIANTS)}; known: {', '.join(VARIANTS)}")
        self.guarded = variant == "paper"
        return not self.guarded

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        if group["variant"] != ("paper" if self.guarded else "official"):
            raise ValueError(
                f"variant is one for the whole optimizer; a group (or checkpoint) asks {group['variant']!r}"
            )
