from zk0bot import errors
from zk0bot.federation.failure import SENTENCES


def test_every_sentence_belongs_to_an_error() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {kind.code for kind in classes if issubclass(kind, errors.Zk0Error)}
    assert SENTENCES.keys() <= codes
