"""The embedding whose table is kept as codes: a lookup decodes the rows it needs."""

from __future__ import annotations

import zlib
from typing import Any

from torch import Tensor, nn

from ..roles import clean_name
from .presets import find_recipe
from .recipe import Recipe
from .stored_state import StoredState, store_parameter_


class QuantEmbedding(StoredState, nn.Embedding):
    """An `nn.Embedding` whose table is stored as `Recipe.embedding` says; everything else is nn.Embedding's.

    Blocks lie in rows, so a row is decoded, and updated, without its neighbours.

    Args:
        num_embeddings: as for nn.Embedding.
        embedding_dim: as for nn.Embedding.
        recipe: a name (`lowbit.recipes()`) or a `Recipe`, with `embedding=`.
        name: tells the random bits of its writes from other layers'.
        others: as for nn.Embedding.
    """

    recipe: Recipe

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, recipe: str | Recipe, name: str = "", **others: Any
    ) -> None:
        found = find_recipe(recipe)
        if found.embedding is None:
            raise ValueError("QuantEmbedding: the recipe has no store for embeddings; give Recipe(embedding=...)")
        super().__init__(num_embeddings, embedding_dim, **others)
        self._adopt(found, name)

    def _adopt(self, recipe: Recipe, name: str) -> None:
        assert recipe.embedding is not None
        self.recipe = recipe
        store_parameter_(self.weight, recipe.embedding, zlib.crc32(clean_name(name).encode()))

    def quantized_weight(self) -> Tensor:
        """The table that the forward pass looks up in, in fp32."""
        return self.weight.detach().dequantize()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, store={self.recipe.embedding}"
