"""A Flower Grid in memory: nodes are functions from an order to a reply; None never answers."""

from collections.abc import Callable, Iterable
from itertools import count

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Node = Callable[[str, RecordDict], "RecordDict | Error | None"]


class FakeGrid(Grid):
    """Delivers at once; ``absent`` nodes are offline."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.nodes = nodes
        self.absent: set[int] = set()
        self.sent: list[tuple[int, str]] = []
        self._replies: dict[str, Message | None] = {}
        self._ids = count(1)

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node_id for node_id in self.nodes if node_id not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [self._replies.pop(i) for i in message_ids if self._replies.get(i)]
        return [reply for reply in replies if reply]

    def send_and_receive(self, *args: object, **kwargs: object) -> Iterable[Message]:
        raise NotImplementedError

    def _deliver(self, message: Message) -> str:
        message_id = str(next(self._ids))
        message.metadata.__dict__["_message_id"] = message_id
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.sent.append((node_id, kind))
        answer = self.nodes[node_id](kind, message.content)
        self._replies[message_id] = None if answer is None else Message(answer, reply_to=message)
        return message_id
