#!/bin/sh
# Makes .venv with fastlb installed in it for development; `make` calls this when pyproject.toml, setup.py
# or this file changed. What the machine lacks is installed on a Debian system when we may (root, or sudo
# that asks nothing), else named together with its Debian package. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

missing=""  # lines for people
packages="" # for apt-get

lacks() { # lacks WHAT PACKAGE
    missing="$missing
  $1 (Debian package: $2)"
    packages="$packages $2"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() { # the first of the usual names that is new enough
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

compiles() { # compiles WITH_INCLUDE HEADER
    echo "#include <$2>" | ${CC:-cc} -I"$1" -fsyntax-only -x c - 2>/dev/null
}

look_around() {
    missing="" packages=""
    python=$(find_python)
    if [ -z "$python" ]; then
        lacks "Python 3.10 or newer, with headers and venv (${PYTHON:-python3} is $(${PYTHON:-python3} --version \
            2>/dev/null || echo absent))" "python3 python3-venv python3-dev"
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            lacks "$python cannot make virtual environments: modules venv and ensurepip" python3-venv
    fi
    if ! command -v "${CC:-cc}" >/dev/null; then
        lacks "a C compiler: ${CC:-cc}" gcc
        lacks "the C library's headers" libc6-dev
    elif ! compiles . linux/if_packet.h; then
        lacks "the C library's headers: linux/if_packet.h" libc6-dev
    fi
    if [ -n "$python" ]; then
        headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
        [ -f "$headers/Python.h" ] || lacks "$headers/Python.h" python3-dev
    fi
}

apt_install() { # false when this is no Debian, or we may not
    [ -e /etc/debian_version ] && command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -eq 0 ]; then
        sudo=""
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo="sudo"
    else
        return 1
    fi
    echo "installing$packages" >&2
    # $sudo and $packages are lists of words.
    $sudo apt-get update -qq &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >&2
}

look_around
if [ -n "$missing" ] && apt_install; then
    look_around
fi
if [ -n "$missing" ]; then
    echo "fastlb cannot be built here. Missing:$missing" >&2
    echo "On Debian:  apt-get install$packages" >&2
    exit 1
fi

if ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv
fi
.venv/bin/python -m pip install --quiet 'setuptools>=77' 'cython>=3.3' &&
    .venv/bin/python -m pip install --quiet --no-build-isolation -e '.[test,docs]' || {
    echo "fastlb: pip could not install the dependencies or build the package (see above); it needs the Python" \
        "package index, or a mirror named by PIP_INDEX_URL" >&2
    exit 1
}
