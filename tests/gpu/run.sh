#!/usr/bin/env bash
# Checks or measurements on a GPU machine without network; what is installed goes into a temporary folder.
#
#   tests/gpu/run.sh test|bench OUT [TE.tar.xz] [arguments of pytest, or of benchmarks/gpu.py]
#
# Before, where there is a network: make gpu-wheels. TE.tar.xz: the folder of Transformer Engine's packages, as `pip install
# --target` makes it, built for the torch and the GPU of this machine; without it the interpreter must have them. PYTHON: the
# interpreter that has torch (default: python3). OUT gets the JSON as it grows, so that it is there whenever this is killed; then
# the page, the picture and the log. What docs/results has of the same day and machine stays and is gone on with:
#
#   tests/gpu/run.sh test OUT TE.tar.xz tests/gpu/test_head.py      # then copy OUT/*.json to docs/results, and
#   tests/gpu/run.sh test OUT TE.tar.xz --deselect=tests/gpu/test_head.py
set -euo pipefail
what=$1 out=$2
shift 2
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
case ${1:-} in
    *.tar.*)
        "$python" -W ignore -m tarfile -e "$1" "$site"
        shift
        ;;
esac
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" wheels-gpu/*.whl
for file in docs/results/gpu.json docs/results/test_gpu.json; do
    if [ -e "$file" ] && [ ! -e "$out/${file##*/}" ]; then cp "$file" "$out"; fi
done
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -m tests.gpu "$what" --results "$out" "$@" 2>&1 | tee "$out/$what.log"
