"""Imported by name in the process that tests' learners are forked from."""

from tests.learner.forked import prepare

prepare()
