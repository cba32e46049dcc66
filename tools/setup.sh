#!/bin/sh
# Makes a virtual environment with the locked requirements and this project in it: tools/setup.sh VENV [PYTHON]
# Without PYTHON: 3.12 where there is one (the reference), else a newer one, else 3.11. Called by the Makefile.
set -eu
venv=$1
asked=${2:-}
cd "$(dirname "$0")/.."

say() { printf '==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Every interpreter of that name: on the PATH, then pyenv's, which the PATH knows as shims that may not answer.
find_all() {
    command -v "$1" 2>/dev/null || true
    case $1 in python3.*) ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"${1#python}"[.]*/bin/"$1" 2>/dev/null || true ;; esac
}

runs() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (4, 0))' 2>/dev/null; }
has_venv() { "$1" -c 'import ctypes, ensurepip, sqlite3, ssl, venv' 2>/dev/null; }

pick() {
    without_venv=
    for name in ${asked:-python3.12 python3.13 python3.14 python3.11 python3}; do
        for candidate in $(find_all "$name"); do
            runs "$candidate" || continue
            if has_venv "$candidate"; then python=$candidate; return; fi
            without_venv=${without_venv:-$candidate}
        done
    done
    [ -z "$without_venv" ] || fail "$without_venv cannot make virtual environments; run: apt-get install python3-venv"
    [ -z "$asked" ] || fail "PYTHON=$asked is no Python 3.11 or newer that runs here"
    fail "no Python 3.11 or newer was found; install one, or say which: make setup PYTHON=/path/to/python3.12"
}

# pip is set up on machines that uv was never told about: the same index, links and certificates for both.
as_pip_is_set_up() {
    settings=$("$venv/bin/python" -m pip config list)
    setting() { # the environment's lines come before the files'
        printf '%s\n' "$settings" | sed -n "s/^\(:env:\|global\|install\)\.$1='\(.*\)'\$/\2/p" | head -n 1 | sed 's/\\n/ /g; s/^ *//'
    }
    index=$(setting index-url); extra=$(setting extra-index-url); cert=$(setting cert)
    links=$(setting find-links | tr -s ' ' ',')
    [ -n "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ] || [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
    [ -n "${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}" ] || [ -z "$extra" ] || export UV_INDEX="$extra"
    [ -n "${UV_FIND_LINKS:-}" ] || [ -z "$links" ] || export UV_FIND_LINKS="$links"
    [ -n "${SSL_CERT_FILE:-}" ] || [ -z "$cert" ] || export SSL_CERT_FILE="$cert"
}

install_locked() {
    uv_pin=$(grep '^uv==' "$lock")
    if "$venv/bin/python" -m pip install -q --disable-pip-version-check "$uv_pin" && as_pip_is_set_up &&
        "$venv/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --index-strategy unsafe-best-match -r "$lock"; then
        installer=uv
    else
        say "uv could not install them; trying again with pip"
        "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r "$lock"
        installer=pip
    fi
}

pick
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
real=$("$python" -c 'import sys; print(sys.executable)')
lock=requirements/py312.txt
[ "$version" != 3.11 ] || lock=requirements/py311.txt

if ! [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
    say "$venv: a new environment with $real ($version)"
    rm -rf "$venv"
    "$real" -m venv "$venv" || fail "$real could not make $venv; run: apt-get install python3-venv"
else
    say "$venv: Python $version is there"
fi
say "installing the $(grep -c '==' "$lock") packages of $lock"
started=$(date +%s)
install_locked
say "installed with $installer in $(($(date +%s) - started)) s"
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
started=$(date +%s)
TRANSFORMERS_VERBOSITY=error "$venv/bin/python" -m tools.bytecode || true
say "compiled what a start imports in $(($(date +%s) - started)) s"
say "jaxserve is installed from this checkout; $venv/bin/python -m jaxserve serves"
