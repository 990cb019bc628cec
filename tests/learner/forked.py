"""Processes that a test of the learner ends: forked from one that has imported all they need.

It has computed nothing: a fork of a process that has would share its OpenMP threads.
"""

import gc
import multiprocessing

from nextstate.quick_imports import quick_imports

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([f"{__name__}_imports"])


def prepare() -> None:
    """Imports and reads what each learner would, in the process that they are forked from."""
    with quick_imports():
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

        import tests.learner.test_crash
        import tests.learner.test_ranks_faults  # noqa: F401
    get_checkpoint_conversion_mapping("qwen3")  # it compiles 700 patterns, once in a process
    gc.freeze()  # else each collection in a child looks through all of it
