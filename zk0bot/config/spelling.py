"""Names of settings: fields in Python, keys in files, on the command line and in messages."""


def kebab(field: str) -> str:
    """A field's name as files and people write it: ``cosine-warm-restarts-T-0``."""
    return field.replace("_t_", "_T_").replace("_", "-")


def snake(key: str) -> str:
    """The field that a key names, however it is spelt."""
    return key.replace("-", "_").lower()
