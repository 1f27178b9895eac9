#!/bin/bash
# An SGLang server as a job step: bash serve.sh READY FIRST_GPU GPUS CONFIG.yaml --port PORT ... (arguments of megapsft serve).
# One that dies is started again, thrice; it is given the weights with the next update.
set -u
source "$MEGAPSFT_HOME/launchers/slurm/env.sh"
trap '' USR1  # before the time is over it is the trainer that ends

ready=$1 first=$2 gpus=$3
shift 3
if [ "$gpus" -gt 0 ]; then
  mapfile -t mine < <(tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((first + gpus - 1)))}")
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]:first:gpus}")
  export CUDA_VISIBLE_DEVICES
fi
for attempt in 1 2 3 4; do
  "$MEGAPSFT_PYTHON" -u -m megapsft.cli serve "$@" --host "$(hostname)" --ready "$ready" && exit 0
  echo "$(hostname): the server ended with exit code $? (start $attempt of 4)"
  rm -f "$ready"
done
exit 1
