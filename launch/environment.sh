# Sourced by quickstart, test and check: makes .venv and installs the project with the given extras, once.
# Usage: prepare_environment EXTRA[,EXTRA]; an empty argument installs no extras.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "mtkd needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2
  return 1
}

prepare_environment() {
  local extras="$1" python stamp wanted
  [ -x .venv/bin/python ] || { python=$(find_python) && echo "making .venv" >&2 && "$python" -m venv .venv; }
  # The stamp names what was installed; any change of the project's dependencies installs again.
  wanted=$(cat pyproject.toml launch/constraints.txt | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  stamp=".venv/mtkd-${extras:-base}.stamp"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing mtkd${extras:+ with $extras} (about a minute)" >&2
    # torch first and pinned: asked for by another package, pip would take a build with gigabytes of CUDA
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
  fi
}
