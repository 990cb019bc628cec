"""The learner stage: verdicts in, adapters out; the only folder that imports torch and TRL."""
