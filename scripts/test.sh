#!/usr/bin/env bash
# Installs what is missing, then runs every test. With arguments: pytest with those arguments.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup dev
need_tmux
if [ $# -gt 0 ]; then exec pytest "$@"; fi
part check ./scripts/check.sh
part "slow tests" pytest -q --durations=5 -m "slow and not integration and not gpu" tests
part "integration tests" pytest -q --durations=5 -m "integration and not gpu" tests
part "GPU tests" pytest -q -m gpu tests
summary "all tests"
