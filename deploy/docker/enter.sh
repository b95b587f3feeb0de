#!/bin/sh
# Becomes `trifold ARGUMENTS`. Where a token lies in the working directory, it enrols there as a node first, with
# the authority at $ENROL_AT, and with another key than before.
set -eu
if [ -e token ]; then
    rm -rf node
    TRIFOLD_TOKEN=$(cat token) trifold node enroll "$ENROL_AT" --fingerprint "$(cat fingerprint)" --into node
    rm token
fi
exec trifold "$@"
