#!/bin/bash
# exclude.sh JOB FIRST NODES: once the job is back in the queue and held, its first part (FIRST; JOB itself where it has only one)
# may not have these nodes any more, and it is let go. A small job of its own, which preflight.sh submits.
set -u
job=$1 first=$2 nodes=$3
while [ -n "$(squeue --noheader --jobs="$job" 2>/dev/null)" ]; do
  if scontrol update JobId="$first" ExcNodeList="$nodes" 2>/dev/null; then  # refused while it runs
    scontrol release "$job"
    echo "job $job: excluded $nodes"
    exit
  fi
  sleep 1
done
echo "job $job is not in the queue any more"
