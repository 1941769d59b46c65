#!/usr/bin/env bash
# build_release.sh URL [DIR]: the wheel and the installer pinned to it, to be served at URL.
# Writes DIR (default dist) and prints the line that operators type. Same commit, same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

main() {
  local url="${1%/}" target="${2:-dist}" version wheel
  use_private_places
  find_uv
  SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
  export SOURCE_DATE_EPOCH
  version="$(toml_value version)"
  wheel="zk0bot-$version-py3-none-any.whl"
  "$UV" --quiet build --wheel --python "$(cat .python-version)" --out-dir "$target" . >&2
  fill "$version" "$wheel" "$(sha256_of "$target/$wheel")" "$(toml_value exclude-newer)" "$url" \
    <website/get-zk0bot.sh >"$target/get-zk0bot.sh"
  bash -n "$target/get-zk0bot.sh"
  printf 'curl -fsSL %s/get-zk0bot.sh | bash\n' "$url"
}

# The first `NAME = "VALUE"` of pyproject.toml.
toml_value() { sed -n "s/^$1 = \"\\(.*\\)\"\$/\\1/p" pyproject.toml | head -n 1; }

# fill VERSION WHEEL SHA256 EXCLUDE_NEWER URL: the template on stdin with its gaps filled.
fill() {
  local line
  while IFS= read -r line; do
    case "$line" in
      '#@bootstrap@') cat scripts/bootstrap.sh; continue ;;
      'VERSION='*) line="${line/@version@/$1}" ;;
      'WHEEL='*) line="${line/@wheel@/$2}" ;;
      'SHA256='*) line="${line/@sha256@/$3}" ;;
      'EXCLUDE_NEWER='*) line="${line/@exclude-newer@/$4}" ;;
      'RELEASE_URL='*) line="${line/@release-url@/$5}" ;;
    esac
    printf '%s\n' "$line"
  done
}

[ $# -ge 1 ] || fail "say where the release will be served" "scripts/build_release.sh https://HOST/PATH"
main "$@"
