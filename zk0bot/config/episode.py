"""Which episodes of a dataset are meant: ``0-39,45``."""

from zk0bot.errors import ConfigError


def read_episodes(text: str) -> list[int]:
    """Episode numbers of ``"0-39,45"``, ascending; none for an empty text, which means all.

    Raises ConfigError naming the text when it cannot be read.
    """
    chosen: set[int] = set()
    for part in text.split(",") if text.strip() else ():
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"episodes {text!r} cannot be read", hint="write them as 0-39,45")
        if dash and int(last) < int(first):
            raise ConfigError(f"episodes {text!r} run backwards", hint="write them as 0-39,45")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    return sorted(chosen)
