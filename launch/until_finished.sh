#!/bin/sh
# Trains in the folder $1 with the other arguments, for schedulers that start a job again when it fails.
#
# A run that SIGTERM stopped exits with 0 because it has saved everything; a scheduler would take it for finished.
# This script exits with 0 only when the last step has been taken (which draws curves.png), with 75, "try again", when
# the run was stopped before, and with the run's own code when it failed. It hands SIGTERM on, as the first process of a
# container does not do by itself.
workdir=$1
shift
run= stop=
trap 'stop=yes; [ -n "$run" ] && kill -TERM "$run"' TERM
"${PYTHON:-python}" -m kimi_jax.train --workdir "$workdir" "$@" &
run=$!
[ -n "$stop" ] && kill -TERM $run
wait $run
code=$?
while kill -0 $run 2>/dev/null; do # a signal ends wait before the run ends
    wait $run
    code=$?
done
[ $code -ne 0 ] && exit $code
[ -e "$workdir/curves.png" ] && exit 0
exit 75
