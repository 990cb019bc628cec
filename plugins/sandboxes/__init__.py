"""Sandboxes: where an environment runs commands of an agent, which are hostile."""
