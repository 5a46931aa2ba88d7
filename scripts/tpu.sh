# shellcheck shell=bash disable=SC2034     # what is set here is for the scripts that source it
# Sourced by the scripts that work on a TPU slice: settings, gcloud, the slice, the code that the
# hosts get, the state of a run. If $DRY_RUN is not empty, commands are printed and none is
# executed.
. scripts/environment.sh

SCRATCH=$(mktemp -d)
APART=''                                        # the process group of the gcloud command that runs now
TICKS=''                                        # the process that says that gcloud still works
OUR_AGENT=''                                    # the process of our ssh-agent
MAY_EXIST=''                                    # not empty: there may be a slice, and the end of this script is to say how to delete it
ANSWER_SECONDS=${TRM_ANSWER_SECONDS:-120}       # for gcloud or a host to answer; gcloud by itself tries a dead host ten times
CONTACT_SECONDS=${TRM_CONTACT_SECONDS:-300}     # for the first contact: Google takes minutes to bring a new ssh key to the hosts
REASON_SECONDS=${TRM_REASON_SECONDS:-1800}      # how often Google's reason for the wait is shown
exec 3>&1                                       # for what a dry run prints while a function's output goes to a file

# The trap is inherited by a process in the background, which runs it, too, if it is killed just
# after its start: hence the comparison with BASHPID
trap 'if [ "$BASHPID" = "$$" ]; then clean_up; fi' EXIT
clean_up() {
    trap '' PIPE        # who reads what is printed may be gone already, as a tee that Ctrl-C has ended
    if [ -n "$TICKS" ]; then kill "$TICKS" 2>/dev/null || true; fi
    if [ -n "$APART" ]; then kill -TERM -- "-$APART" 2>/dev/null || kill -TERM "$APART" 2>/dev/null || true; fi
    if [ -n "$OUR_AGENT" ]; then kill "$OUR_AGENT" 2>/dev/null || true; fi
    rm -rf "$SCRATCH"
    if [ -n "$MAY_EXIST" ]; then how_to_delete >&3 2>/dev/null || true; fi
}

say() { echo "$(date -u +%H:%M:%S) $*"; }
fail() { local status=$1; shift; echo "error: $*" >&2; exit "$status"; }        # the end, for the reason that is said

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
    "$PYTHON_HERE" -c 'import numpy, yaml' 2>/dev/null || fail 2 "$PYTHON_HERE has no PyYAML or no numpy:" \
        "$PYTHON_HERE -m venv '${TRM_VENV:-.venv}' && '${TRM_VENV:-.venv}/bin/python' -m pip install pyyaml numpy;" \
        "or bash scripts/quickstart.sh, which makes the whole environment"
    settings=$(cd "${CODE_HERE:-.}" && "$PYTHON_HERE" scripts/tpu_settings.py "$@") || exit
    eval "$settings"
    LOCATION=("--project=$TPU_PROJECT" "--zone=$TPU_ZONE" --quiet)
    SLICE="tpu.name=$TPU_NAME tpu.zone=$TPU_ZONE tpu.project=$TPU_PROJECT"      # what a command has to be told of it
}

# in_repository FILE: its path in the repository, where this runs
in_repository() {
    local path
    path=$(realpath --canonicalize-missing --relative-to=. "$1")
    case "$path" in ../*) fail 2 "$1: the hosts get this repository, and it is not in there: copy it to configs/" ;; esac
    echo "$path"
}

# how_to_delete: say the command that deletes the slice; silent under scripts/keep_alive.sh, which
# says it at its own end
how_to_delete() { MAY_EXIST=''; [ -n "${TRM_KEPT_ALIVE:-}" ] || say "$TPU_NAME uses up its quota until it is deleted: bash scripts/delete_tpu.sh $SLICE"; }

# ----- gcloud -----
# apart SECONDS COMMAND...: run it for at most SECONDS (0: no limit) in a session of its own, so
# that a key typed in this terminal neither reaches it nor stops it. It ends when this script does.
# Do not use it inside $( ): a subshell does not end it.
apart() {
    local status=0
    setsid timeout --kill-after=10 "$@" </dev/null &
    APART=$!
    wait "$APART" || status=$?
    APART=''
    return "$status"
}

# call_gcloud SECONDS ARGUMENTS...
call_gcloud() {
    if [ -n "$DRY_RUN" ]; then execute gcloud "${@:2}"; else apart "$1" gcloud "${@:2}"; fi
}

need_gcloud() {
    if [ -n "$DRY_RUN" ]; then return; fi
    command -v gcloud >/dev/null || fail 2 "Google Cloud: gcloud is not on the PATH: install the Google Cloud CLI, then gcloud auth login"
    call_gcloud "$ANSWER_SECONDS" auth list --filter=status:ACTIVE '--format=value(account)' >"$SCRATCH/account" 2>/dev/null || true
    [ -s "$SCRATCH/account" ] || fail 2 "Google Cloud: gcloud has no active account: gcloud auth login"
}

# judge FILE [create]: what an error of gcloud, which FILE holds, means. Sets VERDICT to
#   gone    there is no such slice or queued resource
#   room    there is no capacity, or the quota is in use, WHY; waiting may help
#   final   waiting does not help; WHY says what does
#   later   anything else: try again
# Only gcloud's own errors are read, since a host may print anything. create: the command was a
# request for a slice. Then an error such as FAILED_PRECONDITION is final. For any other command it
# may only mean that the slice is just being taken away.
judge() {
    local text quota="Quota (limit )?'([^']+)' (has been exceeded|exhausted)\. +Limit:? ([0-9]+) in [a-z]* ?([a-z0-9-]+)"
    text=$(sed -n '/^ERROR: /,$p' "$1" | tr -s '\n ' ' ')
    VERDICT=later WHY=''
    if [[ $text =~ $quota ]]; then
        local name=${BASH_REMATCH[2]} limit=${BASH_REMATCH[4]} where=${BASH_REMATCH[5]}
        if [ "$limit" = 0 ] || [ "$limit" -lt "${TPU_CHIPS:-0}" ]; then
            final "$TPU_PROJECT has no quota for $TPU_ACCELERATOR in $where: the limit of $name is $limit. A grant holds for one kind of chip, one zone, and" \
                "spot or on demand: compare its e-mail with tpu.accelerator_type, tpu.zone and --spot, and see gcloud's quota page of the project"
        else
            VERDICT=room WHY="the quota $name in $where, $limit, is in use: by another slice, or by a queued resource that is FAILED or SUSPENDED, which holds it until it is deleted"
        fi
    elif [[ $text =~ NOT_FOUND:\ Resource ]]; then VERDICT=gone
    elif [[ $text =~ "no more capacity"|"not enough resources"|"Insufficient reserved capacity"|RESOURCE_EXHAUSTED|'"code": 8,' ]]; then
        VERDICT=room WHY="Google has no $TPU_ACCELERATOR free in $TPU_ZONE"
    elif [[ $text =~ SERVICE_DISABLED|"has not been used in project" ]]; then
        local api=tpu.googleapis.com
        if [[ $text =~ ([a-z]+\.googleapis\.com) ]]; then api=${BASH_REMATCH[1]}; fi
        final "the service $api is off in $TPU_PROJECT: gcloud services enable $api --project=$TPU_PROJECT, and a minute later the same command"
    elif [[ $text =~ "Location "[^\ ]+" is not found" ]]; then
        final "tpu.zone = $TPU_ZONE: Google knows no such zone for TPUs, or $TPU_PROJECT may not use it: take the zone that the grant names (gcloud compute tpus locations list --project=$TPU_PROJECT)"
    elif [[ $text =~ PERMISSION_DENIED|"Required '"[a-z.A-Z]+"' permission" ]]; then
        final "the account may not do this in tpu.project = $TPU_PROJECT: check the project's id and 'gcloud auth list'; the account needs the roles TPU Admin and Compute Viewer there"
    elif [[ $text =~ UNAUTHENTICATED|invalid_grant|invalid_rapt|[Rr]eauth|"do not currently have an active account" ]]; then
        final "gcloud's login has expired: gcloud auth login, then the same command"
    elif [[ $text =~ INVALID_ARGUMENT ]] || [[ ${2:-} = create && $text =~ FAILED_PRECONDITION|NOT_FOUND|'"code": '([3579]|16), ]]; then
        final "Google refuses the request: its message is above; check tpu.accelerator_type = $TPU_ACCELERATOR, tpu.zone = $TPU_ZONE, tpu.runtime_version = $TPU_RUNTIME, and the project's network"
    elif [[ $text =~ "unrecognized arguments"|"Invalid choice"|"expected one argument"|"Must be specified" ]]; then
        final "this gcloud does not know the command: gcloud components update, or look at TRM_GCLOUD_SSH_FLAGS"
    fi
}
final() { VERDICT=final WHY="$*"; }

# stop_if_final FILE [create]: end if waiting does not help against gcloud's error in FILE. By the
# words "Google Cloud:" scripts/sweep_launcher.py knows that it is not the run's fault
stop_if_final() {
    judge "$@"
    if [ "$VERDICT" = final ]; then cat "$1" >&2; fail 2 "Google Cloud: $WHY"; fi
}

# ----- the slice -----
# describe tpu-vm|queued-resources FORMAT: sets ANSWER to what gcloud says about the slice or its
# queued resource, to GONE if there is none, or to NO_ANSWER. Ends as stop_if_final does
describe() {
    local status=0
    call_gcloud "$ANSWER_SECONDS" compute tpus "$1" describe "$TPU_NAME" "${LOCATION[@]}" "--format=$2" >"$SCRATCH/answer" 2>"$SCRATCH/problem" || status=$?
    ANSWER=$(<"$SCRATCH/answer")
    if [ -n "$DRY_RUN" ]; then ANSWER=GONE; return; fi
    if [ "$status" = 0 ] && [ -n "$ANSWER" ]; then return; fi
    stop_if_final "$SCRATCH/problem"
    if [ "$VERDICT" = gone ]; then ANSWER=GONE; return; fi
    cat "$SCRATCH/problem" >&2
    ANSWER=NO_ANSWER
}

# look_at_slice: sets NODE (READY, PREEMPTED, ...; GONE; NO_ANSWER), and HEALTH and TYPE of the slice
look_at_slice() {
    describe tpu-vm 'csv[no-heading](state,health,acceleratorType)'
    IFS=, read -r NODE HEALTH TYPE <<< "$ANSWER"
    case "$NODE" in GONE|NO_ANSWER) ;; *) MAY_EXIST=yes ;; esac
}

# check_type: end where the slice of this name is of another type than the configuration's
check_type() {
    if [ -n "$TYPE" ] && [ "$TYPE" != "$TPU_ACCELERATOR" ]; then
        fail 2 "Google Cloud: the slice $TPU_NAME is a $TYPE, and tpu.accelerator_type asks for $TPU_ACCELERATOR: say tpu.accelerator_type=$TYPE, or give the new slice another name (TPU_NAME, tpu.name=...)"
    fi
}

# look_at_queue: sets QUEUED: ACTIVE, WAITING_FOR_RESOURCES, ...; GONE; NO_ANSWER
look_at_queue() {
    describe queued-resources 'value(state.state)'
    QUEUED=$ANSWER
    case "$QUEUED" in GONE|NO_ANSWER) ;; *) MAY_EXIST=yes ;; esac
}

# say_reason: why the queued resource is in its state, as Google says it
say_reason() {
    describe queued-resources 'yaml(state)'
    say "Google on the queued resource $TPU_NAME:"
    echo "    ${ANSWER//$'\n'/$'\n'    }"
}

# delete_slice: the queued resource, if there is one, takes its slice with it
delete_slice() {
    local failed="$TPU_NAME could not be deleted: gcloud's message is above; it uses up its quota until it is deleted: the same command again"
    look_at_queue
    if [ -n "$DRY_RUN" ] || [ "$QUEUED" != GONE ]; then
        call_gcloud 0 compute tpus queued-resources delete "$TPU_NAME" "${LOCATION[@]}" --force || fail 1 "$failed"
    fi
    describe tpu-vm 'value(state)'
    case "$DRY_RUN$ANSWER" in
        GONE|DELETING) ;;
        *) call_gcloud 0 compute tpus tpu-vm delete "$TPU_NAME" "${LOCATION[@]}" || fail 1 "$failed" ;;
    esac
    MAY_EXIST=''
}

# ----- its hosts -----
# use_ssh_key: start an ssh-agent for this command alone, and give it gcloud's key. gcloud reaches
# several hosts at once only through an agent, and the agent that SSH_AUTH_SOCK names may belong to
# a login that has ended
use_ssh_key() {
    local key=~/.ssh/google_compute_engine flag
    for flag in "${SSH_FLAGS[@]}"; do
        case "$flag" in --ssh-key-file=*) key=${flag#*=} ;; esac
    done
    if [ "$TPU_HOSTS" = 1 ] || [ -n "$OUR_AGENT" ]; then return; fi
    if [ -n "$DRY_RUN" ]; then execute ssh-add -q "$key"; return; fi
    if [ ! -e "$key" ]; then    # as gcloud makes it
        mkdir -p ~/.ssh
        chmod 700 ~/.ssh
        ssh-keygen -q -t rsa -b 3072 -N '' -f "$key" </dev/null || fail 2 "$key could not be made: see ssh-keygen's message above"
    fi
    eval "$(ssh-agent -s 3>&-)" >/dev/null
    OUR_AGENT=$SSH_AGENT_PID
    # in a session without a terminal: a question would wait for an answer for ever
    apart 30 ssh-add -q "$key" || fail 2 "ssh-add $key failed: a key with a passphrase cannot be used unattended: move it away, and gcloud gets one without"
}

# on_hosts SECONDS WORKER|all COMMAND: run it over ssh, for at most SECONDS (0: no limit). If a
# connection breaks, gcloud runs the command again, so it must do no harm to run twice
on_hosts() {
    use_ssh_key
    reach "$1" ssh "$TPU_NAME" "${LOCATION[@]}" "--worker=$2" "--command=$3"
}

read -r -a SSH_FLAGS <<< "${TRM_GCLOUD_SSH_FLAGS:-}"
SSH_TRACK=()
case " ${SSH_FLAGS[*]} " in *" --tunnel-through-iap "*) SSH_TRACK=(alpha) ;; esac       # no other track has this flag

# reach SECONDS ssh|scp ARGUMENTS...: a host that has vanished is noticed after 90 s; by itself ssh would wait for hours
reach() {
    call_gcloud "$1" "${SSH_TRACK[@]}" compute tpus tpu-vm "${@:2}" "--$2-flag=-oServerAliveInterval=30" "${SSH_FLAGS[@]}"
}

# ask_hosts SECONDS WORKER|all COMMAND: sets ANSWER to what they print; what gcloud says is shown if it fails
ask_hosts() {
    local status=0
    on_hosts "$@" >"$SCRATCH/answer" 2>"$SCRATCH/problem" || status=$?
    ANSWER=$(<"$SCRATCH/answer")
    if [ "$status" = 0 ]; then return; fi
    stop_if_final "$SCRATCH/problem"
    cat "$SCRATCH/problem" >&2
    return "$status"
}

how_to_look() { echo "gcloud ${SSH_TRACK[*]:+${SSH_TRACK[*]} }compute tpus tpu-vm ssh $TPU_NAME ${LOCATION[*]}${TRM_GCLOUD_SSH_FLAGS:+ $TRM_GCLOUD_SSH_FLAGS}"; }

# ----- the code -----
# uncommitted: print the changes that make this tree's code differ from the commit. Of the files
# that git does not track only code counts
uncommitted() {
    git status --porcelain --untracked-files=all | grep -vE '^\?\? ' || true
    git status --porcelain --untracked-files=all | grep -E '^\?\? "?([^/]*|(scripts|analysis|configs)/.*)\.(py|sh|yaml|yml|txt)"?$' || true
}

# refuse_uncommitted WHAT: end with the list of them, if there are any, and with WHAT to do
refuse_uncommitted() {
    local changes
    changes=$(uncommitted)
    if [ -z "$changes" ]; then return; fi
    head -n 10 <<< "$changes" >&2
    fail 2 "there are uncommitted changes, $(wc -l <<< "$changes") in all, the first are above: $1"
}

# choose_code [COMMIT]: sets TREE, what to send; COMMIT, as `git describe --dirty` names it; CODE, its folder on a host
choose_code() {
    git rev-parse --git-dir >/dev/null 2>&1 || fail 2 "$PWD is not a git repository, so that a run's code would have no name: git clone the kit, or git init, add and commit"
    COMMIT=$(git rev-parse --verify --quiet "${1:-HEAD}^{commit}") || fail 2 "${1:-HEAD}: there is no such commit here"
    TREE=$(git rev-parse "$COMMIT^{tree}")
    if [ -z "${1:-}" ] && [ -n "$(uncommitted)" ]; then
        COMMIT=$COMMIT-dirty
        # an index of its own: the user's stays as it is
        TREE=$(export GIT_INDEX_FILE=$SCRATCH/index; git read-tree HEAD; git add --all; git write-tree)
    fi
    CODE=trm/code/${COMMIT:0:12}-${TREE:0:12}
    # one name for each tree, so that two commands at the same time do not unpack each other's
    # archive
    ARCHIVE=trm-code-${TREE:0:12}.tar
    git archive --format=tar --output="$SCRATCH/$ARCHIVE" "$TREE"
    echo "$COMMIT" > "$SCRATCH/COMMIT"
    tar --append --file="$SCRATCH/$ARCHIVE" --directory="$SCRATCH" COMMIT
}

# unpack_here: what is sent, into CODE_HERE
unpack_here() {
    CODE_HERE=$SCRATCH/code
    mkdir "$CODE_HERE"
    tar -xf "$SCRATCH/$ARCHIVE" -C "$CODE_HERE"
}

# send_code: copy the archive to all hosts. A command for them begins with what unpack_code prints
send_code() {
    use_ssh_key
    if reach 0 scp "$SCRATCH/$ARCHIVE" "$TPU_NAME:" "${LOCATION[@]}" --worker=all 2>"$SCRATCH/problem"; then return; fi
    stop_if_final "$SCRATCH/problem"
    cat "$SCRATCH/problem" >&2
    fail 1 "the code could not be sent to all hosts of $TPU_NAME: gcloud's message is above"
}
# status 1, not tar's own 2: that is for mistakes of the user
unpack_code() { echo "mkdir -p $CODE && { tar -xf $ARCHIVE -C $CODE || exit 1; } && ln -sfn ~/$CODE trm/current"; }

# host_command ARGUMENTS: a command for hosts, scripts/tpu_host.sh with these
host_command() { echo "bash trm/current/scripts/tpu_host.sh$(printf ' %q' "$@")"; }

# ----- the state of a run -----
# look_at_run: sets RUN_STATE to running, finished, failed, preempted, stopped or absent, or to unknown where nobody answers; RUN_WHY;
# and SILENT to the health that Google names while the hosts of a READY slice do not answer
look_at_run() {
    local answers
    SILENT=''
    look_at_slice
    case "$NODE" in
        NO_ANSWER) RUN_STATE=unknown RUN_WHY="gcloud gives no answer about the slice $TPU_NAME"; return ;;
        READY) ;;
        *) RUN_STATE=absent RUN_WHY="the slice $TPU_NAME is $NODE"; look_into_folder; return ;;
    esac
    if ! ask_hosts "$ANSWER_SECONDS" all "[ ! -e trm/current ] && echo trm: nothing || $(host_command status "$RUN_NAME")"; then
        SILENT=${HEALTH:-HEALTH_UNSPECIFIED} RUN_STATE=absent RUN_WHY="the hosts of $TPU_NAME do not answer, and Google calls it READY and $SILENT"
        look_into_folder
        if [ "$RUN_STATE" != finished ]; then RUN_STATE=unknown; fi
        return
    fi
    answers=$(sed -n 's/^trm: //p' <<< "$ANSWER" | sort | paste -sd, | sed 's/,/, /g')
    RUN_WHY="hosts: $answers"
    case "$answers" in
        *up*) RUN_STATE=running ;;
        *"status 2"*) RUN_STATE=failed ;;
        *stopped*) RUN_STATE=stopped ;;
        *"status 143"*|*lost*) RUN_STATE=preempted ;;
        *"status "[1-9]*) RUN_STATE=failed ;;
        *nothing*) RUN_STATE=absent; look_into_folder ;;
        *) RUN_STATE=finished ;;
    esac
}

# look_into_folder: correct RUN_STATE by the run's own folder, where the slice is gone, or new and
# knows nothing of the run
look_into_folder() {
    local folder=$SCRATCH/run
    mkdir -p "$folder"
    case "$RUN_URL" in
        gs://*) call_gcloud "$ANSWER_SECONDS" storage rsync "$RUN_URL" "$folder" >/dev/null 2>&1 || true ;;    # without its folders
        *) folder=$RUN_URL ;;
    esac
    if [ ! -s "$folder/config.yaml" ]; then return; fi
    if "$PYTHON_HERE" scripts/tpu_settings.py "$folder/config.yaml" --finished "$folder/eval.json" "$folder/metrics.jsonl"; then
        RUN_STATE=finished RUN_WHY="$RUN_URL/eval.json"
    else
        RUN_STATE=preempted RUN_WHY="$RUN_WHY, and $RUN_URL is not at its end"
    fi
}

# check_bucket: end if the bucket of $RUN_URL does not exist; warn if it is in another region than
# the slice
check_bucket() {
    local bucket region=${TPU_ZONE%-*} location
    case "$RUN_URL" in gs://*) ;; *) return ;; esac
    bucket=$(cut -d/ -f1-3 <<< "$RUN_URL")
    if ! call_gcloud "$ANSWER_SECONDS" storage buckets describe "$bucket" '--format=value(location)' >"$SCRATCH/answer" 2>"$SCRATCH/problem"; then
        if grep -q 'not found: 404' "$SCRATCH/problem"; then
            fail 2 "Google Cloud: there is no bucket $bucket: gcloud storage buckets create $bucket --project=$TPU_PROJECT --location=$region"
        fi
        say "warning: gcloud does not say in which region $bucket is; it should be in $region"
        return
    fi
    if [ -n "$DRY_RUN" ]; then return; fi
    location=$(tr '[:upper:]' '[:lower:]' < "$SCRATCH/answer")
    if [ -n "$location" ] && [[ $region != "$location"* ]]; then      # us: the multi-region around us-central2
        say "warning: $bucket is in $location and the slice in $region: every checkpoint between them is slower, and costs money"
    fi
}
