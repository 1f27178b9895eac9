# The checks of the nodes, before a rank is started; sourced by job.sh.
# shellcheck shell=bash

preflight() { return 0; }
