#!/usr/bin/env bash
# Resolves requirements/*.lock from pyproject.toml with uv, for Python 3.11, and checks that the same
# versions resolve for 3.12 and 3.13. torch is left out of the CPU lock: its wheel comes from
# requirements/torch.txt, because a CPU build has another hash than PyPI's.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(pyproject.toml --extra judge --extra learner --extra demo --extra dev
        --python-platform x86_64-unknown-linux-gnu --no-annotate --no-header)
cpu=(--extra cpu --no-emit-package torch --override requirements/overrides.txt)
uv pip compile "${common[@]}" "${cpu[@]}" ${FIND_LINKS:+--find-links "$FIND_LINKS"} \
   --python-version 3.11 --generate-hashes --output-file requirements/cpu.lock
uv pip compile "${common[@]}" --extra cuda \
   --python-version 3.11 --generate-hashes --output-file requirements/cuda.lock
uv pip compile requirements/docs.in --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --generate-hashes \
   --no-annotate --no-header --output-file requirements/docs.lock
uv pip compile requirements/audit.in --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --generate-hashes \
   --no-annotate --no-header --output-file requirements/audit.lock

# The CPU wheels of torch may not be there for each Python: their own needs stand for them.
checks=$(mktemp -d)
trap 'rm -r "$checks"' EXIT
{ cat requirements/overrides.txt; echo "torch; sys_platform == 'never'"; } > "$checks/overrides.txt"
printf '%s\n' filelock fsspec jinja2 networkx setuptools sympy typing-extensions > "$checks/torch.in"
pins() { sed -E '/^ +--hash/d; s/ *\\$//; /^#/d' "$1"; }
for lock in cpu cuda; do
  pins "requirements/$lock.lock" > "$checks/$lock.pins"
  more=(--extra "$lock")
  [ "$lock" = cuda ] || more+=("$checks/torch.in" --override "$checks/overrides.txt")
  for python in 3.12 3.13; do
    uv pip compile "${common[@]}" "${more[@]}" --constraint "$checks/$lock.pins" \
       --python-version "$python" --quiet --output-file "$checks/found"
    diff <(pins "$checks/found") "$checks/$lock.pins" || \
      { echo "requirements/$lock.lock does not hold for Python $python"; exit 1; }
  done
done
