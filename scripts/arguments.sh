# shellcheck shell=bash
# Sourced by the other scripts before they read their arguments: functions for that. $PWD is still
# the user's folder.

mistake() { echo "error: $*" >&2; exit 2; }

# need_value "$@": the flag $1 has a value, $2
need_value() { if [ $# -lt 2 ] || [ -z "$2" ]; then mistake "$1 needs a value; see --help"; fi; }

# need_number "$@": the flag $1 has a value, $2, that is a number above 0
need_number() {
    need_value "$@"
    if ! [[ $2 =~ ^[0-9]*\.?[0-9]+$ && $2 =~ [1-9] ]]; then mistake "$1 $2: must be a number above 0"; fi
}

# one_config FILE: sets CONFIG to the absolute path of this configuration, and refuses a second one.
# The file need not exist here: the commit that is sent to the hosts may have it
one_config() {
    if [ -n "$CONFIG" ]; then mistake "$1: one configuration at a time, after $CONFIG"; fi
    CONFIG=$(realpath --canonicalize-missing "$1")
}
