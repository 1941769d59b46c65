"""Become the process of a saved ProcessSpec: ``python -I -S launch.py SPEC``.

The window of a process runs this file, which reads the environment (and the secrets, from their
private file) and replaces itself, so that neither tmux nor ``ps`` ever sees a token. Standard
library only: it is paid at the start of every process.
"""

import json
import os
import sys
from pathlib import Path


def main(spec_path: Path) -> None:
    """Replace this process by the one in ``spec_path``."""
    spec = json.loads(spec_path.read_text())
    env = dict(spec["env"])
    if spec["secrets_path"]:
        env.update(json.loads(Path(spec["secrets_path"]).read_text()))
    os.chdir(spec["cwd"])
    try:
        os.execve(spec["argv"][0], spec["argv"], env)
    except OSError as error:
        sys.exit(f"cannot execute {spec['argv'][0]}: {error.strerror}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
