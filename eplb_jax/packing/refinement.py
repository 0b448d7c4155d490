"""What a search asks of a refinement."""

from abc import ABC, abstractmethod
from typing import ClassVar

import jax
from jaxtyping import Array, Int32, Key

from eplb_jax.packing.items import Items


class Refinement(ABC):
    """From packings to packings that are no worse, or have fewer duplicates of a label.

    A frozen value that does not know which search calls it.

    Attributes:
        keeps_labels: Whether it keeps items with one label in distinct packs.
        uses_windows: Whether it balances `Items.windows`, not only `Items.units`.
    """

    keeps_labels: ClassVar[bool] = False
    uses_windows: ClassVar[bool] = False

    def __call__(
        self, contents: Int32[Array, "m c *K"], items: Items, key: Key[Array, ""]
    ) -> Int32[Array, "m c *K"]:
        """Refine every lane."""
        if contents.ndim == 2:
            return self.refine(contents, items, key)
        return jax.vmap(self, (-1, -1, None), -1)(contents, items, key)

    @abstractmethod
    def refine(
        self, contents: Int32[Array, "m c"], items: Items, key: Key[Array, ""]
    ) -> Int32[Array, "m c"]:
        """Refine one packing."""
