#!/usr/bin/env bash
# Make a TPU slice ready to train on, or say that it is.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/setup_tpu.sh [CONFIG] [section.key=value ...] [options]

Requests the slice of the configuration (default: configs/base_sudoku_tpu.yaml, a v4-64), waits
until it exists, installs the pinned environment on all of its hosts, and checks that every host
sees its chips and that an all-reduce over all of them is right. Steps that are done already are
skipped. A slice uses up its grant, or costs money, until it is deleted; without --spot it is on
demand.

What blocks a new request is deleted first: a slice that Google calls PREEMPTED or TERMINATED, one
in health TIMEOUT whose hosts have not answered for minutes, and a queued resource that is FAILED,
SUSPENDED, or ACTIVE without its slice. Nothing else is deleted without --replace_silent.

  --spot             a spot slice: may be preempted at any time
  --queued           request it by a queued resource, which waits in Google's queue for capacity
  --autocheckpoint   Google sends SIGTERM before a maintenance, up to 5 minutes ahead (gcloud alpha)
  --internal_ips     hosts without external addresses, where an organisation forbids them; they need
                     Cloud NAT to install packages
  --replace_silent   also delete a slice that Google calls healthy if its hosts do not answer over
                     ssh for 5 minutes
  --max_hours H      wait at most H hours for the slice (default 24)
  --poll SECONDS     between two looks at it (default 30)
  --commit SHA       use the code of this commit (default: the working tree)
  --diagnose         for a slice that is READY: write a report into trm_diagnose_NAME_TIME.txt here:
                     versions, devices, environment, the bucket, an all-reduce, training steps with
                     and without the kernels; status 0 if nothing failed
  --dry_run          print the commands, as for a slice that does not exist yet; execute none

exit status: 0 the slice is ready; 2 a mistake that waiting does not mend: settings, quota,
permission, login; 3 no capacity for the slice now; 1 anything else

settings: tpu.accelerator_type, tpu.project, tpu.zone, tpu.name, tpu.bucket in the configuration, or
the environment variables TPU_PROJECT, TPU_ZONE, TPU_NAME, and TPU_BUCKET for --diagnose.
TRM_GCLOUD_SSH_FLAGS: more flags for every ssh and scp, such as --internal-ip or
--tunnel-through-iap. PIP_INDEX_URL, PIP_EXTRA_INDEX_URL: the hosts take all packages, also torch,
from these; without them torch is the CPU build of PyTorch's own index. UV_PYTHON_INSTALL_MIRROR:
where their Python comes from. TRM_ANSWER_SECONDS: how long to wait for an answer of gcloud or of a
host (120). TRM_CONTACT_SECONDS: the same for the first contact, and before a slice in health
TIMEOUT is given up (300). TRM_REASON_SECONDS: how often Google's reason for waiting is shown
(1800).
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
CONFIG='' DRY_RUN='' queued='' commit='' diagnose='' replace_silent='' max_hours=24 poll=30 create_flags=() track=() OVERRIDES=()
while [ $# -gt 0 ]; do
    case "$1" in
        --spot) create_flags+=(--spot) ;;
        --queued) queued=yes ;;
        --autocheckpoint) create_flags+=(--autocheckpoint-enabled) track=(alpha) ;;
        --internal_ips) create_flags+=(--internal-ips) ;;
        --replace_silent) replace_silent=yes ;;
        --max_hours) need_number "$@"; max_hours=$2; shift ;;
        --poll) need_number "$@"; poll=$2; shift ;;
        --commit) need_value "$@"; commit=$2; shift ;;
        --diagnose) diagnose=yes ;;
        --dry_run) DRY_RUN=yes ;;
        --help|-h) usage; exit 0 ;;
        -*) mistake "unknown argument $1; see --help" ;;
        *=*) OVERRIDES+=("$1") ;;
        *) one_config "$1" ;;
    esac
    shift
done
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh
CONFIG=$(in_repository "${CONFIG:-configs/base_sudoku_tpu.yaml}")
choose_code "$commit"
if [ -n "$commit" ]; then unpack_here; fi       # the configuration as it is in the code that is sent
read_settings "$CONFIG" --need project,name "${OVERRIDES[@]}"
need_gcloud
deadline=$(awk -v now="$(date +%s)" -v hours="$max_hours" 'BEGIN {printf "%d", now + 3600 * hours}')

ask_for_slice() {
    local status=0
    MAY_EXIST=yes
    say "asking for $TPU_NAME: $TPU_ACCELERATOR in $TPU_ZONE${create_flags[*]:+, ${create_flags[*]#--}}${queued:+, queued}"
    if [ -n "$queued" ]; then
        call_gcloud 0 "${track[@]}" compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${LOCATION[@]}" \
            "--accelerator-type=$TPU_ACCELERATOR" "--runtime-version=$TPU_RUNTIME" "${create_flags[@]}" >"$SCRATCH/create" 2>&1 || status=1
    else
        if [ -z "$DRY_RUN" ]; then
            while sleep "$poll" >/dev/null 2>&1 3>&-; do say "$TPU_NAME: being made"; done & TICKS=$!
        fi
        call_gcloud 0 "${track[@]}" compute tpus tpu-vm create "$TPU_NAME" "${LOCATION[@]}" \
            "--accelerator-type=$TPU_ACCELERATOR" "--version=$TPU_RUNTIME" "${create_flags[@]}" >"$SCRATCH/create" 2>&1 || status=1
        if [ -n "$TICKS" ]; then
            kill "$TICKS"
            wait "$TICKS" 2>/dev/null || true
            TICKS=''
        fi
    fi
    if [ "$status" = 0 ]; then return; fi
    if grep -q 'ALREADY_EXISTS' "$SCRATCH/create"; then say "$TPU_NAME: somebody has asked for it meanwhile"; return; fi
    # gcloud waits for half an hour at most
    if grep -qE 'has not finished in [0-9]+ seconds' "$SCRATCH/create"; then say "$TPU_NAME: gcloud does not wait any longer"; return; fi
    stop_if_final "$SCRATCH/create" create
    cat "$SCRATCH/create" >&2
    if [ "$VERDICT" = gone ]; then fail 2 "Google Cloud: something that the slice needs is not there, such as the network of tpu.project = $TPU_PROJECT: gcloud's message is above"; fi
    if [ "$VERDICT" = room ]; then MAY_EXIST=''; fail 3 "there is no room for $TPU_NAME now: $WHY. Try again later, or wait in the queue by --queued"; fi
    fail 1 "$TPU_NAME could not be made: gcloud's message is above"
}

# hosts_answer: whether all hosts answer over ssh within $CONTACT_SECONDS. The first contact takes
# long, because Google brings a new ssh key to the hosts then
hosts_answer() {
    local end=$((SECONDS + CONTACT_SECONDS))
    say "$TPU_NAME is $NODE: reaching its $TPU_HOSTS host(s) over ssh, which may take minutes the first time"
    while [ "$SECONDS" -lt "$end" ]; do
        if ask_hosts "$((end - SECONDS))" all true; then return; fi
        say "$TPU_NAME: not all hosts answer yet"
        sleep "$poll"
    done
    return 1
}

# wait_more WHY: say why (once), and wait until the next look; ends with 3 when --max_hours have
# passed
wait_more() {
    if [ "$1" != "$said" ]; then say "$TPU_NAME: $1, waiting"; said=$1; fi
    if [ "$QUEUED" != GONE ] && [ "$SECONDS" -ge "$next_reason" ]; then say_reason; next_reason=$((SECONDS + REASON_SECONDS)); fi
    [ "$(date +%s)" -lt "$deadline" ] || fail 3 "$TPU_NAME is not there after $max_hours hours ($1): the request stays open; bash scripts/delete_tpu.sh $SLICE cancels it"
    sleep "$poll"
}

# replace WHAT: delete a slice or a queued resource that can no longer be used, so that a new one
# can be requested. If this command has requested it itself, it ends instead
replace() {
    case "$QUEUED" in FAILED|SUSPENDED) say_reason ;; esac
    if [ -n "$asked" ]; then
        { echo "ERROR: "; echo "$ANSWER"; } > "$SCRATCH/problem"
        stop_if_final "$SCRATCH/problem"
        # Google could not fill the request, or took the slice away at once
        case "$QUEUED" in FAILED) fail 1 "$TPU_NAME: the request FAILED, for the reason above; the same command deletes it and asks again" ;; esac
        fail 3 "$TPU_NAME is $1 before it could be used"
    fi
    say "$TPU_NAME is $1: deleting it"
    delete_slice
    said=''
}

# ----- the slice -----
asked='' said='' next_reason=$((SECONDS + REASON_SECONDS)) ghost=0
while [ -z "$DRY_RUN" ]; do
    look_at_queue
    look_at_slice
    check_type
    case "$QUEUED $NODE" in "ACTIVE GONE") ghost=$((ghost + 1)) ;; *) ghost=0 ;; esac
    case "$QUEUED $NODE" in
        *NO_ANSWER*) wait_more "gcloud gives no answer" ;;
        "GONE GONE")
            MAY_EXIST=''
            if [ -n "$diagnose" ]; then fail 2 "$TPU_NAME is not there: bash scripts/setup_tpu.sh $CONFIG $SLICE makes it"; fi
            if [ -n "$asked" ]; then fail 3 "$TPU_NAME went away before it could be used"; fi
            ask_for_slice
            asked=yes ;;
        *" STOPPED"|*" HIDDEN"|*" UNKNOWN")
            fail 1 "$TPU_NAME is $NODE, which no preemption leaves behind: nothing is deleted. bash scripts/delete_tpu.sh $SLICE deletes it; then the same command" ;;
        *" READY")
            case "$HEALTH" in UNHEALTHY_MAINTENANCE) wait_more "in maintenance, and goes on by itself"; continue ;; esac
            before=$HEALTH
            if hosts_answer; then break; fi
            look_at_slice
            case "$NODE $HEALTH $before $replace_silent" in
                "READY UNHEALTHY_MAINTENANCE "*) ;;
                "READY TIMEOUT TIMEOUT "*) replace "in health TIMEOUT, and its hosts have not answered for $CONTACT_SECONDS s" ;;
                "READY TIMEOUT "*) say "$TPU_NAME: in health TIMEOUT now" ;;
                "READY "*yes) replace "silent: its hosts have not answered for $CONTACT_SECONDS s" ;;
                "READY "*)
                    say "look by: $(how_to_look)"
                    fail 1 "$TPU_NAME is READY and ${HEALTH:-of unknown health}, and its hosts do not answer ssh within $CONTACT_SECONDS s: nothing is deleted. The firewall, the key or" \
                        "the way to it may be wrong (TRM_GCLOUD_SSH_FLAGS); --replace_silent deletes such a slice and asks for another" ;;
            esac ;;
        FAILED*|SUSPENDED*|*" PREEMPTED"|*" TERMINATED") replace "$QUEUED $NODE" ;;
        "ACTIVE GONE")
            if [ "$ghost" -lt 3 ]; then wait_more "ACTIVE in the queue, and no slice yet"; continue; fi
            describe queued-resources 'value(tpu.nodeSpec[].nodeId)'
            if [ "$ANSWER" != "$TPU_NAME" ]; then
                fail 2 "Google Cloud: the queued resource $TPU_NAME is for slices of other names ($ANSWER): nothing is deleted; give the new slice another name (TPU_NAME, tpu.name=...)"
            fi
            replace "ACTIVE in the queue, and its slice is gone" ;;
        *) wait_more "$([ "$QUEUED" = GONE ] && echo "$NODE" || echo "$QUEUED in the queue, slice $NODE")" ;;
    esac
done
if [ -n "$DRY_RUN" ]; then look_at_queue; look_at_slice; ask_for_slice; fi

# ----- its hosts -----
host_settings=()
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL UV_PYTHON_INSTALL_MIRROR; do
    if [ -n "${!name:-}" ]; then host_settings+=("$(printf '%s=%q' "$name" "${!name}")"); fi
done
say "$TPU_NAME: code and environment"
send_code
status=0
on_hosts 0 all "$(unpack_code) && ${host_settings[*]:+${host_settings[*]} }$(host_command setup)" || status=$?
if [ -n "$diagnose" ]; then
    file=$here/trm_diagnose_${TPU_NAME}_$(date -u +%Y%m%dT%H%M%SZ).txt status=0
    command=$(host_command diagnose --config "$CONFIG" "${OVERRIDES[@]}" ${TPU_BUCKET:+"tpu.bucket=$TPU_BUCKET"})
    if [ -n "$DRY_RUN" ]; then on_hosts 0 all "$command"; exit; fi
    say "$TPU_NAME: a diagnosis, 2 to 20 minutes"
    mkfifo "$SCRATCH/lines"
    "$PYTHON_HERE" scripts/diagnose.py --collect "$file" --hosts "$TPU_HOSTS" <"$SCRATCH/lines" & collector=$!
    on_hosts 0 all "$command" >"$SCRATCH/lines" 2>&1 || true
    wait "$collector" || status=1
    exit "$status"
fi
if [ "$status" != 0 ]; then
    fail 1 "the environment of $TPU_NAME could not be installed: the host's message is above; the same command again goes on"
fi
if [ -z "$DRY_RUN" ]; then
    ask_hosts "$ANSWER_SECONDS" all "$(host_command checked) && echo trm: checked || echo trm: unchecked" || fail 1 "the hosts of $TPU_NAME do not answer any more"
fi
if [ -n "$DRY_RUN" ] || [[ $ANSWER == *unchecked* ]]; then
    say "$TPU_NAME: checking its chips"
    on_hosts 0 all "$(host_command check --config "$CONFIG" "${OVERRIDES[@]}")" ||
        fail 1 "the check of $TPU_NAME failed: the message is above; where a chip or a link is bad, delete the slice and ask for another"
fi
say "$TPU_NAME is ready: bash scripts/launch_experiment.sh $CONFIG${OVERRIDES[*]:+ ${OVERRIDES[*]}}"
if [ -n "$DRY_RUN" ]; then how_to_delete; fi
