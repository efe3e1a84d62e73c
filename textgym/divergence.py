"""Training that has diverged: numbers that are not finite any more, from which nothing comes back."""

from __future__ import annotations


class DivergedError(RuntimeError):
    """Weights, or what is computed from them, are NaN or infinite.

    :param what: is not finite, such as ``"the loss is nan"``
    :param timesteps: tokens trained on until then, once that is known
    """

    def __init__(self, what: str, timesteps: int | None = None) -> None:
        self.what, self.timesteps = what, timesteps
        at = "" if timesteps is None else f" at step {timesteps}"
        super().__init__(
            f"diverged{at}: {what}. A smaller learning_rate, or rewards of a smaller size, keep training finite"
        )
