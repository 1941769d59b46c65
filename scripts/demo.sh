#!/usr/bin/env bash
# Installs what is missing, then runs `zk0bot demo` with the arguments given here.
set -euo pipefail
start_dir="$PWD"
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup run
need_tmux
zk0bot="$PWD/.venv/bin/zk0bot"
cd "$start_dir"
exec "$zk0bot" demo ${1+"$@"}
