# The checks of the nodes, before a rank is started; sourced by job.sh. A bad node is excluded, and the job, under the same number,
# goes on without it: at most three times.
#
#   ATTEMPT/preflight/answers    what the nodes found, a line of JSON each; errors: what else they said; verdict.json
#   RUN/slurm/<job>.excluded     the nodes that were excluded, a line each time
#
# Read from the environment:
#   MEGAPSFT_PREFLIGHT=0          leaves it out
#   MEGAPSFT_PREFLIGHT_SECONDS    that nodes have to answer in (300); ranks have half of them to reach one another
#   MEGAPSFT_PREFLIGHT_OPTIONS    more options of megapsft preflight, such as "--run-gib 500"
# shellcheck shell=bash

readonly GOOD=0 BAD_NODES=69 NOBODY=76 TRY_PAIRS=79  # exit codes of megapsft preflight --judge

preflight() {
  [ "${MEGAPSFT_PREFLIGHT:-1}" != 0 ] || return 0
  local code round pair steps
  CHECKS=$ATTEMPT/preflight
  mapfile -t HOSTS < <(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}")
  mkdir -p "$CHECKS"
  echo "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" >"$CHECKS/canary"
  examine -- --token "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  judge
  code=$?
  if [ $code -eq $TRY_PAIRS ]; then
    while read -ra round; do
      steps=()
      for pair in "${round[@]}"; do
        {
          unset MASTER_ADDR MASTER_PORT # each pair meets by itself
          examine --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist="$pair" -- --pair "$pair"
        } &
        steps+=($!)
      done
      wait "${steps[@]}"
    done <"$CHECKS/pairs"
    judge
    code=$?
  fi
  rm -f "$ATTEMPT/failures"  # of these tasks: the ranks have not begun
  case $code in
    "$GOOD") return ;;
    "$BAD_NODES") exclude "$(<"$CHECKS/bad-nodes")" ;;
    "$NOBODY") say "it ends here; what was found is in $CHECKS" ;;
    *) say "no node could say which of them are good; the end of $CHECKS/errors:"; tail -n 20 "$CHECKS/errors" ;;
  esac
  exit "$code"
}

# examine [options of srun] -- [options of megapsft preflight]: the tasks of a step look around; a node that never answers is not
# waited for
examine() {
  local options=() more seconds=${MEGAPSFT_PREFLIGHT_SECONDS:-300}
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  read -ra more <<<"${MEGAPSFT_PREFLIGHT_OPTIONS:-}"
  timeout --kill-after=10 "$seconds" "${STEP[@]}" "${HERE[@]}" --label "${options[@]}" \
    bash "$MEGAPSFT_HOME/launchers/slurm/rank.sh" preflight "$CHECKS" --seconds $((seconds / 2)) "${more[@]}" "$@" \
    </dev/null >>"$CHECKS/answers" 2>>"$CHECKS/errors"
}

# The verdict, on the first node that comes to one.
judge() {
  local host code
  for host in "${HOSTS[@]}"; do
    timeout --kill-after=10 "${MEGAPSFT_PREFLIGHT_SECONDS:-300}" "${ONCE[@]}" --overlap --quiet --nodelist="$host" \
      bash "$MEGAPSFT_HOME/launchers/slurm/rank.sh" preflight "$CHECKS" --judge "${HOSTS[@]}" </dev/null 2>>"$CHECKS/errors"
    code=$?
    case $code in "$GOOD" | "$BAD_NODES" | "$NOBODY" | "$TRY_PAIRS") return $code ;; esac
  done
  return 1
}

# exclude NODES: the job goes back into the queue, held, and a small job on another node lets it go without them: from within,
# while it runs, Slurm does not change which nodes a job may have.
exclude() {
  local job=${SLURM_HET_JOB_ID:-$SLURM_JOB_ID} file=$RUN/slurm/$SLURM_JOB_ID.excluded times named list helper
  times=$(grep -c '' "$file" 2>/dev/null)
  if [ "${times:-0}" -ge 3 ]; then
    say "nodes were excluded three times, and there are bad ones again: $1"
    return
  fi
  named=$(nodes_of ReqNodeList)
  if [ -n "$named" ]; then
    say "cannot run elsewhere, since it was submitted with --nodelist=$named; bad: $1"
    return
  fi
  list=$(nodes_of ExcNodeList)
  list=${list:+$list,}$1
  if ! helper=$(sbatch --parsable --job-name="$SLURM_JOB_NAME-exclude" --output="$file.log" --open-mode=append --time=60 \
    --nodes=1 --ntasks=1 --exclude="$list" --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} \
    ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} "$MEGAPSFT_HOME/launchers/slurm/exclude.sh" "$job" "$SLURM_JOB_ID" "$list"); then
    say "cannot be sent elsewhere; submit it again with --exclude=$list"
    return
  fi
  echo "$1" >>"$file"
  say "goes back into the queue, to run without $list; job ${helper%%;*} sees to that"
  trap - EXIT
  scontrol requeuehold "$job" || { scancel "${helper%%;*}"; say "cannot be requeued; submit it again with --exclude=$list"; exit 1; }
  sleep 60 # until Slurm ends this shell
}

# nodes_of FIELD: what scontrol says of this job there; nothing where there is nothing
nodes_of() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/.*\<$1=\([^ ]*\).*/\1/p" | head -n 1 | sed '/^(null)$/d'; }
