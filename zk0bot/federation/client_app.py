"""The ClientApp: hands each order to the warm trainer beside it and its answer to Flower.

A new process runs this for every message, so it imports neither torch nor lerobot.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from zk0bot.config.load import load_client_dir
from zk0bot.errors import Zk0Error
from zk0bot.federation.failure import sentence_of
from zk0bot.federation.messages import deadline_of, pack, pack_failure, unpack, unpack_blob
from zk0bot.files import private_dir, replacing
from zk0bot.training.client import ask
from zk0bot.training.protocol import (
    DescribeRequest,
    EvaluateRequest,
    EvaluateResult,
    NodeDescription,
    TrainRequest,
    TrainResult,
)

logger = logging.getLogger(__name__)
Work = Callable[[RecordDict, Path], RecordDict]
app = ClientApp()


@app.query()
def describe(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer a DescribeRequest with a NodeDescription."""
    return _answer(message, _describe)


@app.train()
def train(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer a TrainRequest and the global weights with a TrainResult and the update."""
    return _answer(message, _train)


@app.evaluate()
def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer an EvaluateRequest and weights with an EvaluateResult."""
    return _answer(message, _evaluate)


def _answer(message: FlowerMessage, work: Work) -> FlowerMessage:
    try:
        content = work(message.content, load_client_dir())
    except Zk0Error as error:
        code = getattr(error, "remote_code", error.code)
        logger.error("%s (%s)", error.message, code)
        content = pack_failure(code, sentence_of(code))
    except Exception:
        logger.exception("order failed")
        content = pack_failure("crashed", sentence_of("crashed"))
    return FlowerMessage(content, reply_to=message)


def _describe(content: RecordDict, client_dir: Path) -> RecordDict:
    request = unpack(content, DescribeRequest)
    return pack(ask(client_dir, request, NodeDescription, deadline_s=deadline_of(content)))


def _train(content: RecordDict, client_dir: Path) -> RecordDict:
    request = unpack(content, TrainRequest)
    weights = _store(content, client_dir)
    request = request.model_copy(update={"weights_path": str(weights)})
    result = ask(client_dir, request, TrainResult, deadline_s=deadline_of(content))
    blob = Path(result.update_path).read_bytes()
    return pack(result.model_copy(update={"update_path": ""}), blob=blob)


def _evaluate(content: RecordDict, client_dir: Path) -> RecordDict:
    request = unpack(content, EvaluateRequest)
    weights = _store(content, client_dir)
    request = request.model_copy(update={"weights_path": str(weights)})
    return pack(ask(client_dir, request, EvaluateResult, deadline_s=deadline_of(content)))


def _store(content: RecordDict, client_dir: Path) -> Path:
    """Lay the received tensors where the trainer reads them."""
    path = private_dir(client_dir / "exchange") / "received.safetensors"
    with replacing(path, mode=0o600) as temporary:
        temporary.write_bytes(unpack_blob(content))
    return path
