"""Why a node may not join: one class per condition, each with its own words for both ends.

An unknown invite and a wrong proof are one condition: who guesses learns nothing. The others are
told only to one who has shown to hold the code.
"""

from typing import ClassVar

from zk0bot.errors import EnrolRefusedError


class Refusal(EnrolRefusedError):
    """Base: ``text`` and ``advice`` are the message and hint unless others are given."""

    text: ClassVar[str]
    advice: ClassVar[str]

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message or self.text, hint=hint or self.advice)


class JoinRefusedError(Refusal):
    code = "join_refused"
    text = "the server does not accept this join code"
    advice = "ask for a new one: zk0bot server invite on the server machine"


class JoinExpiredError(Refusal):
    code = "join_expired"
    text = "this join code has expired"
    advice = "ask for a new one: zk0bot server invite --expires 7d on the server machine"


class JoinUsedUpError(Refusal):
    code = "join_used_up"
    text = "this join code has been used as often as it may"
    advice = "ask for one of your own: zk0bot server invite on the server machine"


class JoinReplayedError(Refusal):
    code = "join_replayed"
    text = "this very request to join was answered before"
    advice = "run the command again: it makes a new request"


class JoinWithdrawnError(Refusal):
    code = "join_withdrawn"
    text = "this join code has been withdrawn at the server"
    advice = "ask for a new one: zk0bot server invite on the server machine"


class NameTakenError(Refusal):
    code = "name_taken"
    text = "another node at the server has this name"
    advice = (
        "take another with --name; if it is this machine's former self: "
        "zk0bot server revoke NAME on the server machine"
    )


class ClockError(Refusal):
    code = "clock"
    text = "this machine's clock differs too much from the server's"
    advice = "set it, such as with: sudo timedatectl set-ntp true"


class KeyKnownError(Refusal):
    code = "key_known"
    text = "this node's key has been used at the server before and cannot join again"
    advice = "join with a new key: zk0bot client leave, then the join command with a new code"


REFUSALS: dict[str, type[Refusal]] = {kind.code: kind for kind in Refusal.__subclasses__()}
"""The condition of each code."""
