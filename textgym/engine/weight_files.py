"""What is said of weights that can't be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from safetensors import SafetensorError


@contextmanager
def readable_weights(model: object) -> Iterator[None]:
    """Where transformers opens a model, say in one clear error that its weights are broken or not plain weights.

    torch refuses pickles that hold more than tensors, and then explains how to run them all the same. Whoever has such
    a file from somebody else should not.

    :param model: what the user calls it
    :raises ValueError: if the weights are broken, or pickles with more in them than tensors
    """
    try:
        yield
    except UnpicklingError:
        raise ValueError(
            f"the weights of {str(model)!r} are a pickle with more in it than tensors, and opening that could run code "
            "of whoever made it: ask for them as safetensors"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"the weights of {str(model)!r} are broken: {error}") from error
