"""What a search asks of a refinement."""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32, Key


@runtime_checkable
class Refinement(Protocol):
    """What a strategy asks of a refinement.

    Attributes:
        keeps_labels: Whether it keeps items with one label in distinct packs.
        sees_windows: Whether it takes weights [T, n], the loads of every item in T windows.
    """

    keeps_labels: ClassVar[bool]
    sees_windows: ClassVar[bool]

    def __call__(
        self,
        contents: Int32[Array, "m c *K"],
        weight: Float[Array, "..."],
        key: Key[Array, ""],
        label: Int32[Array, "..."] | None = None,
    ) -> Int32[Array, "m c *K"]:
        """Return packings that are no worse, or have fewer repeats of a label."""
        ...
