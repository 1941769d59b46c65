#!/usr/bin/env bash
# build_release.sh URL [DIR]: the wheel, the list of every package it was tested with, and the
# installer that is pinned to both by SHA-256; all to be served at URL.
# Writes DIR (default dist) and prints the line that operators type. Same commit, same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

main() {
  local url="${1%/}" target="${2:-dist}" version wheel pins
  use_private_places
  find_uv
  SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
  export SOURCE_DATE_EPOCH
  version="$(toml_value version)"
  wheel="$target/zk0bot-$version-py3-none-any.whl"
  pins="$target/requirements-$version.txt"
  "$UV" --quiet build --wheel --python "$(cat .python-version)" --out-dir "$target" . >&2
  "$UV" --quiet export --python "$(cat .python-version)" --no-dev --no-emit-project --no-header \
    --no-annotate --output-file "$pins" >&2
  fill "$version" "$(sha256_of "$wheel")" "$(sha256_of "$pins")" "$url" \
    <website/get-zk0bot.sh >"$target/get-zk0bot.sh"
  bash -n "$target/get-zk0bot.sh"
  printf 'curl -fsSL %s/get-zk0bot.sh | bash\n' "$url"
}

# The first `NAME = "VALUE"` of pyproject.toml.
toml_value() { sed -n "s/^$1 = \"\\(.*\\)\"\$/\\1/p" pyproject.toml | head -n 1; }

# fill VERSION WHEEL_SHA256 PINS_SHA256 URL: the template on stdin with its gaps filled.
fill() {
  local line
  while IFS= read -r line; do
    case "$line" in
      '#@bootstrap@') cat scripts/bootstrap.sh; continue ;;
      'VERSION='*) line="${line/@version@/$1}" ;;
      'WHEEL_SHA256='*) line="${line/@wheel-sha256@/$2}" ;;
      'PINS_SHA256='*) line="${line/@pins-sha256@/$3}" ;;
      'RELEASE_URL='*) line="${line/@release-url@/$4}" ;;
    esac
    printf '%s\n' "$line"
  done
}

[ $# -ge 1 ] || fail "say where the release will be served" "scripts/build_release.sh https://HOST/PATH"
main "$@"
