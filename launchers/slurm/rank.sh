#!/bin/bash
# One task of a job step: bash rank.sh COMMAND [arguments of megapsft]. SIGUSR1 before the time is over ends no task: a rank holds
# it by itself once it is up; until then it is ignored, and written down here, so that it is not lost.
set -u
source "$MEGAPSFT_HOME/launchers/slurm/env.sh"

# shellcheck disable=SC2317  # the trap calls it
signalled() {
  [ -n "${ATTEMPT:-}" ] || return
  touch "$ATTEMPT/signalled"
  if [ -n "${KILL_ON_SIGNAL:-}" ]; then kill "$rank"; else touch "$RUN/stop"; fi
}
trap signalled USR1
(trap '' USR1; exec "$MEGAPSFT_PYTHON" -u -m megapsft.cli "$@") &
rank=$!
while :; do  # a signal ends the wait, and not the rank
  wait "$rank"
  code=$?
  kill -0 "$rank" 2>/dev/null || break
done
wait "$rank" 2>/dev/null && again=0 || again=$?
[ "$again" -eq 127 ] || code=$again  # 127: it was waited for; else the signal came last, and this is how the rank ended
[ "$code" -ne 75 ] || code=0 # a single rank that was stopped; where there are several they end with 0 themselves
if [ "$code" -ne 0 ] && [ -n "${ATTEMPT:-}" ]; then
  echo "$(date +%s.%N) ${SLURM_PROCID:-0} $(hostname) $code" >>"$ATTEMPT/failures"  # the first of them is where to look
fi
exit "$code"
