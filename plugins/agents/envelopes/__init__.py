"""What the agents that people use write around, before and after a person's words."""
