# The life of a job, sourced by its batch script:   train CONFIG.yaml [key=value ...]   or   run COMMAND [arguments of megapsft]
#
#   RUN/slurm/<job>.log                     what the batch shell says
#   RUN/slurm/<job>.<restart>/rank-<n>.log  of each rank; server-<n>.log of each SGLang server; failures: who ended first
#
# Before the time is over Slurm sends SIGUSR1 to the job steps (#SBATCH --signal=USR1@300): the run saves itself, and is put back
# into the queue (docs/queue.md). All that is started here is a step of this job, and ends with it.
#
# Read from the environment, all with defaults:
#   MEGAPSFT_HOME     the clone; MEGAPSFT_PYTHON  its interpreter
#   MEGAPSFT_SRUN     more options of every srun, such as "--mpi=pmix --container-image=..."
#   MEGAPSFT_EXPORT   folder: where the model is written to once the run is finished
#   MEGAPSFT_PREFLIGHT=0   leaves out the checks of the nodes
# shellcheck shell=bash

set -uo pipefail
export MEGAPSFT_HOME=${MEGAPSFT_HOME:-$SLURM_SUBMIT_DIR}
export MEGAPSFT_PYTHON=${MEGAPSFT_PYTHON:-$MEGAPSFT_HOME/.venv/bin/python}
export PYTHONPATH=$MEGAPSFT_HOME${PYTHONPATH:+:$PYTHONPATH}
source "$MEGAPSFT_HOME/launchers/slurm/env.sh"
source "$MEGAPSFT_HOME/launchers/slurm/preflight.sh"

NODES=${SLURM_JOB_NUM_NODES_HET_GROUP_0:-$SLURM_JOB_NUM_NODES}
read -ra STEP <<<"${MEGAPSFT_SRUN:-}"
STEP=(srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${STEP[@]}")
HERE=(${SLURM_HET_SIZE:+--het-group=0}) # the part of a heterogeneous job that has the trainers
ONCE=("${STEP[@]}" "${HERE[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1)
SERVERS=()   # processes of srun
OVERRIDES=() # of the config, by what the job has started

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# megapsft, once, on the first node
megapsft() { "${ONCE[@]}" --overlap --quiet bash "$MEGAPSFT_HOME/launchers/slurm/rank.sh" "$@" </dev/null; }

prepare() {
  local folder
  folder=$(megapsft config "$@" --key run.dir) || exit 2
  open_attempt "$folder"
}

open_attempt() {
  RUN=$(realpath -m "$1")
  ATTEMPT=$RUN/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  export RUN ATTEMPT
  mkdir -p "$ATTEMPT"
  rm -f "$RUN/stop"  # of a job that died before it saw it
  grep -qs "\"job\": \"$SLURM_JOB_ID\"" "$RUN/slurm/jobs.jsonl" ||
    printf '{"job": "%s", "name": "%s", "submitted": "%s", "log": "%s"}\n' "$SLURM_JOB_ID" "$SLURM_JOB_NAME" \
      "$(date -u +%FT%TZ)" "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p' | head -n 1)" >>"$RUN/slurm/jobs.jsonl"
  trap finish EXIT
  trap 'exit 143' TERM
  say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, of $RUN; logs in $ATTEMPT"
}

# All that comes before the ranks
ready() {
  prepare "$@"
  preflight
  start_servers "$@"
}

train() {
  set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}" # of an array (sbatch --array=1-3) each job has its run.dir, and its seed
  ready "$@"
  "${STEP[@]}" "${HERE[@]}" --kill-on-bad-exit=1 --wait=60 --output="$ATTEMPT/rank-%t.log" \
    bash "$MEGAPSFT_HOME/launchers/slurm/rank.sh" train "$@" "${OVERRIDES[@]}"
  exit $?
}

# A command that goes on where it was killed: it is killed before the time is over, and goes back into the queue.
run() {
  open_attempt "${MEGAPSFT_RUN:-$SLURM_SUBMIT_DIR/runs/jobs}"
  export KILL_ON_SIGNAL=1
  "${ONCE[@]}" --output="$ATTEMPT/rank-%t.log" bash "$MEGAPSFT_HOME/launchers/slurm/rank.sh" "$@"
  local code=$?
  if [ $code -ne 0 ] && [ -e "$ATTEMPT/signalled" ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
      say "was not done after 20 restarts; ask for more time (--time), and submit it again: it goes on"
      exit $code
    fi
    requeue
  fi
  exit $code
}

# SGLang servers as steps of their own: on the nodes of a heterogeneous job's second part, or beside the trainers where there are
# several nodes. On a single node the run starts its servers itself.
start_servers() {
  local group=() list=() ready=() said nodes each tp gpus host port number
  mapfile -t said < <(megapsft config "$@" --key rollout.engine rollout.urls rollout.servers \
    rollout.tensor_parallel_size rollout.weight_update)
  if [ "${said[0]}" != sglang ] || [ "${said[1]}" != "[]" ]; then return; fi
  each=${said[2]} tp=${said[3]} gpus=${SLURM_GPUS_ON_NODE:-0}
  if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    group=(--het-group=1)
    nodes=$SLURM_JOB_NODELIST_HET_GROUP_1
  elif [ "$NODES" -gt 1 ]; then
    nodes=$SLURM_JOB_NODELIST
  else
    return
  fi
  for host in $(scontrol show hostnames "$nodes"); do
    for ((number = 0; number < each; number++)); do
      port=$((20000 + (SLURM_JOB_ID * 31 + 6000 + 64 * ${#list[@]}) % 12000))
      ready+=("$ATTEMPT/server-${#list[@]}.ready")
      "${STEP[@]}" "${group[@]}" --overlap --quiet --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$host" \
        --output="$ATTEMPT/server-${#list[@]}.log" bash "$MEGAPSFT_HOME/launchers/slurm/serve.sh" "${ready[-1]}" \
        $((number * tp)) $((gpus > 0 ? tp : 0)) "$@" --port "$port" </dev/null &
      SERVERS+=($!)
      list+=("http://$host:$port")
    done
  done
  say "waits for SGLang: ${list[*]}"
  for number in "${!ready[@]}"; do
    until [ -e "${ready[number]}" ]; do
      if ! kill -0 "${SERVERS[number]}" 2>/dev/null; then
        say "server ${list[number]} did not start; the end of $ATTEMPT/server-$number.log:"
        tail -n 40 "$ATTEMPT/server-$number.log"
        exit 1
      fi
      sleep 1
    done
  done
  mapfile -t OVERRIDES < <("${ONCE[@]}" --overlap --quiet "$MEGAPSFT_PYTHON" -m megapsft.cluster.slurm.servers "${said[4]}" "${list[@]}")
}

# At the end, however it came: servers end; a run that was stopped before the time was over goes back into the queue; of one that
# failed, the last lines of the rank that ended first; its exit code is the job's.
finish() {
  local code=$? server step before rank host status
  trap - EXIT
  set +e # which nemo-run's scripts set
  for server in "${SERVERS[@]}"; do kill "$server" 2>/dev/null; done
  if [ $code -ne 0 ]; then
    say "ended with exit code $code"
    if [ -s "$ATTEMPT/failures" ]; then
      read -r _ rank host status < <(sort -n "$ATTEMPT/failures" | while read -r at rank host status; do
        # what all ranks refuse only the first one says
        [ ! -s "$ATTEMPT/rank-$rank.log" ] || echo "$at $rank $host $status"
      done; sort -n "$ATTEMPT/failures")
      say "rank $rank on $host ended with exit code $status, before others; the end of $ATTEMPT/rank-$rank.log:"
      tail -n 40 "$ATTEMPT/rank-$rank.log"
      code=$status  # that of srun is of ranks that were ended because of it
    fi
    stacks
    exit "$code"
  fi
  if [ ! -e "$RUN/stopped.json" ]; then
    export_model && say "done"
    exit $?
  fi
  step=$(sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$RUN/stopped.json")
  if grep -q '"reason": "file"' "$RUN/stopped.json" && [ ! -e "$ATTEMPT/signalled" ]; then
    say "stopped after step $step, as $RUN/stop asked; submit it again to go on"
    [ -z "${MEGAPSFT_EXPORT:-}" ] || exit 75 # jobs that wait for the model are not to start
    exit 0
  fi
  before=$(cat "$RUN/slurm/$SLURM_JOB_ID.step" 2>/dev/null || echo -1)
  if [ "$step" -le "$before" ]; then
    say "stopped after step $step, and so it was before: there is no time for a step; ask for more of it (--time)"
    exit 1
  fi
  echo "$step" >"$RUN/slurm/$SLURM_JOB_ID.step"
  say "stopped after step $step"
  requeue
}

# What is there already was written by an earlier attempt, and is whole.
export_model() {
  if [ -z "${MEGAPSFT_EXPORT:-}" ] || [ -e "$MEGAPSFT_EXPORT" ]; then return 0; fi
  say "writes the model to $MEGAPSFT_EXPORT"
  megapsft export "$RUN" --out "$MEGAPSFT_EXPORT"
}

# Where the ranks were when they found that they hang: the stacks of 16 of them at most.
stacks() {
  local files file
  mapfile -t files < <(sed -n 's/.*; stacks: //p' "$ATTEMPT"/rank-*.log 2>/dev/null)
  [ ${#files[@]} -gt 0 ] || return
  say "${#files[@]} ranks wrote their stacks, to $RUN/stacks:"
  for file in "${files[@]:0:16}"; do cat "$file"; echo; done
}

requeue() {
  say "goes back into the queue"
  if ! scontrol requeue "${SLURM_HET_JOB_ID:-$SLURM_JOB_ID}"; then
    say "cannot be requeued here; submit it again: it goes on"
    exit 1
  fi
  sleep 60 # until Slurm ends this shell
}
