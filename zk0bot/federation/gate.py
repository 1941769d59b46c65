"""What an update must satisfy before it is folded in."""

import hashlib
import math

from zk0bot.errors import UpdateError
from zk0bot.federation.codec import Shapes, Tensors, decode_like
from zk0bot.training.protocol import TrainRequest, TrainResult


def check_update(
    blob: bytes, result: TrainResult, request: TrainRequest, shapes: Shapes
) -> Tensors:
    """The update in ``blob``, checked.

    Raises UpdateError with the reason: tensors other than the policy's, NaN or Inf, another hash
    than the node declared, a sample count that the request does not explain, a loss that is no
    number.
    """
    if hashlib.sha256(blob).hexdigest() != result.param_hash:
        raise UpdateError("the tensors do not match the hash that the node declared")
    update = decode_like(blob, shapes)
    if not math.isfinite(result.loss):
        raise UpdateError(f"training loss is {result.loss}")
    if result.num_steps != request.local_steps:
        raise UpdateError(f"{result.num_steps} local steps, {request.local_steps} were asked for")
    if not 0 < result.num_samples <= result.num_steps * request.batch_size:
        raise UpdateError(f"{result.num_samples} samples in {result.num_steps} steps")
    return update
