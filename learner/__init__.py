"""The learner stage: verdicts in, adapters out; the only folder that imports torch and TRL."""

from nextstate.offline import go_offline

go_offline()  # before transformers and its hub client are imported, whoever imports them here
