#!/usr/bin/env bash
# Format, lint, strict types, import contracts, unit tests: what must hold before every commit.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup dev
part format ruff format --check
part lint ruff check
part types mypy
part "import contracts" lint-imports
part "unit tests" pytest -q -m "not slow" tests/unit tests/test_architecture.py
summary check
