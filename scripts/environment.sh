# shellcheck shell=bash
# Sourced by the other scripts: makes or reuses the virtual environment and sets $PYTHON to its interpreter.
#   TRM_VENV     where it lies (default: .venv in the repository; on a TPU host ~/trm/venv)
#   TRM_PYTHON   the interpreter it is made with (default: the newest one on the PATH that all
#                requirements files allow; on a TPU host one that uv downloads)
UV_VERSION=0.13.9       # that of requirements-test.txt

# read_python_range FILE...: reads the line `# Python 3.A to 3.B` of each file, and sets `least` to
# the highest A, `most` to the lowest B, and `needing` to the file that has the highest A (for
# messages)
read_python_range() {
    local file
    least=0 most=99 needing=$1
    for file in "$@"; do
        [[ "$(< "$file")" =~ "# Python 3."([0-9]+)" to 3."([0-9]+) ]] ||
            { echo "error: $file: it must say which Python it takes, in a line # Python 3.A to 3.B" >&2; return 2; }
        if [ "${BASH_REMATCH[1]}" -gt "$least" ]; then least=${BASH_REMATCH[1]} needing=$file; fi
        if [ "${BASH_REMATCH[2]}" -lt "$most" ]; then most=${BASH_REMATCH[2]}; fi
    done
}

is_in_range() { "$1" -c "import sys; sys.exit(not (3, $least) <= sys.version_info[:2] <= (3, $most))" 2>/dev/null; }

# find_python [requirements file ...]: prints an interpreter that all of them take
find_python() {
    local least most needing minor candidates=()
    read_python_range "${@:-requirements.txt}" || return
    if [ -n "${TRM_PYTHON:-}" ]; then
        if is_in_range "$TRM_PYTHON"; then command -v "$TRM_PYTHON"; return; fi
        echo "error: TRM_PYTHON = $TRM_PYTHON: $needing needs Python 3.$least to 3.$most, and this is none: name another" >&2
        return 2
    fi
    for ((minor = most; minor >= least; minor--)); do candidates+=("python3.$minor"); done
    for candidate in "${candidates[@]}" python3; do
        if is_in_range "$candidate"; then command -v "$candidate"; return; fi
    done
    echo "error: no Python 3.$least to 3.$most is here, which $needing needs: install one, or name it by TRM_PYTHON=/path/to/python3.$least" >&2
    return 2
}

# environment_is_complete FILE...: whether it holds what these files say
environment_is_complete() {
    local venv="${TRM_VENV:-.venv}" file
    [ -x "$venv/bin/python" ] || return
    for file in "$@"; do [ -e "$venv/$(marker "$file")" ] || return; done
}

marker() { echo "installed-$(sha256sum < "$1" | cut -c1-16)"; }

# set_up_environment [requirements file ...]   (default: requirements.txt); $INSTALL_WITH: pip (default) or uv
set_up_environment() {
    local venv="${TRM_VENV:-.venv}" files=("${@:-requirements.txt}")
    if environment_is_complete "${files[@]}"; then
        echo "environment: $venv (its requirements have not changed)"
    else
        mkdir -p "$venv" || { echo "error: TRM_VENV = $venv: no folder can be made there: name another" >&2; return 2; }
        # The folder is the lock: when gcloud loses the connection of ssh it runs the command again,
        # while the first installation may still be running
        {
            if ! flock --nonblock 8; then
                echo "environment: another installation into $venv is running: waiting for its end"
                flock 8
            fi
            environment_is_complete "${files[@]}" || install_environment "${files[@]}"
        } 8<"$venv" || return
    fi
    # shellcheck disable=SC2034  # for the scripts that source this
    PYTHON="$venv/bin/python"
}

install_environment() {
    local least most needing file status=0
    read_python_range "$@" || return
    rm -f "$venv"/installed-*       # an interrupted installation is not taken for a whole one
    "install_with_${INSTALL_WITH:-pip}" "$@" || return
    "$venv/bin/python" scripts/check_environment.py "$@" || status=$?
    if [ "$status" -gt 1 ]; then echo "error: $venv: Python ended with status $status at the import of the package named last above" >&2; fi
    [ "$status" = 0 ] || return 1
    for file in "$@"; do touch "$venv/$(marker "$file")"; done
    echo "environment: $venv is whole"
}

install_with_pip() {
    local base
    if [ -x "$venv/bin/python" ] && ! is_in_range "$venv/bin/python"; then
        echo "error: $venv: $needing needs Python 3.$least to 3.$most, and this has $("$venv/bin/python" --version): rm -r $venv, then" \
             "the same command again, or name another place by TRM_VENV" >&2
        return 2
    fi
    base=$(find_python "$@") || return
    "$base" -c 'import ensurepip' 2>/dev/null ||
        { echo "error: $base has no venv module: install it (Debian, Ubuntu: $(basename "$base")-venv), or name another Python by TRM_PYTHON" >&2; return 2; }
    echo "environment: installing $* into $venv with $base: 4 GB to download, 8 GB on disk: 2 to 5 minutes where the network gives 50 MB/s"
    "$base" -m venv "$venv" || { echo "error: TRM_VENV = $venv: no virtual environment can be made there: the message is above" >&2; return 2; }
    "$venv/bin/python" -m pip install --disable-pip-version-check "${@/#/--requirement=}" ||
        { echo "error: $venv: pip could not install ${*}: its message is above; the same command again goes on" >&2; return 1; }
}

# The Python of a TPU VM is 3.10 and has no venv module, and apt cannot install one while it is busy
# after the start. uv needs neither: pip installs it, and it downloads a Python of its own. All of
# it lies in one folder beside the environment, on the same disk, so that uv links files instead of
# copying them.
install_with_uv() {
    local uv="$venv-uv/bin/uv" python="3.$least" source=(--torch-backend=cpu)
    local size='0.6 GB to download, 2 GB on disk: a minute or two (estimates, for a network of 50 MB/s)'
    local -x UV_CACHE_DIR="$venv-uv/cache" UV_PYTHON_INSTALL_DIR="$venv-uv/python" UV_MANAGED_PYTHON=1
    if [ -n "$(ls -A "$venv")" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv-uv" ]; then      # its content will be deleted
        echo "error: TRM_VENV = $venv: it is not empty, and no virtual environment: name another folder" >&2
        return 2
    fi
    if [ -n "${TRM_PYTHON:-}" ]; then
        python=$(find_python "$@") || return
        unset UV_MANAGED_PYTHON
    fi
    if [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ]; then
        # uv does not read PIP_*. Like pip it takes the best version among all indexes, with this
        # strategy, and torch from there, too
        local -x UV_INDEX_STRATEGY=unsafe-best-match
        if [ -n "${PIP_INDEX_URL:-}" ]; then local -x UV_DEFAULT_INDEX=$PIP_INDEX_URL; fi
        if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then local -x UV_INDEX=$PIP_EXTRA_INDEX_URL; fi
        source=() size="from PIP_INDEX_URL and PIP_EXTRA_INDEX_URL, $size; if their torch is the CUDA build 4 GB, 8 GB and 5 minutes"
    fi
    echo "environment: installing $* into $venv with uv and Python $python: $size"
    if [[ "$("$uv" --version 2>/dev/null)" != "uv $UV_VERSION"* ]]; then
        python3 -m pip --version >/dev/null 2>&1 ||
            { echo "error: $(hostname): python3 has no pip to install uv with: sudo apt-get install python3-pip there, or put uv $UV_VERSION at $uv" >&2; return 2; }
        # --target: pip refuses anything else if the system manages its Python
        python3 -m pip install --quiet --disable-pip-version-check --upgrade --target "$venv-uv" "uv==$UV_VERSION" ||
            { echo "error: $(hostname): pip could not install uv $UV_VERSION: its message is above; the same command again goes on" >&2; return 1; }
    fi
    # The environment is made anew each time: if uv is killed while it installs a package, it later
    # takes this package for installed. What it has downloaded is in its cache.
    find "$venv" -mindepth 1 -delete
    "$uv" venv --python "$python" "$venv" ||
        { echo "error: $(hostname): uv could not make an environment with Python $python: its message is above; where the download of Python is" \
               "out of reach name a mirror by UV_PYTHON_INSTALL_MIRROR" >&2; return 1; }
    "$uv" pip install --python "$venv/bin/python" "${source[@]}" "${@/#/--requirements=}" ||
        { echo "error: $(hostname): uv could not install ${*}: its message is above; the same command again goes on. Where PyTorch's own index is" \
               "out of reach name another by PIP_INDEX_URL: torch then comes from there" >&2; return 1; }
}
