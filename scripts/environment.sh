# shellcheck shell=bash
# Sourced by the other scripts: makes or reuses the virtual environment and sets $PYTHON to its interpreter.
#   TRM_VENV     where it lies (default: .venv in the repository)
#   TRM_PYTHON   the interpreter it is made with (default: the first Python 3.10 to 3.12 on the PATH)

find_python() {
    local candidate
    for candidate in "${TRM_PYTHON:-}" python3.12 python3.11 python3.10 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 found: install one, or name it by TRM_PYTHON=/path/to/python3.11" >&2
    return 2
}

# set_up_environment [requirements file ...]   (default: requirements.txt)
set_up_environment() {
    local venv="${TRM_VENV:-.venv}" base file markers=()
    local files=("${@:-requirements.txt}")
    for file in "${files[@]}"; do markers+=("$venv/installed-$(sha256sum < "$file" | cut -c1-16)"); done
    if [ -x "$venv/bin/python" ] && ls "${markers[@]}" >/dev/null 2>&1; then
        echo "environment: $venv (its requirements have not changed)"
    else
        base=$(find_python) || return
        echo "environment: installing ${files[*]} into $venv with $base (2 to 5 minutes and 7 GB the first time)"
        rm -f "$venv"/installed-*       # an interrupted installation is not taken for a whole one
        "$base" -m venv "$venv" || { echo "error: $base cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; return 2; }
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]/#/--requirement=}"
        touch "${markers[@]}"
    fi
    # shellcheck disable=SC2034  # for the scripts that source this
    PYTHON="$venv/bin/python"
}
