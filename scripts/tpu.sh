# shellcheck shell=bash disable=SC2034     # what is set here is for the scripts that source it
# Sourced by the scripts that work on a TPU slice: settings, gcloud, the code that the hosts get, the state of a run.
# $DRY_RUN not empty: commands are printed, none is executed.
. scripts/environment.sh

SCRATCH=$(mktemp -d)
# BASHPID: a process in the background that is killed just after its start would do this, too
trap 'if [ "$BASHPID" = "$$" ]; then rm -rf "$SCRATCH"; [ -z "${OUR_AGENT:-}" ] || kill "$OUR_AGENT"; fi' EXIT
ANSWER_SECONDS=${TRM_ANSWER_SECONDS:-120}       # for gcloud or a host to answer; gcloud by itself tries a dead host ten times
exec 3>&1                                       # for what a dry run prints inside of $( )

say() { echo "$(date -u +%H:%M:%S) $*"; }
fail() { local status=$1; shift; echo "error: $*" >&2; exit "$status"; }

# execute COMMAND...: run it, or print it under --dry_run
execute() {
    if [ -n "$DRY_RUN" ]; then { printf '+'; printf ' %q' "$@"; echo; } >&3; else "$@"; fi
}

# ----- settings -----
# read_settings CONFIG [flags of scripts/tpu_settings.py]: sets TPU_PROJECT, TPU_ZONE, ..., and with --run_name RUN_URL, DATASET, ...
# It reads the code in $CODE_HERE (default: this repository).
read_settings() {
    local settings
    PYTHON_HERE=$(realpath --no-symlinks "${TRM_VENV:-.venv}/bin/python")
    if [ ! -x "$PYTHON_HERE" ]; then PYTHON_HERE=$(find_python) || exit; fi
    "$PYTHON_HERE" -c 'import numpy, yaml' 2>/dev/null || fail 2 "$PYTHON_HERE has no PyYAML or no numpy: $PYTHON_HERE -m pip install pyyaml numpy"
    settings=$(cd "${CODE_HERE:-.}" && "$PYTHON_HERE" scripts/tpu_settings.py "$@") || exit
    eval "$settings"
    LOCATION=("--project=$TPU_PROJECT" "--zone=$TPU_ZONE" --quiet)
}

need_gcloud() {
    if [ -n "$DRY_RUN" ]; then return; fi
    command -v gcloud >/dev/null || fail 2 "gcloud is not on the PATH: install the Google Cloud CLI, then gcloud auth login"
    [ -n "$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' 2>/dev/null)" ] || fail 2 "gcloud has no active account: gcloud auth login"
}

# in_repository FILE: its path in the repository, where this runs
in_repository() {
    local path
    path=$(realpath --relative-to=. "$1")
    case "$path" in ../*) fail 2 "$1: the hosts get this repository, and it is not in there: copy it to configs/" ;; esac
    echo "$path"
}

# ----- the slice -----
# state_of tpu-vm|queued-resources: READY, PREEMPTED, ... (queued: ACTIVE, WAITING_FOR_RESOURCES, ...); GONE; NO_ANSWER
state_of() {
    local format='value(state)' text
    if [ "$1" = queued-resources ]; then format='value(state.state)'; fi
    if text=$(execute timeout "$ANSWER_SECONDS" gcloud compute tpus "$1" describe "$TPU_NAME" "${LOCATION[@]}" "--format=$format" 2>"$SCRATCH/describe"); then
        echo "${text:-GONE}"
    elif grep -q NOT_FOUND "$SCRATCH/describe"; then
        echo GONE
    else
        cat "$SCRATCH/describe" >&2
        echo NO_ANSWER
    fi
}

# delete_slice: the queued resource, if there is one, takes its slice with it
delete_slice() {
    if [ -n "$DRY_RUN" ] || [ "$(state_of queued-resources)" != GONE ]; then
        execute gcloud compute tpus queued-resources delete "$TPU_NAME" "${LOCATION[@]}" --force
    fi
    if [ -n "$DRY_RUN" ] || [ "$(state_of tpu-vm)" != GONE ]; then
        execute gcloud compute tpus tpu-vm delete "$TPU_NAME" "${LOCATION[@]}"
    fi
}

LIMIT=()
# on_hosts WORKER|all COMMAND: over ssh. gcloud runs a command again whose connection broke: it must bear that
on_hosts() {
    execute "${LIMIT[@]}" gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${LOCATION[@]}" "--worker=$1" "--command=$2"
}

# ask_hosts WORKER|all COMMAND: what they print, within ANSWER_SECONDS; what gcloud says is shown if it fails
ask_hosts() {
    local LIMIT=(timeout --kill-after=10 "$ANSWER_SECONDS") status=0
    on_hosts "$@" 2>"$SCRATCH/ask" || status=$?
    if [ "$status" != 0 ]; then cat "$SCRATCH/ask" >&2; fi
    return "$status"
}

# add_ssh_key: gcloud reaches several hosts at once with a key that ssh-agent holds, and makes it at its first ssh to one host
add_ssh_key() {
    local key=~/.ssh/google_compute_engine
    if [ "$TPU_HOSTS" = 1 ]; then return; fi
    if [ ! -e "$key" ]; then ask_hosts 0 true || return; fi
    if [ -z "$DRY_RUN" ] && [ -z "${SSH_AUTH_SOCK:-}" ]; then
        eval "$(ssh-agent -s 3>&-)" >/dev/null
        OUR_AGENT=$SSH_AGENT_PID
    fi
    # not for a silent host: that would be a reason to delete the slice
    execute ssh-add -q "$key" || fail 2 "ssh-add $key failed: gcloud reaches several hosts at once only with this key in ssh-agent"
}

# ----- the code -----
# choose_code [COMMIT]: sets TREE, what to send; COMMIT, as `git describe --dirty` names it; CODE, its folder on a host
choose_code() {
    git rev-parse --git-dir >/dev/null 2>&1 || fail 2 "$PWD is not a git repository, so that a run's code would have no name: git clone the kit, or git init, add and commit"
    COMMIT=$(git rev-parse --verify --quiet "${1:-HEAD}^{commit}") || fail 2 "${1:-HEAD}: there is no such commit here"
    TREE=$(git rev-parse "$COMMIT^{tree}")
    if [ -z "${1:-}" ] && [ -n "$(git status --porcelain)" ]; then
        COMMIT=$COMMIT-dirty
        # an index of its own: the user's stays as it is
        TREE=$(export GIT_INDEX_FILE=$SCRATCH/index; git read-tree HEAD; git add --all; git write-tree)
    fi
    CODE=trm/code/${COMMIT:0:12}-${TREE:0:12}
    git archive --format=tar --output="$SCRATCH/trm-code.tar" "$TREE"
    echo "$COMMIT" > "$SCRATCH/COMMIT"
    tar --append --file="$SCRATCH/trm-code.tar" --directory="$SCRATCH" COMMIT
}

# send_code: to all hosts, where unpack_code, the beginning of a command for them, finds it
send_code() {
    execute gcloud compute tpus tpu-vm scp "$SCRATCH/trm-code.tar" "$TPU_NAME:" "${LOCATION[@]}" --worker=all ||
        fail 1 "the code could not be sent to all hosts of $TPU_NAME: gcloud's message is above"
}
unpack_code() { echo "mkdir -p $CODE && tar -xf trm-code.tar -C $CODE && ln -sfn ~/$CODE trm/current"; }

# host_command ARGUMENTS: a command for hosts, scripts/tpu_host.sh with these
host_command() { echo "bash trm/current/scripts/tpu_host.sh$(printf ' %q' "$@")"; }

# ----- the state of a run -----
# look_at_run: sets RUN_STATE to running, finished, failed, preempted or absent, or to unknown where gcloud gives no answer; and RUN_WHY
look_at_run() {
    local slice answers
    slice=$(state_of tpu-vm)
    case "$slice" in
        NO_ANSWER) RUN_STATE=unknown RUN_WHY="gcloud gives no answer about the slice $TPU_NAME"; return ;;
        READY) ;;
        *) RUN_STATE=absent RUN_WHY="the slice $TPU_NAME is not READY"; look_into_folder; return ;;
    esac
    if ! add_ssh_key || ! answers=$(ask_hosts all "[ ! -e trm/current ] && echo trm: nothing || $(host_command status "$RUN_NAME")"); then
        RUN_STATE=preempted RUN_WHY="the hosts of $TPU_NAME do not answer"
        look_into_folder
        return
    fi
    answers=$(sed -n 's/^trm: //p' <<< "$answers" | sort | paste -sd, | sed 's/,/, /g')
    RUN_WHY="hosts: $answers"
    case "$answers" in
        *up*) RUN_STATE=running ;;
        *"status 2"*) RUN_STATE=failed ;;
        *stopped*|*"status 143"*|*lost*) RUN_STATE=preempted ;;
        *"status "[1-9]*) RUN_STATE=failed ;;
        *nothing*) RUN_STATE=absent; look_into_folder ;;
        *) RUN_STATE=finished ;;
    esac
}

# look_into_folder: the run's folder says more than a slice that is gone, or new
look_into_folder() {
    local folder=$SCRATCH/run
    mkdir -p "$folder"
    case "$RUN_URL" in
        gs://*) gcloud storage rsync "$RUN_URL" "$folder" >/dev/null 2>&1 || true ;;    # without its folders
        *) folder=$RUN_URL ;;
    esac
    if [ ! -s "$folder/config.yaml" ]; then return; fi
    if "$PYTHON_HERE" scripts/tpu_settings.py "$folder/config.yaml" --finished "$folder/eval.json" "$folder/metrics.jsonl"; then
        RUN_STATE=finished RUN_WHY="$RUN_URL/eval.json"
    else
        RUN_STATE=preempted RUN_WHY="$RUN_WHY, and $RUN_URL is not at its end"
    fi
}
