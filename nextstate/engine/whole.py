"""Versions that are whole models: each has an engine of its own, which `nextstate up` runs.

Whoever wants to put such a version into service asks for its engine by a file in the state folder,
`engines/NAME.json`. The supervisor starts the engine beside those that run, and writes its address
or why it failed there (`nextstate/app/engine_pool.py`). Once the engine has agreed with the
learner's log-probs of fixed prompts, the version may serve.
"""

from __future__ import annotations

PROBE_FILE = "probe.json"
"""In a version's folder: the learner's own log-probs after fixed prompts."""
