# shellcheck shell=bash
# Where things lie, messages, uv. Sourced by setup.sh; build_release.sh pastes it into get-zk0bot.sh.
# Runs on bash 3.2 (macOS).

UV_VERSION=0.13.9
UV_OLDEST=0.5
ZK0BOT_ROOT="${ZK0BOT_HOME:-$HOME/.zk0bot}"

say() { printf 'zk0bot: %s\n' "$*" >&2; }

# fail MESSAGE [HINT]
fail() {
  say "error: $1"
  [ -z "${2:-}" ] || say "hint: $2"
  exit 1
}

# Everything that uv keeps goes below the state root, or where the caller's UV_* variables say.
use_private_places() {
  export UV_CACHE_DIR="${UV_CACHE_DIR:-$ZK0BOT_ROOT/cache/uv}"
  export UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-$ZK0BOT_ROOT/python}"
  export UV_PYTHON_INSTALL_BIN=0
  export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-120}"
  unset VIRTUAL_ENV PYTHONDONTWRITEBYTECODE
}

# Sets UV to a usable uv: the one on PATH, else a private one, which is installed if need be.
find_uv() {
  local private="$ZK0BOT_ROOT/tools/uv/bin/uv"
  UV="$(command -v uv || true)"
  if [ -n "$UV" ] && version_at_least "$(uv_version "$UV")" "$UV_OLDEST"; then return; fi
  UV="$private"
  [ "$(uv_version "$UV")" = "$UV_VERSION" ] || install_uv
}

uv_version() {
  local line
  line="$("$1" --version 2>/dev/null)" || return 0
  line="${line#uv }"
  printf '%s' "${line%% *}"
}

# Three ways, each into tools/uv and nowhere else: a venv, pip alone, uv's own installer.
install_uv() {
  local target="$ZK0BOT_ROOT/tools/uv" way
  say "installing uv $UV_VERSION into $target"
  mkdir -p "$ZK0BOT_ROOT/tools"
  for way in uv_by_venv uv_by_pip uv_by_installer; do
    rm -rf "$target"
    if "$way" "$target" && [ "$(uv_version "$target/bin/uv")" = "$UV_VERSION" ]; then return; fi
  done
  rm -rf "$target"
  fail "uv $UV_VERSION could not be installed: neither pip nor https://astral.sh gave it" \
    "is this machine online? on Debian \`sudo apt-get install -y python3-venv\` may help; or put uv on PATH"
}

uv_by_venv() {
  python3 -m venv "$1" >/dev/null 2>&1 &&
    "$1/bin/python" -m pip install --quiet "uv==$UV_VERSION" >&2
}

uv_by_pip() {
  python3 -m pip --version >/dev/null 2>&1 &&
    python3 -m pip install --quiet --target "$1" "uv==$UV_VERSION" >&2
}

uv_by_installer() {
  curl -fsSL --retry 3 "https://astral.sh/uv/$UV_VERSION/install.sh" |
    UV_UNMANAGED_INSTALL="$1/bin" sh >&2
}

# version_at_least 1.10.0 1.9: compares up to three numbers; what follows a number is ignored.
version_at_least() {
  local index have want
  for index in 1 2 3; do
    have="$(version_part "$1" "$index")"
    want="$(version_part "$2" "$index")"
    [ "$have" -eq "$want" ] || { [ "$have" -gt "$want" ]; return; }
  done
}

version_part() {
  local part
  part="$(printf '%s.0.0' "$1" | cut -d. -f"$2")"
  part="${part%%[!0-9]*}"
  printf '%s' "${part:-0}"
}

sha256_of() {
  if command -v sha256sum >/dev/null 2>&1; then
    sha256sum "$@" | cut -d' ' -f1
  else
    shasum -a 256 "$@" | cut -d' ' -f1
  fi
}

# The command that installs tmux here, for messages.
tmux_command() {
  if command -v apt-get >/dev/null 2>&1; then
    printf 'sudo apt-get update && sudo apt-get install -y tmux'
  elif command -v dnf >/dev/null 2>&1; then
    printf 'sudo dnf install -y tmux'
  elif command -v brew >/dev/null 2>&1; then
    printf 'brew install tmux'
  else
    printf 'install tmux with the package manager of this system'
  fi
}
