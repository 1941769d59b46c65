"""Named tensors as bytes: the safetensors format, float32, checked before anything is believed.

One message carries one blob, whatever the number of tensors: Flower moves every array as two
objects with a request each, and a policy has hundreds. The header names tensors and shapes first.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from zk0bot.errors import UpdateError

Tensors = dict[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]


def encode(tensors: Tensors) -> bytes:
    """The tensors as one safetensors blob."""
    return bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))


def decode(blob: bytes) -> Tensors:
    """The tensors in ``blob``; UpdateError when it is truncated, malformed or not float32."""
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UpdateError(f"not a safetensors blob: {error}") from error
    for name, value in tensors.items():
        if value.dtype != np.float32:
            raise UpdateError(f"tensor {name!r} is {value.dtype}, not float32")
    return dict(tensors)


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor."""
    return {name: value.shape for name, value in tensors.items()}


def decode_like(blob: bytes, expected: Shapes) -> Tensors:
    """The tensors in ``blob``, with exactly the expected names and shapes and finite values.

    Raises UpdateError naming the first tensor that is missing, unknown, of another shape, or that
    holds NaN or Inf.
    """
    tensors = decode(blob)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UpdateError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UpdateError(f"tensor {unknown[0]!r} is not part of the policy")
    for name, value in tensors.items():
        if value.shape != tuple(expected[name]):
            raise UpdateError(f"tensor {name!r} has shape {value.shape}, not {expected[name]}")
        if not np.isfinite(value).all():
            raise UpdateError(f"tensor {name!r} holds NaN or Inf")
    return tensors


def norm(tensors: Tensors) -> float:
    """L2 norm over all tensors, accumulated in float64."""
    squares = (float(np.square(value, dtype=np.float64).sum()) for value in tensors.values())
    return float(np.sqrt(sum(squares)))
