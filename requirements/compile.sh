#!/usr/bin/env bash
# Resolves requirements/*.lock from pyproject.toml with uv. torch is left out of the CPU lock: its
# wheel comes from requirements/torch.txt, because a CPU build has another hash than PyPI's.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--extra judge --extra learner --extra demo --extra dev --python-version 3.11
        --python-platform x86_64-unknown-linux-gnu --generate-hashes --no-annotate --no-header)
uv pip compile pyproject.toml "${common[@]}" --extra cpu --no-emit-package torch \
   --override requirements/overrides.txt ${FIND_LINKS:+--find-links "$FIND_LINKS"} \
   --output-file requirements/cpu.lock
uv pip compile pyproject.toml "${common[@]}" --extra cuda --output-file requirements/cuda.lock
uv pip compile requirements/docs.in --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --generate-hashes \
   --no-annotate --no-header --output-file requirements/docs.lock
