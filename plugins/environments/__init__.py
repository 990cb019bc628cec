"""Environments: what agents act in, each found by its name (`nextstate rollout NAME`)."""
