# Sourced by the commands in the folder above: makes `.venv` with what the project needs, once.
# PYTHON chooses the interpreter (python3 by default; 3.11 or later).

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

say() { printf '==> %s\n' "$*"; }

environment() {
    local extra=$1 python=${PYTHON:-python3} pinned stamp wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "Python 3.11 or later is needed; set PYTHON to one."
        return 1
    }
    # JAX's newest release needs Python 3.12: each side has its own versions.
    pinned=$("$python" -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")')
    pinned=scripts/env/constraints-$pinned.txt
    venv=.venv/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    stamp=$venv/.installed-$extra
    wanted=$(cat pyproject.toml "$pinned" | cksum)
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        say "Setting up $venv (versions of $pinned); this takes a minute or two"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$pinned" --editable ".[$extra]"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
