#!/usr/bin/env bash
# Installs, upgrades or removes zk0bot for one user. Runs on bash 3.2; reads nothing from stdin.
#
#   curl -fsSL URL/get-zk0bot.sh | bash                      install or upgrade
#   curl -fsSL URL/get-zk0bot.sh | bash -s -- --uninstall    remove; keys, runs and data stay
#
# This file is the source: scripts/build_release.sh fills in version, checksum and address.
# Braces around everything: bash runs nothing before it has read the last line.
{
set -euo pipefail

VERSION="@version@"
WHEEL="zk0bot-$VERSION-py3-none-any.whl"
WHEEL_SHA256="@wheel-sha256@"
PINS="requirements-$VERSION.txt"
PINS_SHA256="@pins-sha256@"
RELEASE_URL="${ZK0BOT_RELEASE_URL:-@release-url@}"

#@bootstrap@

APP_DIR="$ZK0BOT_ROOT/app"
BIN_DIR="$ZK0BOT_ROOT/bin"
ENV_DIR="$APP_DIR/$VERSION"
BLOCK_BEGIN="# >>> zk0bot >>>"
BLOCK_END="# <<< zk0bot <<<"

usage() {
  cat <<'TEXT'
get-zk0bot.sh [--force] [--no-modify-path] | --uninstall | --purge
  --force            install also when a newer version is there
  --no-modify-path   leave the shell's start file alone
  --uninstall        remove the program; keys, runs, logs and caches stay
  --purge            remove the program and everything else of zk0bot, keys included
Variables: ZK0BOT_HOME (default ~/.zk0bot), ZK0BOT_RELEASE_URL, UV_CACHE_DIR.
TEXT
}

main() {
  local force=no modify_path=yes action=install
  while [ $# -gt 0 ]; do
    case "$1" in
      --force) force=yes ;;
      --no-modify-path) modify_path=no ;;
      --uninstall) action=uninstall ;;
      --purge) action=purge ;;
      --help | -h) usage; return ;;
      *) fail "unknown option $1" "$(usage)" ;;
    esac
    shift
  done
  case "$action" in
    install) install "$force" "$modify_path" ;;
    uninstall) uninstall ;;
    purge) purge ;;
  esac
}

install() {
  case "$VERSION" in @*) fail "this is the source of the installer" "scripts/build_release.sh URL" ;; esac
  refuse_downgrade "$1"
  use_private_places
  if is_installed; then
    say "zk0bot $VERSION is already installed"
  else
    install_app
  fi
  switch_to_app
  write_completions
  if [ "$2" = yes ]; then add_to_path; else say "add to PATH yourself: $BIN_DIR"; fi
  warn_without_tmux
  say "zk0bot $VERSION is ready: $BIN_DIR/zk0bot"
}

installed_version() {
  local link
  link="$(readlink "$BIN_DIR/zk0bot" 2>/dev/null)" || return 0
  link="${link%/bin/zk0bot}"
  printf '%s' "${link##*/}"
}

refuse_downgrade() {
  local present
  present="$(installed_version)"
  if [ "$1" = yes ] || [ -z "$present" ]; then return; fi
  version_at_least "$VERSION" "$present" ||
    fail "zk0bot $present is installed, which is newer than $VERSION" "--force installs $VERSION"
}

# The last thing that installing writes is the checksums of what was installed.
is_installed() {
  [ -x "$ENV_DIR/bin/zk0bot" ] && [ "$(cat "$ENV_DIR/.zk0bot-release" 2>/dev/null)" = "$WHEEL_SHA256 $PINS_SHA256" ]
}

install_app() {
  DOWNLOAD_DIR="$(mktemp -d)"
  trap 'rm -rf "$DOWNLOAD_DIR"' EXIT
  download "$WHEEL" "$WHEEL_SHA256"
  download "$PINS" "$PINS_SHA256"
  find_uv
  say "installing zk0bot $VERSION into $ENV_DIR; the first time this fetches about 3 GB"
  rm -rf "$ENV_DIR"
  "$UV" --quiet venv --python 3.12 "$ENV_DIR" >&2 ||
    fail "no Python 3.12: not on this machine, and uv says above why it could not fetch one"
  export UV_COMPILE_BYTECODE="${UV_COMPILE_BYTECODE:-1}"
  pip_install --require-hashes --requirement "$DOWNLOAD_DIR/$PINS"
  pip_install "$DOWNLOAD_DIR/$WHEEL"
  "$ENV_DIR/bin/zk0bot" version >/dev/null || fail "the installed zk0bot does not start"
  printf '%s\n' "$WHEEL_SHA256 $PINS_SHA256" >"$ENV_DIR/.zk0bot-release"
}

# The pins name every package with its checksums, so nothing is resolved here.
pip_install() {
  "$UV" pip install --python "$ENV_DIR/bin/python" --no-deps "$@" >&2 ||
    fail "the packages could not be installed; uv says above what it could not reach" \
      "run this again when it can be reached: what has arrived is kept in $UV_CACHE_DIR"
}

# download NAME SHA256: into DOWNLOAD_DIR.
download() {
  local found
  say "fetching $RELEASE_URL/$1"
  curl -fsSL --retry 3 -o "$DOWNLOAD_DIR/$1" "$RELEASE_URL/$1" ||
    fail "could not fetch $RELEASE_URL/$1" "is that address reachable from here?"
  found="$(sha256_of "$DOWNLOAD_DIR/$1")"
  [ "$found" = "$2" ] ||
    fail "$1 is not the file this installer was made for: SHA-256 $found, not $2" \
      "nothing was installed; fetch the installer again, and tell whoever gave you the address"
}

# One step: the command is the old version or the new one. The version before stays, since its
# processes may run; older ones go.
switch_to_app() {
  local previous directory
  previous="$(installed_version)"
  mkdir -p "$BIN_DIR"
  ln -sf "$ENV_DIR/bin/zk0bot" "$BIN_DIR/.zk0bot.new"
  mv -f "$BIN_DIR/.zk0bot.new" "$BIN_DIR/zk0bot"
  if [ -z "$previous" ] || [ "$previous" = "$VERSION" ]; then return; fi
  for directory in "$APP_DIR"/*/; do
    case "$(basename "$directory")" in
      "$VERSION" | "$previous") ;;
      *) rm -rf "$directory" ;;
    esac
  done
  say "was $previous; what runs now keeps it until stopped and started again"
}

write_completions() {
  local shell
  mkdir -p "$BIN_DIR/completions"
  for shell in bash zsh fish; do
    _ZK0BOT_COMPLETE="source_$shell" "$BIN_DIR/zk0bot" >"$BIN_DIR/completions/zk0bot.$shell" ||
      rm -f "$BIN_DIR/completions/zk0bot.$shell"
  done
}

# A marked block in the start file of the user's shell; not when PATH has the folder already.
add_to_path() {
  local file
  file="$(start_file)"
  if ! has_block "$file"; then
    case ":$PATH:" in *":$BIN_DIR:"*) return ;; esac
    say "adding $BIN_DIR to PATH in $file; new terminals have the command zk0bot"
  fi
  remove_block "$file"
  mkdir -p "$(dirname "$file")"
  if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then echo >>"$file"; fi
  block "${file##*.}" >>"$file"
}

start_file() {
  case "$(basename "${SHELL:-sh}")" in
    zsh) printf '%s' "${ZDOTDIR:-$HOME}/.zshrc" ;;
    fish) printf '%s' "${XDG_CONFIG_HOME:-$HOME/.config}/fish/config.fish" ;;
    bash) if [ "$(uname)" = Darwin ]; then printf '%s' "$HOME/.bash_profile"; else printf '%s' "$HOME/.bashrc"; fi ;;
    *) printf '%s' "$HOME/.profile" ;;
  esac
}

start_files() {
  printf '%s\n' "$HOME/.bashrc" "$HOME/.bash_profile" "$HOME/.profile" "${ZDOTDIR:-$HOME}/.zshrc" \
    "${XDG_CONFIG_HOME:-$HOME/.config}/fish/config.fish"
}

# block KIND: what the start file gets; KIND is the end of its name.
block() {
  local completions="$BIN_DIR/completions"
  printf '%s\n' "$BLOCK_BEGIN"
  [ -z "${ZK0BOT_HOME:-}" ] || printf 'export ZK0BOT_HOME="%s"\n' "$ZK0BOT_HOME"
  # shellcheck disable=SC2016  # expanded by the shell that starts
  printf 'export PATH="%s:$PATH"\n' "$BIN_DIR"
  case "$1" in
    zshrc)
      printf '(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }\n'
      printf '[ -f "%s/zk0bot.zsh" ] && . "%s/zk0bot.zsh"\n' "$completions" "$completions"
      ;;
    fish) printf 'test -f "%s/zk0bot.fish"; and source "%s/zk0bot.fish"\n' "$completions" "$completions" ;;
    profile) ;;
    *) printf '[ -f "%s/zk0bot.bash" ] && . "%s/zk0bot.bash"\n' "$completions" "$completions" ;;
  esac
  printf '%s\n' "$BLOCK_END"
}

has_block() { [ -f "$1" ] && grep -qxF "$BLOCK_BEGIN" "$1" && grep -qxF "$BLOCK_END" "$1"; }

# Rewrites in place, so that links and permissions of the file stay.
remove_block() {
  local rest
  has_block "$1" || return 0
  rest="$(mktemp)"
  awk -v begin="$BLOCK_BEGIN" -v end="$BLOCK_END" \
    '$0 == begin {inside = 1} !inside {print} $0 == end {inside = 0}' "$1" >"$rest"
  cat "$rest" >"$1"
  rm -f "$rest"
}

warn_without_tmux() {
  command -v tmux >/dev/null 2>&1 || say "tmux is missing, and zk0bot needs it; type: $(tmux_command)"
}

uninstall() {
  remove_program
  if [ -d "$ZK0BOT_ROOT" ]; then say "keys, runs, logs and caches stay in $ZK0BOT_ROOT; --purge removes them"; fi
}

# Removes the names that zk0bot makes, so that a state root chosen badly costs nothing else.
purge() {
  local name
  remove_program
  for name in cache clients demo helpers hf_token python server tools; do
    rm -rf "${ZK0BOT_ROOT:?}/$name"
  done
  if rmdir "$ZK0BOT_ROOT" 2>/dev/null; then say "removed $ZK0BOT_ROOT, keys included"; fi
  if [ -d "$ZK0BOT_ROOT" ]; then say "left, since zk0bot did not make it: $(ls -A "$ZK0BOT_ROOT")"; fi
}

remove_program() {
  local file
  refuse_while_running
  start_files | while IFS= read -r file; do remove_block "$file"; done
  rm -rf "$APP_DIR" "$BIN_DIR"
  say "removed zk0bot"
}

refuse_while_running() {
  command -v pgrep >/dev/null 2>&1 || return 0
  if pgrep -f "$APP_DIR/" >/dev/null; then
    fail "zk0bot processes are running from $APP_DIR" \
      "zk0bot client stop; zk0bot server stop; zk0bot demo --stop"
  fi
}

main "$@" </dev/null
exit
}
